"""Videos made by several processes together: what they cannot do, and who does what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.utils import logging

from ..options import GenerateOptions
from ..pipelines.base import CogVideoXPipelineBase
from ..runtime.launch import Launch
from ..runtime.parallel import share_work
from .job import Job

__all__ = ["check_launch", "share_launch"]

logger = logging.get_logger(__name__)


def check_launch(options: GenerateOptions, jobs: Sequence[Job], launch: Launch) -> None:
    """Raise ValueError for options that need one process, or several."""
    if launch.alone and options.parallel is not None:
        raise ValueError(
            f"--parallel {options.parallel} says how several processes share the work, but there is one: start them with "
            "torchrun --nproc_per_node N -m diffusers_cogvideox generate ..."
        )
    if launch.alone:
        return
    if options.vram or options.ram:
        raise ValueError("--vram and --ram are for one process: of several, each has the whole pipeline on its device. Leave them out.")
    if options.checkpoint_every:
        raise ValueError(f"--checkpoint-every {options.checkpoint_every} is not possible with several processes: leave it out.")
    for job in jobs:
        if job.journal.exists() and not options.overwrite:
            raise ValueError(f"{job.journal} is of an interrupted run of one process: let one finish it, or start anew with --overwrite.")


def share_launch(pipe: CogVideoXPipelineBase, jobs: Sequence[Job], options: GenerateOptions, launch: Launch) -> dict[str, Any]:
    """Let the processes share the work, and log what each does; returns what the files of the videos say about it.

    Raises ValueError for a way that is not possible.
    """
    if launch.alone:
        return {}
    roles = share_work(pipe, options.parallel or "auto", guided=any(job.settings.guidance_scale > 1 for job in jobs))
    each = [roles.of(rank) for rank in range(launch.count)]
    for rank, role in enumerate(each):  # shown by the first process, to which diffusers restricts its loggers
        logger.info(f"rank {rank} of {launch.count}: {role}")
    return {"processes": {"count": launch.count, "roles": each}}
