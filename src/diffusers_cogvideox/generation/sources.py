"""The files that a video is made from: what they are, how they are used, and whether they are still what they were."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files import sha256
from ..options import FILES, InputOptions
from ..pipelines.lora_files import fetch_lora
from ..video_io import is_picture, probe_image, probe_video
from .routes import ARGUMENTS

__all__ = ["LoraFile", "SourceFile", "Sources", "read_loras"]

DEFAULT_FIT = "cover"
"""People's pictures seldom have a model's shape, and cropping harms them least."""


@dataclass(frozen=True)
class SourceFile:
    """A file by its absolute path, and the SHA-256 of its content."""

    path: str
    sha256: str

    @classmethod
    def of(cls, path: str | Path) -> SourceFile:
        """The file as it is now. Raises FileNotFoundError when it is not there."""
        file = Path(os.path.abspath(path))  # noqa: PTH100 - links stay: in the hub's cache they bear the name of what they point to
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {path}.")
        status = file.stat()
        return cls(str(file), _digest(str(file), status.st_mtime_ns, status.st_size))

    def check(self) -> None:
        """Raise ValueError when the content has changed, FileNotFoundError when the file is gone."""
        now = SourceFile.of(self.path)
        if now.sha256 != self.sha256:
            raise ValueError(
                f"{self.path} has changed since (SHA-256 {self.sha256[:9]}..., now {now.sha256[:9]}...): the video would differ."
            )


@lru_cache(maxsize=1024)
def _digest(path: str, _modified: int, _size: int) -> str:
    """SHA-256 of a file, read once for all lines of a batch that name it."""
    return sha256([Path(path)])


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Pictures and videos to start from, under the names of the options, and how they are used."""

    image: SourceFile | None = None
    last_image: SourceFile | None = None
    video: SourceFile | None = None
    mask: SourceFile | None = None
    control: SourceFile | None = None
    extend: SourceFile | None = None
    strength: float | None = None
    fit: str | None = None

    @classmethod
    def of(cls, options: InputOptions) -> Sources:
        """The files that the options name.

        Raises:
            FileNotFoundError: for one that is not there.
            ValueError: for one that is no picture, or no video.
        """
        files: dict[str, Any] = {name: _probed(name, getattr(options, name)) for name in options.files}
        return cls(**files, strength=options.strength, fit=options.fit or DEFAULT_FIT if files else None)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Sources:
        """The inverse of `to_json`. Raises TypeError for unknown names."""
        given: dict[str, Any] = {name: SourceFile(**value) if name in FILES else value for name, value in content.items()}
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """What is given, for a JSON file."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """Which of the files are given."""
        return tuple(name for name in FILES if getattr(self, name) is not None)

    def check(self) -> None:
        """Raise when a file has changed or is gone."""
        for name in self.names:
            getattr(self, name).check()

    def format(self) -> dict[str, Any]:
        """`num_frames` and `fps` that the result takes over: those of the video it is made from, but for a continuation's frames."""
        file = self.video or self.control or self.extend
        if file is None:
            return {}
        info = probe_video(file.path)
        rate = {"fps": int(info.fps) if info.fps.is_integer() else info.fps}
        return rate if self.extend else rate | {"num_frames": info.num_frames}

    def call_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's `__call__`."""
        files = {ARGUMENTS.get(name, name): getattr(self, name).path for name in self.names}
        how = {"strength": self.strength, "fit": self.fit}
        return files | {name: value for name, value in how.items() if value is not None}


def _probed(option: str, path: str) -> SourceFile:
    """A file that was looked into: a picture or a video, as the option wants."""
    file = SourceFile.of(path)
    picture = option in ("image", "last_image") or (option == "mask" and is_picture(path))
    (probe_image if picture else probe_video)(file.path)
    return file


# --- LoRA files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """A LoRA file, how strongly it acts, and its alpha where the user names one."""

    file: SourceFile
    scale: float = 1.0
    alpha: float | None = None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LoraFile:
        """From what `dataclasses.asdict` gives. Raises KeyError, TypeError for anything else."""
        return cls(**{**content, "file": SourceFile(**content["file"])})


def read_loras(texts: tuple[str, ...]) -> tuple[LoraFile, ...]:
    """The files behind "FILE" or "FILE:SCALE"; in place of the file may stand its folder, or its place on the hub (`fetch_lora`).

    Raises FileNotFoundError, and ValueError for a file that is named twice.
    """
    loras = []
    for text in texts:
        path, scale = _split_scale(text)
        loras.append(LoraFile(file=SourceFile.of(fetch_lora(path)), scale=scale))
    twice = {lora.file.path for lora in loras if [other.file for other in loras].count(lora.file) > 1}
    if twice:
        raise ValueError(f"--lora {min(twice)} is given twice: give it once, with the strength that you want.")
    return tuple(loras)


def _split_scale(text: str) -> tuple[str, float]:
    """("FILE", scale) of "FILE:SCALE"; what stands behind the last colon counts only when it is a number."""
    path, _, number = text.rpartition(":")
    try:
        scale = float(number)
    except ValueError:
        return text, 1.0
    if not path or Path(text).exists():
        return text, 1.0
    if not math.isfinite(scale):
        raise ValueError(f"--lora {text}: the strength must be a finite number, such as 0.7.")
    return path, scale
