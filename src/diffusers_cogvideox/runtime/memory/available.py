"""How much memory there is to plan with, and how much this process has taken."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from ...models.vae_memory import free_memory

__all__ = ["free_ram", "free_vram", "resident_bytes"]

_SHARE = 0.9  # of what is free; the rest is for others
_CGROUP = Path("/sys/fs/cgroup")


def free_ram(processes: int = 1) -> int:
    """Bytes of host memory that this process may take in all, with what it has already: nine tenths of what is free, or its part of that
    where as many `processes` as it is one of take memory on this machine.
    """
    free = psutil.virtual_memory().available
    limit, used = (_read(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:  # of a container
        free = min(free, max(0, limit - used))
    return int(_SHARE * free) // processes + resident_bytes()


def free_vram(device: str | torch.device) -> int | None:
    """Bytes that PyTorch may allocate on an accelerator in all; None where the device does not say, and where there is none."""
    place = torch.device(device)
    if place.type != "cuda" or not torch.cuda.is_available():
        return None
    free = free_memory(place)
    return None if free is None else int(_SHARE * free) + torch.cuda.memory_allocated(place)


def resident_bytes() -> int:
    """Bytes of host memory that this process holds now."""
    return psutil.Process().memory_info().rss


def _read(file: Path) -> int | None:
    """The number in a file of the system; None where it holds none."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
