"""The files of a video, written while it is decoded; and what is said when that fails."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..files import atomic_path
from ..pipelines.decoding import FrameStream
from ..runtime.memory.report import Report
from ..runtime.out_of_memory import is_out_of_memory
from ..video_io import contact_sheet, sheet_frames, write_image, write_video
from .job import companions, library_versions

__all__ = ["Clock", "UnfinishedVideoError", "in_words", "write_files"]


class UnfinishedVideoError(OSError):
    """A video that could not be decoded or written, and where its latents are."""


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


def write_files(
    output: Path,
    frames: FrameStream,
    *,
    fps: float,
    label: str,
    content: Mapping[str, Any],
    clock: Clock,
    report: Callable[[], Report] | None = None,
) -> None:
    """Write the video chunk by chunk, its contact sheet, and its JSON file: `content` with versions and seconds. All appear, or none.

    What `report` says in the end, about memory, goes into the JSON file, too.

    Raises OSError for what cannot be written, and what decoding raises.
    """
    shown: list[np.ndarray] = []
    with ExitStack() as files:
        video, sheet, facts = (files.enter_context(atomic_path(path)) for path in companions(output))
        write_video(video, _watched(frames, shown, clock), fps)
        write_image(sheet, contact_sheet(np.stack(shown), labels=[label]))
        clock.lap("write")
        told = {**content, "versions": library_versions(), "seconds": clock.seconds}
        told |= {"memory": report().to_json()} if report else {}
        facts.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _watched(frames: FrameStream, shown: list[np.ndarray], clock: Clock) -> Iterator[np.ndarray]:
    """The chunks (F', H, W, 3) of a video; those frames that its contact sheet shows are put into `shown` on the way."""
    wanted, start = sheet_frames(frames.extent.num_frames), 0
    for chunk in frames:
        clock.lap("decode")
        stop = start + len(chunk)
        shown += [chunk[number - start].copy() for number in wanted if start <= number < stop]
        start = stop
        yield chunk
        clock.lap("write")


def in_words(error: BaseException) -> str:
    """What went wrong, in one line, and what helps against it."""
    reason = str(error).partition("\n")[0].rstrip(".")
    if is_out_of_memory(error):
        return f"there is too little memory ({reason}); --device cpu uses the processor's, and other programs may be closed"
    return f"{type(error).__name__}: {reason}"
