"""The sampler: the noise process, the two solvers, and the scheduler that walks a timestep grid with them."""

from __future__ import annotations

from .scheduler import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXScheduler, CogVideoXSchedulerOutput

__all__ = ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "CogVideoXScheduler", "CogVideoXSchedulerOutput"]
