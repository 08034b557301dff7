"""The verb `generate`: from prompts and options to video files, each with what is needed to make it again beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from diffusers.utils import logging

from ..files import atomic_path
from ..options import GenerateOptions, MistakesError
from ..pipelines.base import CogVideoXPipelineBase
from ..pipelines.journal import Journal
from ..video_io import contact_sheet, write_image, write_video
from .job import Job, library_versions
from .model_folder import ModelFolder
from .plan import plan
from .preview import Preview, PreviewMap, fit_to_vae
from .settings import load_pipeline, make_videos, prepared

__all__ = ["generate"]

logger = logging.get_logger(__name__)


def generate(options: GenerateOptions) -> list[Path]:
    """Make the videos that the options ask for; returns their paths. All checks come before the weights are loaded.

    Videos that are there already, made by the same recipe, are left alone unless `options.overwrite`. When one of several fails, the
    others are made all the same. What happens is logged.

    Raises:
        ValueError, OSError: for options that are not possible, files that are not there or not whole, outputs that exist already.
        MistakesError: for videos that failed, after all others are made.
    """
    jobs = plan(options)
    waiting = [job for job in jobs if options.overwrite or not job.is_finished()]
    for job in jobs:
        if job not in waiting:
            logger.info(f"{job.output} is there already.")
    if waiting:
        _make_all(waiting, options)
    return [job.output for job in jobs]


def _make_all(jobs: Sequence[Job], options: GenerateOptions) -> None:
    """Make videos with one model. Raises as `generate`; the error of a single video is raised as it is."""
    clock = Clock()
    pipe = load_pipeline(jobs[0].settings)
    clock.lap("load")
    workshop = Workshop(pipe, options, clock.seconds["load"])
    failures: list[str] = []
    for number, job in enumerate(jobs, start=1):
        try:
            workshop.make(job, f"video {number} of {len(jobs)}")
        except KeyboardInterrupt:
            if len(jobs) > 1:
                logger.info(f"{number - 1 - len(failures)} of {len(jobs)} videos are made; the same command makes the rest.")
            raise
        except Exception as error:
            if len(jobs) == 1:
                raise
            where = f"{job.title}, {job.output}" if job.title else job.output
            failures.append(f"{where}: {type(error).__name__}: {error}")
            logger.warning(f"failed: {failures[-1]}")
    if failures:
        raise MistakesError(f"{len(failures)} of {len(jobs)} videos failed, the others are made:", failures)


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


class Workshop:
    """A loaded model, and how its videos are made: with a journal, with a preview."""

    def __init__(self, pipe: CogVideoXPipelineBase, options: GenerateOptions, load_seconds: float) -> None:
        self._pipe, self._options, self._load_seconds = pipe, options, load_seconds
        self._colours: PreviewMap | None = None  # fitted or read when the first video needs it

    def make(self, job: Job, title: str) -> None:
        """Make one video and its companions. All of the files appear, or none; an interrupted run with a journal leaves that."""
        pipe = prepared(self._pipe, job.settings)
        pipe.set_progress_bar_config(desc=title)
        clock, journal, preview = Clock(load=self._load_seconds), self._journal(job), self._preview(pipe, job)

        def after_step(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            clock.lap("denoise")
            if preview:
                preview.after_step(pipe, index, tensors["latents"])
            return {}

        extra = {"callback_on_step_end": after_step, "journal": journal, **job.sources.call_arguments()}
        try:
            frames = make_videos(pipe, [job.prompt], [job.seed], job.settings, **extra)[0]
            clock.lap("decode")
            _write(pipe, job, frames, clock)
        except BaseException:
            if journal:
                journal.save()
                logger.info(f"{job.output}: stopped after {journal.progress}; the same command goes on from there.")
            raise
        for leftover in (job.journal, job.preview):
            leftover.unlink(missing_ok=True)
        logger.info(f"{job.output} is finished.")

    def _journal(self, job: Job) -> Journal | None:
        """The journal of a video, when one is wanted or there from an earlier run."""
        if not self._options.checkpoint_every and not job.journal.exists():
            return None
        if self._options.overwrite:
            with suppress(ValueError, OSError):
                return self._opened(job)
            job.journal.unlink()
        return self._opened(job)

    def _opened(self, job: Job) -> Journal:
        journal = Journal(job.journal, self._options.checkpoint_every, job.identity)
        if job.journal.exists():
            logger.info(f"{job.output}: going on after {journal.progress}.")
        return journal

    def _preview(self, pipe: CogVideoXPipelineBase, job: Job) -> Preview | None:
        if not self._options.preview:
            return None
        if self._colours is None:
            known = ModelFolder.open(job.settings.model).preview
            self._colours = PreviewMap.from_json(known) if known else fit_to_vae(pipe.vae, pipe.geometry)
        logger.info(f"{job.preview} shows the video in the making.")
        return Preview(job.preview, self._colours, pipe.geometry, pipe.vae_scaling_factor_image)


def _write(pipe: CogVideoXPipelineBase, job: Job, frames: Any, clock: Clock) -> None:
    """Write the video, its contact sheet and its recipe."""
    with ExitStack() as files:
        video, sheet, recipe = (files.enter_context(atomic_path(path)) for path in job.companions)
        write_video(video, frames, job.settings.fps)
        write_image(sheet, contact_sheet(frames, labels=[job.prompt]))
        clock.lap("write")
        scheduler = {"class": type(pipe.scheduler).__name__} | {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}
        content = job.recipe() | {"scheduler": scheduler, "versions": library_versions(), "seconds": clock.seconds}
        recipe.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
