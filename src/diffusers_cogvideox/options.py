"""What each verb of the command line can be told: one field gives the flag, the default, the help and the Python argument.

The text under a field is its help. Rules that need no model are checked here; those that do, where the model is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from .units import parse_memory

__all__ = [
    "COMBINATIONS",
    "DEMO",
    "DEMO_IMAGE",
    "FILES",
    "CacheChoice",
    "CacheName",
    "DecodeOptions",
    "DecodingOptions",
    "EvaluateOptions",
    "Fit",
    "GenerateOptions",
    "InfoOptions",
    "InputOptions",
    "Layout",
    "MemoryOptions",
    "MistakesError",
    "Parallel",
    "Precision",
    "Sampler",
    "SamplingOptions",
    "at_least",
    "parse_size",
]

DEMO = "demo"
"""The name under which every verb knows the shipped text-to-video model."""

DEMO_IMAGE = "demo-i2v"
"""The name of its image-to-video sibling."""

Sampler = Literal["ddim", "dpm"]
Precision = Literal["float32", "bfloat16", "float16"]
Parallel = Literal["auto", "cfg", "ulysses", "ring", "tensor"]
Fit = Literal["cover", "contain", "stretch"]
Layout = Literal["pipeline", "vae"]
CacheName = Literal["first_block", "mag", "tea", "sea", "taylor", "broadcast", "faster"]
CacheChoice = Literal["none", "auto", "first_block", "mag", "tea", "sea", "taylor", "broadcast", "faster"]

FILES = ("image", "last_image", "video", "mask", "control", "extend")
"""Options that name a picture or a video to start from."""

COMBINATIONS = (
    (),
    ("image",),
    ("last_image",),
    ("image", "last_image"),
    ("video",),
    ("video", "mask"),
    ("control",),
    ("extend",),
)
"""The sets of FILES that mean something together."""


_SEEDS = 2**63  # PyTorch's random generators take twice as many


class MistakesError(ValueError):
    """Several mistakes that are reported at once: what they are in, and one line for each."""

    def __init__(self, title: str, lines: Iterable[str]) -> None:
        self.lines = [title, *lines]
        super().__init__("\n  ".join(self.lines))


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels from "HxW".

    >>> parse_size("480x720")
    (480, 720)
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    if match is None:
        raise ValueError(f"--size {text!r} is not a size: write height x width in pixels, such as 480x720.")
    return int(match[1]), int(match[2])


def _flags(names: Iterable[str]) -> str:
    """Options as they are written: "--image and --last-image"."""
    return " and ".join(f"--{name.replace('_', '-')}" for name in names)


def at_least(minimum: int, **values: float | None) -> None:
    """Raise ValueError for a value below `minimum`, infinity and NaN; None means "not given"."""
    for name, value in values.items():
        if value is not None and not minimum <= value < math.inf:
            raise ValueError(f"{_flags([name])} {value} is not possible: it must be at least {minimum}, and finite.")


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
        at_least(0, seed=self.seed, guidance_scale=self.guidance_scale)
        at_least(1, steps=self.steps)
        if self.seed >= _SEEDS:
            raise ValueError(f"--seed {self.seed} is not possible: it must be below 2**63, which is {_SEEDS}.")


@dataclass(frozen=True)
class InputOptions:
    """What to start from. Each model takes what it was trained for."""

    _: KW_ONLY
    image: str | None = None
    """Picture to begin with (image-to-video and Fun InP models)."""
    last_image: str | None = None
    """Picture to end with (Fun InP models); with --image, what lies between is made."""
    video: str | None = None
    """Video to remake as the prompt says (text-to-video models), or to fill in where --mask is white (Fun InP models)."""
    strength: float | None = None
    """How far to move away from --video, 0 to 1 (default: 0.8)."""
    mask: str | None = None
    """Video or picture, white where --video is to be made anew."""
    control: str | None = None
    """Video of edges, depth or poses to follow (Fun Control models)."""
    extend: str | None = None
    """Video to go on with, by --frames new frames (text-to-video and image-to-video models)."""
    fit: Fit | None = None
    """How pictures of another shape are made to fit: cover crops them, contain adds black bars, stretch distorts them (default: cover)."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the FILES that are given."""
        return tuple(name for name in FILES if getattr(self, name) is not None)

    def __post_init__(self) -> None:
        """Raise ValueError for files that exclude each other, and for settings that have nothing to act on."""
        if self.files == ("mask",):
            raise ValueError("--mask says which part of a video to make anew: add --video.")
        if self.files not in COMBINATIONS:
            raise ValueError(
                f"{_flags(self.files)} cannot be combined: start from --image, --last-image or both, from --video with or without --mask, "
                "from --control, or from --extend."
            )
        if self.strength is not None and self.files != ("video",):
            raise ValueError(f"--strength {self.strength} has an effect only with --video, and without --mask.")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(
                f"--strength {self.strength} is not possible: it must be above 0 (nothing changes) and at most 1 (all is new)."
            )
        if self.fit is not None and not self.files:
            raise ValueError(f"--fit {self.fit} has no effect without a picture or a video to start from.")


