"""A memory plan as a value: what is where in each stage, what that takes, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ...models.vae_memory import Saving
from ...units import in_words
from .costs import Placement, TransformerMode
from .workload import Machine, Workload

__all__ = ["Plan", "StagePlan"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: name, the part that works, what is done in words, bytes at the peak, seconds, and the reasons."""

    name: str
    part: str
    how: tuple[str, ...]
    device: int
    host: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a pipeline fits a workload into a budget.

    Args:
        model, dtype, device: what runs, in which precision, on which kind of device.
        work, vram, ram: what was asked for, and the bytes that were given; None is no limit.
        placements: of each part's weights.
        transformer: how the loop saves memory.
        coding: how the VAE does, by direction.
        stages: in their order.
        fastest: seconds of the fastest plan without any limit.
        machine: the speeds that times were computed with.
        reasons: in words.
    """

    model: str
    dtype: str
    device: str
    work: Workload
    vram: int | None
    ram: int | None
    placements: dict[str, Placement]
    transformer: TransformerMode
    coding: dict[str, Saving]
    stages: tuple[StagePlan, ...]
    fastest: float
    machine: Machine
    reasons: tuple[str, ...] = ()

    @property
    def device_peak(self) -> int:
        """Bytes on the device at the peak; 0 on a processor."""
        return max(stage.device for stage in self.stages)

    @property
    def host_peak(self) -> int:
        """Bytes of the whole process in the memory of the host at the peak."""
        return max(stage.host for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of one call, at the speeds that were assumed."""
        return math.fsum(stage.seconds for stage in self.stages)

    @property
    def slow_down(self) -> float:
        """How much longer than without any limit: 0.1 is a tenth."""
        return self.seconds / self.fastest - 1

    def table(self) -> str:
        """The plan for people: a table of the stages, and the reasons."""
        on_cpu = self.device == "cpu"
        limits = [f"{in_words(limit)} of {name}" for limit, name in ((self.vram, "device memory"), (self.ram, "RAM")) if limit]
        lines = [f"{self.model} in {self.dtype}: {self.work}", f"budget: {' and '.join(limits) or 'none'}", ""]
        heads = ["stage", *([] if on_cpu else ["device"]), "host", "time"]
        rows = [heads]
        for stage in self.stages:
            sizes = [in_words(size) if size else "-" for size in ([] if on_cpu else [stage.device]) + [stage.host]]
            rows.append([stage.name, *sizes, f"{100 * stage.seconds / self.seconds:.0f} %"])
        peaks = [in_words(size) for size in ([] if on_cpu else [self.device_peak]) + [self.host_peak]]
        rows.append(["peak", *peaks, ""])
        hows = ["how", *("; ".join(stage.how) for stage in self.stages), ""]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row, how in zip(rows, hows, strict=True):
            first, *others = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            lines.append("  ".join([first, *others, how]).rstrip())
        return "\n".join([*lines, "", *self.reasons])

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        facts = asdict(self)
        facts |= {"device_peak": self.device_peak, "host_peak": self.host_peak, "seconds": self.seconds, "slow_down": self.slow_down}
        facts["machine"] = {name: speed if math.isfinite(speed) else None for name, speed in asdict(self.machine).items()}
        return facts
