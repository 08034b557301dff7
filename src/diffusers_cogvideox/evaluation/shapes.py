"""Does a model show what a prompt about moving shapes says? Measured on prompts that were held out from training."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.captions import canonical, caption, parse
from ..data.moving_shapes import Scene, all_scenes, render, split
from ..files import check_writable
from ..generation.job import library_versions
from ..generation.settings import Settings, choose_settings, load_pipeline, make_videos, with_sampler
from ..options import EvaluateOptions
from ..pipelines.pipeline import CogVideoXPipeline
from ..video_io import to_uint8
from .detectors import detect, score
from .metrics import psnr
from .report import Row, Sample, ShapesReport, tally

__all__ = ["ShapesPrompt", "evaluate", "evaluate_shapes", "held_out_prompts"]

_SHOWN = 24  # videos on the contact sheet
Videos = Iterator[np.ndarray]  # uint8 (F, H, W, 3) each


@dataclass(frozen=True)
class ShapesPrompt:
    """A prompt, what it says (None where it is silent), and a complete scene that it describes."""

    text: str
    wanted: Scene
    scene: Scene


def held_out_prompts(count: int, seed: int = 0) -> list[ShapesPrompt]:
    """The first `count` of a fixed sequence of prompts about one shape, all of scenes that training never shows.

    The sequence visits all held-out scenes in a random order, again and again; every other prompt is the canonical sentence, the
    rest are paraphrases, some of which leave the background out. In each visit of a scene the kind of wording changes.
    """
    scenes = split(all_scenes(1))[1]
    order = np.random.default_rng(seed).permutation(len(scenes))
    prompts = []
    for index in range(count):
        visit, place = divmod(index, len(scenes))
        scene = scenes[order[place]]
        paraphrase = (visit + place) % 2
        text = caption(scene, np.random.default_rng((seed, index))) if paraphrase else canonical(scene)
        prompts.append(ShapesPrompt(text, parse(text), scene))
    return prompts


def evaluate(options: EvaluateOptions) -> str:
    """The verb: load the model, evaluate it, write the report. Returns the table and where the files are.

    Raises:
        ValueError, OSError: for a model or settings that are not possible, and for a report that exists already.
    """
    folder = Path(options.output)
    files = folder / "shapes.json", folder / "shapes.png"
    existing = [path for path in files if path.exists()]
    if existing and not options.overwrite:
        raise FileExistsError(f"{existing[0]} exists already: choose another --output, or replace it with --overwrite.")
    settings = choose_settings(options, options.model)
    check_writable(files[0])
    report = evaluate_shapes(load_pipeline(settings), options)
    return "\n".join([report.table(), *map(str, report.save(folder))])


def evaluate_shapes(pipeline: CogVideoXPipeline, options: EvaluateOptions) -> ShapesReport:
    """Generate a video for every prompt and read back what it shows.

    Args:
        pipeline: the model; it is left as it is.
        options: number of prompts, sampler settings, baselines. `options.model` names the folder that says what the checkpoint
            recommends; `dtype` and `device` are the pipeline's own.

    Raises:
        ValueError: for sampler settings that are not possible.
    """
    dtype: Any = str(pipeline.transformer.dtype).removeprefix("torch.")
    settings = choose_settings(replace(options, dtype=dtype, device=str(pipeline.device)), options.model)
    prompts = held_out_prompts(options.prompts, options.seed)
    pipe = with_sampler(pipeline, settings.sampler)
    pipe.set_progress_bar_config(disable=True)

    started = time.perf_counter()
    samples = _samples(generated_videos(pipe, settings, prompts, options), prompts, options.seed)
    seconds = (time.perf_counter() - started) / len(prompts)
    rows = {"generated": Row(rates=tally(sample.score for sample in samples))}
    if options.baselines:
        rows |= _baselines(pipe, settings, prompts, options)
        rows["other prompts"] = _mismatched(samples, prompts)
    return ShapesReport(
        settings=asdict(settings),
        options=asdict(options),
        versions=library_versions(),
        seconds_per_video=round(seconds, 3),
        rows=rows,
        samples=samples,
    )


# --- videos -------------------------------------------------------------------------------------------------------------


def generated_videos(
    pipe: CogVideoXPipeline, settings: Settings, prompts: Sequence[ShapesPrompt], options: EvaluateOptions, title: str = "generated"
) -> Videos:
    """A video for every prompt, in batches; number i is made from seed `options.seed + i`."""
    for start in tqdm(range(0, len(prompts), options.batch_size), desc=title, unit="batch"):
        texts = [prompt.text for prompt in prompts[start : start + options.batch_size]]
        yield from make_videos(pipe, texts, range(options.seed + start, options.seed + start + len(texts)), settings)


def rendered_videos(settings: Settings, prompts: Sequence[ShapesPrompt], seed: int) -> Videos:
    """The ground truth: each prompt's scene, drawn."""
    for index, prompt in enumerate(prompts):
        rng = np.random.default_rng((seed, index))
        video = render(prompt.scene, rng, frames=settings.num_frames, height=settings.height, width=settings.width)
        yield to_uint8(video / 2 + 0.5)


