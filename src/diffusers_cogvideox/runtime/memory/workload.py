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
        videos: how many are made at once.
        guided: whether the loop predicts with and without the prompt, in one pass.
        steps: of the loop.
        text_tokens: of each prompt.
        prompts: that are encoded at once; 0 for embeddings that are passed.
        encoded_frames: of a picture (1) or a video that is encoded at the beginning.
    """

    height: int
    width: int
    num_frames: int
    videos: int = 1
    guided: bool = True
    steps: int = 50
    text_tokens: int = 226
    prompts: int = 1
    encoded_frames: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a number that is not possible."""
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("prompts", "encoded_frames") else 1
            if field.name != "guided" and (not isinstance(value, int) or value < least):
                raise ValueError(f"{field.name}={value!r} is not possible: it must be a whole number of at least {least}.")

    @property
    def passes(self) -> int:
        """Samples of a pass of the transformer."""
        return self.videos * (2 if self.guided else 1)

    def latents(self, geometry: Geometry) -> tuple[int, int, int]:
        """Latents (f, h, w) that the loop works on, padding included. Raises ValueError for sizes that cannot be."""
        frames, height, width = geometry.latent_shape(self.num_frames, self.height, self.width)
        return frames + geometry.front_padding(frames), height, width

    def covers(self, other: Workload) -> bool:
        """Whether whatever `other` takes, this takes too."""
        return all(getattr(self, field.name) >= getattr(other, field.name) for field in fields(self))

    def joined(self, other: Workload) -> Workload:
        """The smallest workload that covers both."""
        values: dict[str, Any] = {field.name: max(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)}
        return replace(self, **values)

    def __str__(self) -> str:
        count = "" if self.videos == 1 else f"{self.videos} videos of "
        guidance = "with guidance" if self.guided else "without guidance"
        return f"{count}{self.num_frames} frames of {self.height}x{self.width}, {self.steps} steps {guidance}"


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
"""By kind of device: a few processor cores; a fast consumer card on PCIe 4.0 x16, for which weights come less in time than for a slower one."""
