"""Classifier-free guidance: u + w (c - u), with w constant or following one of two schedules. Pure functions."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["DYNAMIC_RULES", "dynamic_rule", "guidance_at", "guide"]

DYNAMIC_RULES = ("stock", "progress")


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Guided prediction u + w (c - u) from two predictions of one shape, (B, F, C, H, W).

    "Classifier-Free Diffusion Guidance" (arXiv 2207.12598) in the notation of Imagen (arXiv 2205.11487), eq. 2.
    """
    return unconditional + scale * (conditional - unconditional)


def dynamic_rule(use_dynamic_cfg: bool | str) -> str | None:
    """Name of the schedule that `use_dynamic_cfg` asks for: False gives None, True gives "stock".

    Raises:
        ValueError: for any other name than those in DYNAMIC_RULES.
    """
    if isinstance(use_dynamic_cfg, bool):
        return DYNAMIC_RULES[0] if use_dynamic_cfg else None
    if use_dynamic_cfg not in DYNAMIC_RULES:
        raise ValueError(f"use_dynamic_cfg={use_dynamic_cfg!r} is unknown: use a bool or one of {DYNAMIC_RULES}.")
    return use_dynamic_cfg


def guidance_at(rule: str | None, scale: float, *, index: int, timestep: float, steps: int) -> float:
    """Guidance scale of one step: w_i = 1 + w (1 - cos(pi p^5)) / 2, or w itself when `rule` is None.

    "progress": p = i / n, so the scale rises smoothly from 1 towards 1 + w (the formula's intent).
    "stock": p = (n - t) / n with the raw timestep t (0..999) in place of the step number, so the scale swings between
    1 and 1 + w. The original code and diffusers both compute this, and the authors found that it works well.

    Args:
        rule: None, "stock" or "progress".
        scale: the guidance scale w that the user asked for.
        index: step i, from 0.
        timestep: training timestep t of that step.
        steps: number of steps n.
    """
    if rule is None:
        return scale
    p = index / steps if rule == "progress" else (steps - timestep) / steps
    return 1 + scale * (1 - math.cos(math.pi * p**5)) / 2
