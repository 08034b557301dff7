"""What a plan is made for: one call of a pipeline, as sizes; and the machine that it runs on, as speeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from ...geometry import Geometry

__all__ = ["MACHINES", "Machine", "Workload", "encoded_frames"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes of one call.

    Args:
        height, width: pixels.
        num_frames: frames of each video.
        seen_frames: those that a pass of the transformer sees at once, where the loop has windows; 0 for all.
        windows: how many of them a step goes through.
        videos: how many are made at once.
        guided: whether the loop predicts with and without the prompt.
        sequential: whether it does so in one pass after the other.
        steps: of the loop.
        text_tokens: of each prompt.
        prompts: that are encoded at once; 0 for embeddings that are passed.
        encoded_frames: of a picture (1) or a video that is encoded at the beginning.
    """

    height: int
    width: int
    num_frames: int
    seen_frames: int = 0
    windows: int = 1
    videos: int = 1
    guided: bool = True
    sequential: bool = False
    steps: int = 50
    text_tokens: int = 226
    prompts: int = 1
    encoded_frames: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is not possible."""
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("prompts", "encoded_frames", "seen_frames") else 1
            if field.type != "bool" and (not isinstance(value, int) or value < least):
                raise ValueError(f"{field.name}={value!r} is not possible: it must be a whole number of at least {least}.")

    @property
    def passes(self) -> int:
        """Samples of a pass of the transformer."""
        return self.videos * (2 if self.guided and not self.sequential else 1)

    def latents(self, geometry: Geometry, *, seen: bool = False) -> tuple[int, int, int]:
        """Latents (f, h, w) that the loop works on, or a pass sees, padding included. Raises ValueError for sizes that cannot be."""
        most = self.num_frames
        frames = min(self.seen_frames or most, most) if seen else most
        shape = geometry.latent_shape(frames, self.height, self.width)
        return shape[0] + geometry.front_padding(shape[0]), *shape[1:]

    def covers(self, other: Workload) -> bool:
        """Whether whatever memory `other` takes, this takes too; more windows take time only."""
        return replace(self.joined(other), windows=self.windows) == replace(self.joined(self), windows=self.windows)

    def joined(self, other: Workload) -> Workload:
        """The smallest workload that covers both."""
        values: dict[str, Any] = {field.name: max(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        seen = max(each.seen_frames or each.num_frames for each in (self, other))
        values["seen_frames"] = 0 if seen >= values["num_frames"] else seen
        if not values["seen_frames"]:
            values["windows"] = 1
        values["sequential"] = self.sequential and other.sequential
        return replace(self, **values)

    def __str__(self) -> str:
        count = "" if self.videos == 1 else f"{self.videos} videos of "
        guidance = "with guidance" if self.guided else "without guidance"
        windows = f" in windows of {self.seen_frames}" if 0 < self.seen_frames < self.num_frames else ""
        return f"{count}{self.num_frames} frames of {self.height}x{self.width}{windows}, {self.steps} steps {guidance}"


def encoded_frames(pipeline: str, num_frames: int) -> int:
    """Frames that a pipeline, by its class name, encodes before its loop: none, a picture, or a video as long as the result."""
    return {"CogVideoXPipeline": 0, "CogVideoXImageToVideoPipeline": 1}.get(pipeline, num_frames)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds that the times of a plan are computed with. They rank the plans; nobody has measured them on your machine.

    Args:
        compute: operations per second that the device keeps up.
        link: bytes per second from pinned host memory to the device.
        disk: bytes per second from disk.
    """

    compute: float
    link: float
    disk: float

    def __str__(self) -> str:
        link = "" if math.isinf(self.link) else f", {self.link / 1e9:g} GB/s from host memory"
        return f"{self.compute / 1e12:g} TFLOP/s{link}, {self.disk / 1e9:g} GB/s from disk"


MACHINES = {
    "cpu": Machine(compute=0.2e12, link=math.inf, disk=1e9),
    "cuda": Machine(compute=150e12, link=25e9, disk=3e9),
}
"""By kind of device: a few processor cores; a fast consumer card on PCIe 4.0 x16. For a slower card weights come in time more easily."""
