"""What the verb `plan` can be told."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from ..options import MemoryOptions, Precision, parse_size

__all__ = ["PlanOptions"]


@dataclass(frozen=True)
class PlanOptions(MemoryOptions):
    """Tell how a model fits into your memory: what is where in each stage, what that takes, and how much longer it lasts.

    Nothing is loaded or run, and no GPU is needed. `cogvideox generate` with the same --vram and --ram does what the plan says.
    """

    model: str
    """A release (2b, 5b, 5b-i2v, 1.5-5b, ...) or its repository on the Hugging Face hub, a pipeline folder (its configs are enough), or
    one of the models that come with the package: "demo", "demo-i2v"."""
    _: KW_ONLY
    size: str | None = None
    """Height x width in pixels, such as 480x720 (default: what the model was trained for)."""
    frames: int | None = None
    """Number of frames (default: what the model was trained for)."""
    window: int | None = None
    """Frames of the windows in which a long video is made, as in generate."""
    videos: int = 1
    """Videos that are made at once."""
    steps: int | None = None
    """Steps of the sampler (default: what the model recommends)."""
    guidance: bool = True
    """Predict with and without the prompt."""
    dtype: Precision | None = None
    """Precision (default: what the model was trained in)."""
    device: Literal["cuda", "cpu"] | None = None
    """Kind of device to plan for (default: cuda with --vram, else what this machine has)."""
    json: bool = False
    """Print JSON instead of text."""

    def __post_init__(self) -> None:
        """Raise ValueError for sizes, counts and amounts that cannot be."""
        super().__post_init__()
        if self.size is not None:
            parse_size(self.size)
        for name in ("frames", "window", "videos", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} is not possible: it must be at least 1.")
        if self.device == "cpu" and self.vram is not None:
            raise ValueError(f"--vram {self.vram} has no meaning with --device cpu: give --ram.")