@dataclass(frozen=True)
class DecodingOptions:
    """How to decode. The video stays the same."""

    _: KW_ONLY
    tiling: bool = False
    """Decode with less memory, and longer, from the start; when memory runs out, that is tried anyway."""


@dataclass(frozen=True)
class MemoryOptions:
    """How much memory to take. GB are 10**9 bytes, GiB 2**30: a card that is sold as 8 GB has 8 GiB, a part of which its driver takes."""

    _: KW_ONLY
    vram: str | None = None
    """Most that PyTorch may allocate on the GPU, such as 8GB (default: what is free there). Of several processes, each."""
    ram: str | None = None
    """Most that the process may take in the memory of the host, such as 32GB (default: what is free there). Of several processes, each."""
    quantisation: str | None = None
    """Quantisation (lossy), such as int8, that a plan may use where none that keeps the result fits or is as fast (default: none)."""

    def __post_init__(self) -> None:
        """Raise ValueError for what is no amount of memory."""
        for name in ("vram", "ram"):
            if getattr(self, name) is not None:
                parse_memory(getattr(self, name), f"--{name}")


@dataclass(frozen=True)
class GenerateOptions(DecodingOptions, MemoryOptions, InputOptions, SamplingOptions):
    """Make videos of what a prompt says, from words alone or from a picture or a video.

    Beside each video stand a PNG with frames of it, and a JSON file with everything that is needed to make it again:
    `cogvideox generate VIDEO.json`. Videos that the same command made before are not made again.
    """

    prompt: str
    """What to show; with --window, one text after another: "a dog sits [80:] the dog gets up". Or a file: PROMPTS.txt with one prompt per
    line; BATCH.jsonl with one JSON object per line, whose keys are prompt and the names of options (num_videos, size, ...); or the
    VIDEO.json of an earlier run, to make that video again."""
    _: KW_ONLY
    model: str = DEMO
    """Pipeline folder, repository on the Hugging Face hub (such as zai-org/CogVideoX-2b), or one of the small models that come with
    the package: "demo" (text to video), "demo-i2v" (image to video)."""
    lora: tuple[str, ...] = ()
    """LoRA file, folder of one, or repository on the hub (owner/name, or owner/name/FILE), with its strength behind a colon where
    that is not 1: style.safetensors:0.7. Can be given several times."""
    lora_alpha: float | None = None
    """Alpha of the LoRA files that do not name theirs (default: what their trainer uses, or their rank, with a warning)."""
    output: str | None = None
    """File (.mp4), or folder for files named after prompt and seed (default: the folder outputs)."""
    negative_prompt: str | None = None
    """What to steer away from."""
    num_videos: int = 1
    """Videos per prompt, with the seeds SEED, SEED + 1, ..."""
    size: str | None = None
    """Height x width in pixels, such as 480x720 (default: what the checkpoint was trained for)."""
    frames: int | None = None
    """Number of frames (default: what the checkpoint was trained for, or as many as --video or --control has)."""
    window: int | None = None
    """Frames of the windows in which a long video is made; they fade into each other."""
    fps: int | None = None
    """Frames per second of the file (default: what the checkpoint was trained for, or that of the video to start from)."""
    checkpoint_every: int | None = None
    """Save the state of the video every so many steps: after an interruption, the same command goes on from there, to the same video."""
    cache: CacheChoice = "none"
    """Spare work: the feature cache (auto: any) with the fewest passes that keeps --max-error, as `cogvideox calibrate` measured."""
    max_error: float | None = None
    """How far a cache may move the final latents, relative to them (default: 0.05)."""
    preview: bool = False
    """Show the video in the making in VIDEO.preview.png, ten times on the way: its latents, mapped linearly to colours."""
    parallel: Parallel | None = None
    """How processes that `torchrun --nproc_per_node N -m diffusers_cogvideox generate ...` starts share each video: cfg (one half of
    guidance each, and tokens), ulysses or ring (tokens), tensor (weights), or auto: what fits (default: auto)."""
    save_latents: bool = False
    """Keep what the video is decoded from in VIDEO.latents.safetensors, for `cogvideox decode`; when decoding fails, that is done
    anyway."""

    def __post_init__(self) -> None:
        SamplingOptions.__post_init__(self)
        InputOptions.__post_init__(self)
        MemoryOptions.__post_init__(self)
        at_least(1, num_videos=self.num_videos, fps=self.fps, frames=self.frames, checkpoint_every=self.checkpoint_every)
        if self.max_error is not None and self.cache == "none":
            raise ValueError(f"--max-error {self.max_error} has no effect without --cache.")
        if self.max_error is not None and not 0 < self.max_error < math.inf:
            raise ValueError(f"--max-error {self.max_error} is not possible: it must be above 0, and finite.")
        if self.cache != "none" and self.checkpoint_every is not None:
            raise ValueError("--checkpoint-every is not possible with --cache, which has a state of its own: leave out one of the two.")
        if self.window is not None and self.extend is not None:
            raise ValueError("--window is not possible with --extend, which goes on in windows of its own: leave out one of the two.")
        if self.window is not None and self.cache != "none":
            raise ValueError("--window is not possible with --cache, which would mix up the windows: leave out one of the two.")
        if self.size is not None:
            parse_size(self.size)
        if self.frames is not None and self.files == ("video",):
            raise ValueError(f"--frames {self.frames} has no effect with --video: the result has as many frames as the video.")
        if self.save_latents and self.extend is not None:
            raise ValueError("--save-latents is not possible with --extend: a continued video is put together from frames.")
        if self.lora_alpha is not None and not self.lora:
            raise ValueError(f"--lora-alpha {self.lora_alpha} has no effect without --lora.")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"--lora-alpha {self.lora_alpha} is not possible: it must be positive and finite.")


