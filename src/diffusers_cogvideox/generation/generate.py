"""The verb `generate`: from prompts and options to video files, each with what is needed to make it again beside it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from safetensors import SafetensorError

from ..options import GenerateOptions, MistakesError
from ..pipelines.base import CogVideoXPipelineBase
from ..pipelines.decoding import FrameStream
from ..pipelines.journal import Journal
from ..runtime.launch import Launch, together
from ..runtime.memory.explain import in_short
from ..runtime.out_of_memory import is_out_of_memory
from .job import Job
from .latents import SavedLatents, identity_of
from .model_folder import ModelFolder
from .plan import plan
from .preview import Preview, PreviewMap, fit_to_vae
from .ranks import agreed_budgets, check_launch, share_launch
from .settings import load_pipeline, prepared, stream_videos
from .writing import Clock, UnfinishedVideoError, in_words, write_files

__all__ = ["generate"]

logger = logging.get_logger(__name__)


def generate(options: GenerateOptions) -> list[Path]:
    """Make the videos that the options ask for; returns their paths. All checks come before the weights are loaded.

    Videos that are there already, made by the same recipe, are left alone unless `options.overwrite`. When one of several fails, the
    others are made all the same. What happens is logged. Processes that were started together share the work on each video; the first
    one writes, and the others return no paths.

    Raises:
        ValueError, OSError: for options that are not possible, files that are not there or not whole, outputs that exist already.
        MistakesError: for videos that failed, after all others are made.
    """
    with together(options.device) as launch:
        jobs, waiting = launch.agreed(lambda: _planned(options, launch))
        for job in jobs if launch.first else ():
            if job not in waiting:
                logger.info(f"{job.output} is there already.")
        if waiting:
            _make_all(waiting, options, launch)
        return [job.output for job in jobs] if launch.first else []


def _planned(options: GenerateOptions, launch: Launch) -> tuple[list[Job], list[Job]]:
    """All videos, and those that are not there yet."""
    jobs = plan(options)
    waiting = [job for job in jobs if options.overwrite or not _is_finished(job, options)]
    check_launch(options, waiting, launch)
    return jobs, waiting


def _is_finished(job: Job, options: GenerateOptions) -> bool:
    """Whether all is there that is asked for."""
    return job.is_finished() and (not options.save_latents or identity_of(job.latents) == job.identity)


def _make_all(jobs: Sequence[Job], options: GenerateOptions, launch: Launch) -> None:
    """Make videos with one model. Raises as `generate`; the error of a single video, and of one of several processes, as it is."""
    clock = Clock()
    settings = jobs[0].settings
    budgets = agreed_budgets(options, settings.device, launch)
    shares_weights = options.parallel == "tensor"  # and the device need not hold all of them
    pipe = load_pipeline(replace(settings, device="cpu")) if shares_weights else load_pipeline(settings, budgets)
    shared = share_launch(pipe, jobs, options, launch, budgets)
    if pipe.memory_plan:
        logger.info(in_short(pipe.memory_plan))
    if options.tiling:
        pipe.vae.enable_tiling()
    clock.lap("load")
    workshop = (Workshop if launch.first else Helper)(pipe, options, launch, clock.seconds["load"], shared)
    failures: list[str] = []
    for number, job in enumerate(jobs, start=1):
        try:
            workshop.make(job, f"video {number} of {len(jobs)}")
        except KeyboardInterrupt:
            if len(jobs) > 1:
                logger.info(f"{number - 1 - len(failures)} of {len(jobs)} videos are made; the same command makes the rest.")
            raise
        except Exception as error:
            if len(jobs) == 1 or not launch.alone:
                raise
            where = f"{job.title}, {job.output}" if job.title else job.output
            failures.append(f"{where}: {type(error).__name__}: {error}")
            logger.warning(f"failed: {failures[-1]}")
    if failures:
        raise MistakesError(f"{len(failures)} of {len(jobs)} videos failed, the others are made:", failures)


class Workshop:
    """A loaded model, and how its videos are made: with a journal, with a preview."""

    def __init__(
        self, pipe: CogVideoXPipelineBase, options: GenerateOptions, launch: Launch, load_seconds: float, shared: dict[str, Any]
    ) -> None:
        self._pipe, self._options, self._launch, self._load_seconds, self._shared = pipe, options, launch, load_seconds, shared
        self._colours: PreviewMap | None = None  # fitted or read when the first video needs it

    def make(self, job: Job, title: str) -> None:
        """Make one video and its companions. All of the files appear, or none.

        An interrupted run with a journal leaves that; one that fails while it decodes leaves the latents.
        """
        pipe = prepared(self._pipe, job.settings)
        pipe.set_progress_bar_config(desc=title)
        keep = bool(self._options.checkpoint_every) or job.journal.exists()
        journal = self._launch.agreed(lambda: self._journal(job))
        clock, preview = Clock(load=self._load_seconds), self._preview(pipe, job)

        def after_step(pipe: Any, index: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            clock.lap("denoise")
            if preview:
                preview.after_step(pipe, index, tensors["latents"])
            return {}

        extra = {"callback_on_step_end": after_step, "journal": journal, **job.sources.call_arguments()}
        try:
            (frames,) = stream_videos(pipe, [job.prompt], [job.seed], job.settings, **extra)
            self._finish(pipe, job, frames, clock)
        except BaseException as error:
            undecoded = hasattr(error, "latents")
            if journal and (keep or undecoded):
                journal.save()
                logger.info(f"{job.output}: stopped after {journal.progress}; the same command goes on from there.")
            if undecoded and is_out_of_memory(error):
                raise UnfinishedVideoError(f"{job.output} is not finished: {in_words(error)}.") from error
            raise
        for leftover in (job.journal, job.preview):
            leftover.unlink(missing_ok=True)
        logger.info(f"{job.output} is finished.")

    def _finish(self, pipe: CogVideoXPipelineBase, job: Job, frames: FrameStream, clock: Clock) -> None:
        """Decode and write. Where that fails, the latents are saved.

        Raises UnfinishedVideoError, which tells how to go on, in place of errors that are nobody's mistake.
        """
        scheduler = {"class": type(pipe.scheduler).__name__} | {k: v for k, v in pipe.scheduler.config.items() if k[0] != "_"}
        content = job.recipe() | {"scheduler": scheduler} | self._shared
        saved = None
        if frames.latents is not None:
            saved = SavedLatents(
                latents=frames.latents,
                scaling_factor=pipe.vae_scaling_factor_image,
                extent=frames.extent,
                identity=job.identity,
                video=job.output.name,
                content=content | {"seconds": dict(clock.seconds)},
            )
        if saved and self._options.save_latents:
            saved.save(job.latents)
        try:
            write_files(job.output, frames, fps=job.settings.fps, label=job.prompt, content=content, clock=clock, report=pipe.report)
        except BaseException as error:
            if saved:
                _save_after(error, saved, job)
            raise
        if not self._options.save_latents and identity_of(job.latents) == job.identity:
            job.latents.unlink()  # of an earlier run that failed

    def _journal(self, job: Job) -> Journal | None:
        """The journal of a video, when one is wanted or there from an earlier run; or when its latents alone could not be finished."""
        wanted = self._options.checkpoint_every or job.journal.exists() or job.sources.extend
        if not wanted:
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


class Helper(Workshop):
    """The part in making videos of a process that is not the first: it computes, and writes nothing."""

    def make(self, job: Job, title: str) -> None:  # noqa: ARG002 - the first process shows it
        """Take part in making one video."""
        pipe = prepared(self._pipe, job.settings)
        pipe.set_progress_bar_config(disable=True)
        journal = self._launch.agreed(lambda: self._journal(job))  # that of the first process, which alone looks for it and writes it
        extra = {"journal": journal and journal.for_reading(), **job.sources.call_arguments()}
        (frames,) = stream_videos(pipe, [job.prompt], [job.seed], job.settings, **extra)
        for _ in frames:
            pass


def _save_after(error: BaseException, saved: SavedLatents, job: Job) -> None:
    """Save the latents of an unfinished video, and log where; raises UnfinishedVideoError for an error that is nobody's mistake."""
    try:
        saved.save(job.latents)
    except (OSError, SafetensorError) as second:
        reasons = f"{in_words(error)}; {in_words(second)}"
        raise UnfinishedVideoError(f"{job.output} could not be written, and its latents could not be saved either: {reasons}.") from error
    way = f"its latents are in {job.latents}: `cogvideox decode {shlex.quote(str(job.latents))}` makes the video of them"
    if isinstance(error, (OSError, FloatingPointError)) or is_out_of_memory(error):
        raise UnfinishedVideoError(f"{job.output} could not be decoded and written, but {way}. The reason: {in_words(error)}.") from error
    logger.info(f"{job.output} is not finished, but {way}.")
