"""The verb `generate`: from prompts and options to video files, each with what is needed to make it again beside it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..files import atomic_path, check_writable
from ..options import GenerateOptions, parse_size
from ..video_io import CONTAINERS, contact_sheet, write_image, write_video
from .folder import read_json
from .model_folder import ModelFolder
from .pipeline import CogVideoXPipeline
from .settings import Settings, check_device, check_settings, choose_settings, load_pipeline, make_videos

__all__ = ["Job", "generate", "library_versions", "plan"]

_FOLDER = "outputs"
_SLUG = 60  # characters of the prompt in a file name
# A recipe fixes everything but these.
_FREE = ("prompt", "output", "device", "overwrite")


@dataclass(frozen=True)
class Job:
    """One video to make."""

    prompt: str
    seed: int
    output: Path


def generate(options: GenerateOptions) -> list[Path]:
    """Make the videos that the options ask for; returns their paths. All checks come before the weights are loaded.

    Raises:
        ValueError, OSError: for options that are not possible, files that are not there or not whole, outputs that exist already.
    """
    settings, jobs = plan(options)
    clock = Clock()
    pipe = load_pipeline(settings)
    clock.lap("load")
    for number, job in enumerate(jobs, start=1):
        pipe.set_progress_bar_config(desc=f"video {number} of {len(jobs)}")
        _make(pipe, job, settings, Clock(load=clock.seconds["load"]))
    return [job.output for job in jobs]


def plan(options: GenerateOptions) -> tuple[Settings, list[Job]]:
    """The settings and the videos to make, everything checked that can be checked without loading weights. Raises as `generate` does."""
    if options.prompt.endswith(".json"):
        settings, prompts, seeds = _read_recipe(options)
    else:
        prompts, seeds = _read_prompts(options.prompt), [options.seed + number for number in range(options.num_videos)]
        height, width = parse_size(options.size) if options.size else (None, None)
        wanted = {"height": height, "width": width, "num_frames": options.frames, "fps": options.fps}
        settings = choose_settings(options, options.model, negative_prompt=options.negative_prompt, **wanted)
    numbered = options.prompt.endswith(".txt")
    names = [
        f"{f'{line:03d}-' if numbered else ''}{_slug(prompt)}-{seed}.mp4" for line, prompt in enumerate(prompts, start=1) for seed in seeds
    ]
    outputs = _output_paths(options, names)
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    return settings, [Job(prompt, seed, output) for (prompt, seed), output in zip(pairs, outputs, strict=True)]


# --- what to make -------------------------------------------------------------------------------------------------------


def _read_prompts(prompt: str) -> list[str]:
    """The prompt itself, or the lines of a .txt file that are not empty."""
    if not prompt.endswith(".txt"):
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to show.")
        return [prompt]
    if not Path(prompt).is_file():
        raise FileNotFoundError(f"there is no prompt file {prompt}. (A prompt that ends in .txt names a file with one prompt per line.)")
    try:
        lines = Path(prompt).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{prompt} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"the prompt file {prompt} is empty: write one prompt per line.")
    return prompts


def _read_recipe(options: GenerateOptions) -> tuple[Settings, list[str], list[int]]:
    """Settings, prompt and seed of the JSON file beside an earlier video."""
    recipe = read_json(Path(options.prompt))
    changed = [field.name for field in fields(options) if field.name not in _FREE and getattr(options, field.name) != field.default]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(f"{flags} cannot be combined with {options.prompt}, which fixes all settings: leave out one of the two.")
    try:
        settings, prompt, seed = Settings(**recipe["settings"]), str(recipe["prompt"]), int(recipe["seed"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{options.prompt} is not a file that `generate` wrote beside a video: {error}.") from error
    settings = replace(settings, device=check_device(options.device or settings.device))
    folder = ModelFolder.open(settings.model)
    if folder.fingerprint() != settings.fingerprint:
        raise ValueError(
            f"{options.prompt} was made with other weights or configs than {settings.model} has now (fingerprint {settings.fingerprint}, "
            f"now {folder.fingerprint()}): the video would differ."
        )
    try:
        check_settings(settings, folder)
    except TypeError as error:
        raise ValueError(f"{options.prompt} holds a setting of the wrong type: {error}.") from error
    return settings, [prompt], [seed]


# --- where to put it ----------------------------------------------------------------------------------------------------


def _slug(prompt: str) -> str:
    """The prompt as part of a file name: "a red circle" -> "a-red-circle"."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:_SLUG].strip("-") or "video"


def _companions(video: Path) -> list[Path]:
    """All files of one video: itself, the contact sheet, the recipe."""
    return [video, video.with_suffix(".png"), video.with_suffix(".json")]


def _output_paths(options: GenerateOptions, names: list[str]) -> list[Path]:
    """Where each video goes. Raises when a file exists already or the folder cannot be written."""
    target = Path(options.output or _FOLDER)
    if target.suffix.lower() not in CONTAINERS:
        outputs = [target / name for name in names]
    elif len(names) == 1:
        outputs = [target]
    else:
        raise ValueError(f"--output {target} names one file for {len(names)} videos: name a folder.")
    existing = [path for output in outputs for path in _companions(output) if path.exists()]
    if existing and not options.overwrite:
        raise FileExistsError(f"{existing[0]} exists already: choose another --output, or replace it with --overwrite.")
    check_writable(outputs[0])
    return outputs


# --- making it ----------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds spent in each stage, rounded to milliseconds."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last lap to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self._last, 3)
        self._last = now


def _make(pipe: CogVideoXPipeline, job: Job, settings: Settings, clock: Clock) -> None:
    """Make one video and its companions. All of the files appear, or none."""

    def after_step(*_: Any) -> dict[str, Any]:
        clock.lap("denoise")
        return {}

    frames = make_videos(pipe, [job.prompt], [job.seed], settings, callback_on_step_end=after_step)[0]
    clock.lap("decode")
    with ExitStack() as files:
        video, sheet, recipe = (files.enter_context(atomic_path(path)) for path in _companions(job.output))
        write_video(video, frames, settings.fps)
        write_image(sheet, contact_sheet(frames, labels=[job.prompt]))
        clock.lap("write")
        recipe.write_text(json.dumps(_recipe(pipe, job, settings, clock), indent=2) + "\n", encoding="utf-8")


def _recipe(pipe: CogVideoXPipeline, job: Job, settings: Settings, clock: Clock) -> dict[str, Any]:
    """What the JSON file beside a video says."""
    return {
        "prompt": job.prompt,
        "seed": job.seed,
        "settings": asdict(settings),
        "scheduler": {"class": type(pipe.scheduler).__name__} | {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"},
        "versions": library_versions(),
        "seconds": clock.seconds,
    }


def library_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that its results depend on."""
    names = ("diffusers-cogvideox", "torch", "diffusers", "transformers")
    return {name: importlib.metadata.version(name) for name in names}