@dataclass(frozen=True)
class DecodeOptions(DecodingOptions):
    """Make the video of saved latents: what `generate` keeps when decoding fails or with --save-latents, or latents from elsewhere.

    Latents of `generate` give the files that `generate` would have written. Of another file, --model must be named.
    """

    latents: str
    """File of latents (.safetensors)."""
    _: KW_ONLY
    model: str | None = None
    """Pipeline or VAE folder, repository on the Hugging Face hub, or "demo" (default: the model that made the latents)."""
    output: str | None = None
    """File (.mp4), or folder (default: beside the latents, under the name that the video would have had, or theirs)."""
    layout: Layout | None = None
    """What a file from elsewhere, with one tensor of five axes, holds. pipeline: (videos, frames, channels, height, width), as pipelines
    give for output_type="latent". vae: (videos, channels, frames, height, width), as the VAE encodes, not multiplied by its scaling
    factor (default: told from the number of channels, where that fits only one)."""
    fps: int | None = None
    """Frames per second of the file, for latents from elsewhere (default: what the model was trained for)."""
    dtype: Precision | None = None
    """Precision of the VAE (default: that of the run that made the latents, or what the model was trained in)."""
    device: str | None = None
    """Where to decode, such as cpu or cuda:1 (default: where the latents were made, or the GPU if there is one)."""
    overwrite: bool = False
    """Replace files that exist already."""

    def __post_init__(self) -> None:
        at_least(1, fps=self.fps)


@dataclass(frozen=True)
class InfoOptions:
    """Tell what a checkpoint is: variant, sizes, parameters, precision, sampler. Weights are not loaded.

    Of a LoRA file: layout, rank, alpha, layers that it adapts, precision, and the models that it fits.
    """

    model: str = DEMO
    """Pipeline folder, folder of a single transformer or vae, repository on the Hugging Face hub, LoRA file (on the hub: owner/name/FILE)
    or folder, or "demo" or "demo-i2v" for the small models that come with the package."""
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
        at_least(1, prompts=self.prompts, untrained_prompts=self.untrained_prompts, batch_size=self.batch_size)
        if not self.baselines and self.untrained_prompts != EvaluateOptions.untrained_prompts:
            raise ValueError("--untrained-prompts has no effect with --no-baselines: leave out one of the two.")
