"""From the options of `generate` to the videos to make, everything checked that can be checked without loading weights."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from diffusers.utils import is_peft_available

from ..checkpoints.lora import check_fits, with_alpha
from ..files import check_writable
from ..options import GenerateOptions, parse_size
from ..pipelines.folder import read_json
from ..pipelines.lora_files import open_lora
from ..pipelines.story import check_starts, starts_of
from ..pipelines.video_to_video import skipped_steps
from ..video_io import CONTAINERS
from .batch import Item, each, read_items
from .job import Job, companions
from .latents import identity_of
from .model_folder import ModelFolder
from .routes import choose_pipeline
from .settings import Settings, check_device, check_settings, choose_settings
from .sources import LoraFile, Sources, read_loras
from .story import read_story

__all__ = ["check_output", "output_paths", "plan"]

_FOLDER = "outputs"
_SLUG = 60  # characters of the prompt in a file name
# A recipe fixes everything but these.
_FREE = ("prompt", "output", "device", "overwrite", "tiling", "checkpoint_every", "preview", "save_latents", "vram", "ram", "parallel")


def plan(options: GenerateOptions) -> list[Job]:
    """The videos that the options ask for.

    Raises:
        ValueError, OSError: for options that are not possible, for files that are not there, not whole or not writable, and for
            outputs that exist already and are other videos. All mistakes in a file of prompts are reported at once.
    """
    if options.prompt.endswith(".json"):
        jobs = [_repeated(options)]
    else:
        items, folder = read_items(options), ModelFolder.open(options.model)
        loras = _loras(options, folder)
        numbered = [(item.title, (number, item)) for number, item in enumerate(items, start=1)]
        found = each(options.prompt, numbered, lambda pair: _jobs(pair[0], pair[1], folder, loras))
        jobs = [job for several in found for job in several]
    each(options.prompt, [(job.title, job) for job in jobs], lambda job: _check_files(job, options.overwrite))
    _check_distinct(jobs)
    return jobs


def _jobs(number: int, item: Item, folder: ModelFolder, loras: tuple[LoraFile, ...]) -> list[Job]:
    """The videos of one item, which is the given number in its file."""
    options, sources = item.options, Sources.of(item.options)
    height, width = parse_size(options.size) if options.size else (None, None)
    source = sources.format()
    wanted: dict[str, Any] = {"height": height, "width": width, "num_frames": options.frames, "fps": options.fps}
    wanted = source | {name: value for name, value in wanted.items() if value is not None}
    cache = None if options.cache == "none" else options.cache
    wanted |= {"cache": cache, "max_error": options.max_error, "window": options.window, "quantisation": options.quantisation}
    settings = choose_settings(options, folder, sources.names, negative_prompt=options.negative_prompt, loras=loras, **wanted)
    check_starts(starts_of(read_story(options.prompt)), settings.num_frames, settings.window, folder.geometry)
    _check_sources(sources, settings, source.get("num_frames"))
    seeds = range(options.seed, options.seed + options.num_videos)
    names = [f"{f'{number:03d}-' if item.title else ''}{_slug(options.prompt)}-{seed}.mp4" for seed in seeds]
    outputs = output_paths(options.output, names)
    common: dict[str, Any] = {"prompt": options.prompt, "settings": settings, "sources": sources, "title": item.title}
    return [Job(seed=seed, output=output, **common) for seed, output in zip(seeds, outputs, strict=True)]


def _check_sources(sources: Sources, settings: Settings, available: int | None) -> None:
    """Raise ValueError for a strength that leaves no step, and for more frames than the source video has."""
    if sources.strength is not None:
        skipped_steps(sources.strength, settings.num_inference_steps)
    if available is not None and settings.num_frames > available:
        raise ValueError(f"--frames {settings.num_frames} is not possible: the video to start from has {available}.")


def _loras(options: GenerateOptions, folder: ModelFolder) -> tuple[LoraFile, ...]:
    """The LoRA files, with `lora_alpha` for those that do not name theirs.

    Raises ValueError or OSError for files that are no LoRAs of this model, and for an alpha that none of them needs.
    """
    files = read_loras(options.lora)
    if files and not is_peft_available():
        raise ValueError("--lora needs the package peft: pip install 'diffusers-cogvideox[train]', or pip install peft.")
    opened = [open_lora(file.file.path) for file in files]
    for lora in opened:
        check_fits(lora, folder.configs.get("transformer", {}))
    alpha = options.lora_alpha
    if alpha is None:
        return files
    if all(lora.says_alpha for lora in opened):
        raise ValueError(
            f"--lora-alpha {alpha:g} has no effect: {' and '.join(options.lora)} {'say' if files[1:] else 'says'} it already. For another "
            "strength, write --lora FILE:STRENGTH."
        )
    for lora in opened:
        if not lora.says_alpha:
            with_alpha(lora, alpha)  # must not contradict the layers that do say it
    return tuple(file if lora.says_alpha else replace(file, alpha=alpha) for file, lora in zip(files, opened, strict=True))


# --- a recipe -------------------------------------------------------------------------------------------------------------


def _repeated(options: GenerateOptions) -> Job:
    """The video of the JSON file beside an earlier one."""
    recipe = read_json(Path(options.prompt))
    changed = [field.name for field in fields(options) if field.name not in _FREE and getattr(options, field.name) != field.default]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(f"{flags} cannot be combined with {options.prompt}, which fixes all settings: leave out one of the two.")
    try:
        job = Job.from_recipe(recipe, Path())
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{options.prompt} is not a file that `generate` wrote beside a video: {str(error).rstrip('.')}.") from error
    job = replace(job, settings=replace(job.settings, device=check_device(options.device or job.settings.device)))
    _check_unchanged(job, options.prompt)
    (output,) = output_paths(options.output, [f"{_slug(job.prompt)}-{job.seed}.mp4"])
    return replace(job, output=output)


def _check_unchanged(job: Job, name: str) -> None:
    """Raise when model, LoRAs or source files are not what they were, or the settings are no longer possible."""
    settings, folder = job.settings, ModelFolder.open(job.settings.model)
    if folder.fingerprint() != settings.fingerprint:
        raise ValueError(
            f"{name} was made with other weights or configs than {settings.model} has now (fingerprint {settings.fingerprint}, "
            f"now {folder.fingerprint()}): the video would differ."
        )
    for lora in settings.loras:
        lora.file.check()
    job.sources.check()
    check_settings(settings, folder)
    pipeline = choose_pipeline(folder.configs["transformer"], folder.name, job.sources.names, folder.pipeline).__name__
    if settings.pipeline != pipeline:
        raise ValueError(f"{name} names the pipeline {settings.pipeline}, but its model and sources are for {pipeline}.")


# --- where to put it ----------------------------------------------------------------------------------------------------


def _slug(prompt: str) -> str:
    """The prompt as part of a file name: "a red circle" -> "a-red-circle"."""
    return "-".join(re.findall(r"\w+", prompt.lower()))[:_SLUG].strip("-") or "video"


def output_paths(output: str | None, names: Sequence[str]) -> list[Path]:
    """Where each video goes: to the file `output`, or into that folder.

    Raises ValueError for one file and several videos, and for another kind of file.
    """
    target = Path(_FOLDER if output is None else output)
    if target.suffix.lower() not in CONTAINERS:
        if (mimetypes.guess_type(target.name)[0] or "").startswith(("video/", "image/")):
            raise ValueError(f"--output {target} is not possible: name a folder, or a file that ends in {', '.join(CONTAINERS)}.")
        return [target / name for name in names]
    if len(names) > 1:
        raise ValueError(f"--output {target} names one file for {len(names)} videos: name a folder.")
    return [target]


def _check_files(job: Job, overwrite: bool) -> None:
    """Raise OSError when a file of the video cannot be written, or exists already and is not this video's."""
    check_output(job.output, overwrite or job.is_finished())
    if job.latents.exists() and not overwrite and identity_of(job.latents) != job.identity:
        raise FileExistsError(f"{job.latents} exists already, of another video: choose another --output, or replace it with --overwrite.")


def check_output(video: Path, overwrite: bool) -> None:
    """Raise OSError when a video file or what stands beside it cannot be written, or exists already and is not to be replaced."""
    existing = [path for path in companions(video) if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]} exists already: choose another --output, or replace it with --overwrite.")
    check_writable(video)


def _check_distinct(jobs: Sequence[Job]) -> None:
    """Raise ValueError when two videos would be written to one file."""
    first: dict[Path, Job] = {}
    for job in jobs:
        other = first.setdefault(job.output.resolve(), job)
        if other is not job:
            raise ValueError(f"{other.title} and {job.title} both write {job.output}: give each an output of its own.")
