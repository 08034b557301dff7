"""Guidance: predictions pushed away from worse ones, by how much, and in which steps. Pure functions."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["DYNAMIC_RULES", "Interval", "check_interval", "dynamic_rule", "guidance_at", "guide", "guide_away", "steps_inside"]

DYNAMIC_RULES = ("stock", "progress")

Interval = tuple[float, float]
"""(start, stop) of a part of the loop, in fractions of its steps."""


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Guided prediction u + w (c - u) from two predictions of one shape, (B, F, C, H, W).

    "Classifier-Free Diffusion Guidance" (arXiv 2207.12598) in the notation of Imagen (arXiv 2205.11487), eq. 2.
    """
    return unconditional + scale * (conditional - unconditional)


def guide_away(prediction: Tensor, good: Tensor, bad: Tensor, scale: float) -> Tensor:
    """Prediction with the step from a worse prediction to a good one on top, p + s (g - b); all (B, F, C, H, W).

    "Guiding a Diffusion Model with a Bad Version of Itself" (arXiv 2406.02507), eq. 3, added to other guidance as in
    spatio-temporal skip guidance (arXiv 2411.18664): b is the same model with layers left out.
    """
    return prediction + scale * (good - bad)


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


def check_interval(interval: Interval, option: str) -> None:
    """Raise ValueError unless `interval` is a part of the loop, 0 <= start < stop <= 1; `option` is what the message calls it."""
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"{option}={interval} is not possible: it must be (start, stop) in fractions of the steps, 0 <= start < stop <= 1."
        )


def steps_inside(interval: Interval, steps: int, option: str) -> range:
    """Steps i of n = `steps` with start <= i / n < stop, such as those that guidance is limited to (arXiv 2404.07724).

    Raises:
        ValueError: for an interval without any step; `option` is what the message calls it.
    """
    start, stop = interval
    inside = [i for i in range(steps) if start <= i / steps < stop]
    if not inside:
        raise ValueError(f"{option}={interval} holds none of {steps} steps: make it at least {1 / steps:.3g} wide, or take more steps.")
    return range(inside[0], inside[-1] + 1)
