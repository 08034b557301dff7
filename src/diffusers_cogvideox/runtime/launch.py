"""Processes that were started together, by torchrun or in its way: how they find each other, agree, and end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

__all__ = ["TIMEOUT", "Launch", "launched", "together"]

TIMEOUT = 600.0
"""Seconds after which a rank stops waiting for the others: longer than a step takes, or than weights that lie elsewhere take to load."""

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """One of `count` processes that were started together, `on_machine` of them on this one's machine."""

    rank: int = 0
    count: int = 1
    on_machine: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.count == 1

    def agreed(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first process, on all of them, so that files that come and go meanwhile confuse nobody.

        Raises:
            Exception: what `make` raises, on the first process.
            SystemExit: on the others, silently.
        """
        if self.alone:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box[0] = (make(),)
            finally:
                dist.broadcast_object_list(box)
        else:
            dist.broadcast_object_list(box)
            if box[0] is None:
                raise SystemExit(2)
        return box[0][0]

    def least(self, number: T) -> T:
        """The smallest of the numbers that the processes name."""
        if self.alone:
            return number
        numbers: list[Any] = [None] * self.count
        dist.all_gather_object(numbers, number)
        return min(numbers)


def launched() -> int:
    """How many processes were started together, by the environment variable that torchrun sets."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def together(device: str | None = None, timeout: float = TIMEOUT) -> Iterator[Launch]:
    """The processes of `torchrun` as ranks of a process group, while the block runs; a process of its own stays one.

    Each rank takes the GPU of its number on its machine, or the processor where there is none or `device` is "cpu".

    Args:
        device: "cuda", "cpu", or None for what there is.
        timeout: seconds after which a rank that waits for the others in vain raises an error.

    Raises:
        ValueError: for more processes than GPUs on this machine, and for a single GPU named for several processes.
    """
    if launched() == 1:
        yield Launch()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device} is one device for {launched()} processes: leave it out, or write cuda.")
    if on_gpu and local >= torch.cuda.device_count():
        raise ValueError(
            f"This machine has {torch.cuda.device_count()} GPUs, but more processes were started on it: lower --nproc_per_node, or use "
            "--device cpu."
        )
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield Launch(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", launched())))
    finally:
        dist.destroy_process_group()
