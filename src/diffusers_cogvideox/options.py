"""What each verb of the command line can be told: one field gives the flag, the default, the help and the Python argument.

The text under a field is its help. Rules that need no model are checked here; those that do, where the model is known.
"""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass
from typing import Literal

__all__ = ["DEMO", "EvaluateOptions", "GenerateOptions", "InfoOptions", "Precision", "Sampler", "SamplingOptions", "parse_size"]

DEMO = "demo"
"""The name under which every verb knows the shipped model."""

Sampler = Literal["ddim", "dpm"]
Precision = Literal["float32", "bfloat16", "float16"]


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from "HxW".

    >>> parse_size("480x720")
    (480, 720)
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"--size {text!r} is not a size: write height x width in pixels, such as 480x720.")
    return int(match[1]), int(match[2])


def _at_least(minimum: int, **values: float | None) -> None:
    """Raise ValueError for a value below `minimum`; None means "not given"."""
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not possible: it must be at least {minimum}.")


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample. What is left out, the checkpoint decides: the released models' recommendations, or its cogvideox.json."""

    _: KW_ONLY
    steps: int | None = None
    """Steps of the sampler, 1 to 1000 (default: what the checkpoint recommends)."""
    guidance_scale: float | None = None
    """How strongly to follow the prompt; 1 or less turns guidance off (default: what the checkpoint recommends)."""
    sampler: Sampler | None = None
    """The sampler: DDIM, or SDE-DPM-Solver++ (default: what the checkpoint recommends)."""
    dtype: Precision | None = None
    """Precision (default: what the checkpoint was trained in; on a CPU bfloat16 instead of float16)."""
    device: str | None = None
    """Where to run, such as cpu or cuda:1 (default: the GPU if there is one)."""
    seed: int = 0
    """Seed of the noise. Further videos take the seeds after it."""
    overwrite: bool = False
    """Replace files that exist already."""

    def __post_init__(self) -> None:
        _at_least(0, seed=self.seed, guidance_scale=self.guidance_scale)
        _at_least(1, steps=self.steps)


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions):
    """Make videos of what a prompt says.

    Beside each video stand a PNG with frames of it, and a JSON file with everything that is needed to make it again:
    `cogvideox generate VIDEO.json`.
    """

    prompt: str
    """What to show. Or a file: PROMPTS.txt with one prompt per line, or the VIDEO.json of an earlier run, to make that video again."""
    _: KW_ONLY
    model: str = DEMO
    """Pipeline folder, repository on the Hugging Face hub (such as zai-org/CogVideoX-2b), or "demo" for the small model that
    comes with the package."""
    output: str | None = None
    """File (.mp4), or folder for files named after prompt and seed (default: the folder outputs)."""
    negative_prompt: str | None = None
    """What to steer away from."""
    num_videos: int = 1
    """Videos per prompt, with the seeds SEED, SEED + 1, ..."""
    size: str | None = None
    """Height x width in pixels, multiples of 16, such as 480x720 (default: what the checkpoint was trained for)."""
    frames: int | None = None
    """Number of frames, 8k + 1, such as 17 or 49 (default: what the checkpoint was trained for)."""
    fps: int | None = None
    """Frames per second of the file (default: what the checkpoint was trained for)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, num_videos=self.num_videos, fps=self.fps, frames=self.frames)
        if self.size is not None:
            parse_size(self.size)


@dataclass(frozen=True)
class InfoOptions:
    """Tell what a checkpoint is: variant, sizes, parameters, precision, sampler. Weights are not loaded."""

    model: str = DEMO
    """Pipeline folder, folder of a single transformer or vae, repository on the Hugging Face hub, or "demo" for the small model
    that comes with the package."""
    _: KW_ONLY
    json: bool = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class EvaluateOptions(SamplingOptions):
    """Measure how well a model shows what prompts say.

    shapes: prompts about one moving shape that were held out from training. Colour, shape, background and motion are measured
    in the videos, beside the ground truth, the VAE's reconstruction of it, an untrained transformer, and the same videos
    compared with other prompts. Writes shapes.json and shapes.png.
    """

    what: Literal["shapes"]
    """What to measure: shapes."""
    model: str = DEMO
    """Pipeline folder, repository on the Hugging Face hub, or "demo" for the small model that comes with the package."""
    _: KW_ONLY
    output: str = "evaluation"
    """Folder for the report."""
    prompts: int = 300
    """Number of prompts."""
    untrained_prompts: int = 64
    """Number of prompts for the untrained transformer, one of the baselines."""
    batch_size: int = 8
    """Videos made at once."""
    baselines: bool = True
    """Also measure the ground truth, the reconstruction and the untrained transformer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(1, prompts=self.prompts, untrained_prompts=self.untrained_prompts, batch_size=self.batch_size)
        if not self.baselines and self.untrained_prompts != EvaluateOptions.untrained_prompts:
            raise ValueError("--untrained-prompts has no effect with --no-baselines: leave out one of the two.")