@torch.no_grad()
def reconstructed_videos(pipe: CogVideoXPipeline, videos: Videos) -> Videos:
    """What is left of videos after the VAE has encoded and decoded them: the most that generation can reach."""
    vae = pipe.vae
    for video in videos:
        clip = torch.from_numpy(video).to(vae.device, vae.dtype).movedim(-1, 0)[None] / 127.5 - 1  # (1, 3, F, H, W)
        decoded = vae.decode(vae.encode(clip).latent_dist.mode()).sample[0].movedim(0, -1)
        yield to_uint8((decoded.float().cpu().clamp(-1, 1) / 2 + 0.5).numpy())


def untrained(pipe: CogVideoXPipeline, settings: Settings, seed: int) -> CogVideoXPipeline:
    """The same pipeline with a transformer of the same config and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = type(pipe.transformer).from_config(pipe.transformer.config)
    transformer = transformer.to(pipe.transformer.device, pipe.transformer.dtype).eval()
    bare = with_sampler(pipe, settings.sampler, transformer=transformer)
    bare.set_progress_bar_config(disable=True)
    return bare


# --- scores -------------------------------------------------------------------------------------------------------------


def _samples(videos: Videos, prompts: Sequence[ShapesPrompt], seed: int) -> list[Sample]:
    """What each video shows, beside what its prompt says."""
    samples = []
    for index, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        found = detect(video)
        kept = video if index < _SHOWN else None
        verdict = score(found, prompt.wanted)
        samples.append(Sample(prompt=prompt.text, seed=seed + index, wanted=prompt.wanted, found=found, score=verdict, video=kept))
    return samples


def _scored(videos: Videos, prompts: Sequence[ShapesPrompt]) -> Row:
    return Row(rates=tally(score(detect(video), prompt.wanted) for video, prompt in zip(videos, prompts, strict=True)))


def _baselines(pipe: CogVideoXPipeline, settings: Settings, prompts: Sequence[ShapesPrompt], options: EvaluateOptions) -> dict[str, Row]:
    """What the detectors say about perfect videos, about the VAE's best, and about an untrained model's."""
    truth = list(rendered_videos(settings, prompts, options.seed))
    rebuilt = list(tqdm(reconstructed_videos(pipe, iter(truth)), desc="reconstruction", total=len(truth), unit="video"))
    quality = float(np.mean([psnr(video, original, 255) for video, original in zip(rebuilt, truth, strict=True)]))
    few = prompts[: options.untrained_prompts]
    noise = generated_videos(untrained(pipe, settings, options.seed), settings, few, options, "untrained")
    return {
        "ground truth": _scored(iter(truth), prompts),
        "reconstruction": Row(rates=_scored(iter(rebuilt), prompts).rates, psnr=quality),
        "untrained": _scored(noise, few),
    }


def _mismatched(samples: Sequence[Sample], prompts: Sequence[ShapesPrompt]) -> Row:
    """The videos compared with the next prompt instead of their own: what a model that ignores its prompt would reach."""
    others = [*prompts[1:], *prompts[:1]]
    return Row(rates=tally(score(sample.found, other.wanted) for sample, other in zip(samples, others, strict=True)))
