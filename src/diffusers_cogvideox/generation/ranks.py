"""Videos made by several processes together: who does what, within which memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import logging

from ..options import GenerateOptions
from ..pipelines.base import CogVideoXPipelineBase
from ..runtime.launch import Launch
from ..runtime.memory.available import free_ram, free_vram
from ..runtime.parallel import share_work
from .job import Job

__all__ = ["agreed_budgets", "check_launch", "share_launch"]

logger = logging.get_logger(__name__)


def check_launch(options: GenerateOptions, jobs: Sequence[Job], launch: Launch) -> None:
    """Raise ValueError for options that need several processes where there is one, or one where there are several."""
    if launch.alone and options.parallel is not None:
        raise ValueError(
            f"--parallel {options.parallel} says how several processes share the work, but there is one: start them with "
            "torchrun --nproc_per_node N -m diffusers_cogvideox generate ..."
        )
    quantised = next((job.settings.quantisation for job in jobs if job.settings.quantisation), None)
    if quantised and not launch.alone:
        raise ValueError(f"--quantisation {quantised} is for one process: several share the weights as they are. Leave it out.")


def agreed_budgets(options: GenerateOptions, device: str, launch: Launch) -> dict[str, Any]:
    """What each process may take, as arguments of `fit`: what the options say. Where they do not, several processes take the smallest
    amount that one of them has free, so that all make the same plan.
    """
    budgets: dict[str, Any] = {"vram": options.vram, "ram": options.ram}
    if launch.alone:
        return budgets
    vram = free_vram(torch.empty(0, device=device).device)
    free = {"vram": None if vram is None else launch.least(vram), "ram": launch.least(free_ram(launch.on_machine))}
    return {name: given or free[name] for name, given in budgets.items()}


def share_launch(
    pipe: CogVideoXPipelineBase, jobs: Sequence[Job], options: GenerateOptions, launch: Launch, budgets: Mapping[str, Any]
) -> dict[str, Any]:
    """Let the processes share the work, each within the budgets, and log what it does; returns what the files of the videos say about it.

    Raises ValueError for a way that is not possible, and for what does not fit.
    """
    if launch.alone:
        return {}
    roles = share_work(pipe, options.parallel or "auto", guided=any(job.settings.guidance_scale > 1 for job in jobs))
    each = [roles.of(rank) for rank in range(launch.count)]
    for rank, role in enumerate(each):  # shown by the first process, to which diffusers restricts its loggers
        logger.info(f"rank {rank} of {launch.count}: {role}")
    pipe.fit(**jobs[0].settings.fit_arguments(), **budgets)
    return {"processes": {"count": launch.count, "roles": each}}
