"""Time and memory that the stages of a call take in fact."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from .available import resident_bytes

__all__ = ["StageUsage", "Usage"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class StageUsage:
    """Of one stage: seconds; bytes at the peak that PyTorch had allocated on the accelerator, and that the process held in host memory.

    Where nothing can be measured, the peak is None.
    """

    seconds: float = 0.0
    device: int | None = None
    host: int | None = None


class Usage:
    """Measures the stages of one call after the other."""

    def __init__(self) -> None:
        self.stages: dict[str, StageUsage] = {}

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Measure the block as a part of a stage that runs on `device`."""
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        _forget_peak()
        start = time.perf_counter()
        try:
            yield
        finally:
            if on_cuda:
                torch.cuda.synchronize(device)
            found = self.stages.setdefault(name, StageUsage())
            found.seconds += time.perf_counter() - start
            found.host = max(found.host or 0, _peak())
            if on_cuda:
                found.device = max(found.device or 0, torch.cuda.max_memory_allocated(device))


def _forget_peak() -> None:
    """Let the system's record of this process's peak begin anew, where it can (Linux)."""
    with suppress(OSError):
        _CLEAR.write_text("5")


def _peak() -> int:
    """Most bytes of host memory that this process has held since `_forget_peak`; where the system does not tell, those it holds now."""
    if sys.platform == "linux":
        with suppress(OSError):
            line = next((line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")), "")
            if line:
                return int(line.split()[1]) * 1024
    return resident_bytes()
