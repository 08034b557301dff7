"""Files and folders that appear whole or not at all, and what tells their contents apart."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_folder", "atomic_path", "check_writable", "sha256"]

_PIECE = 2**20  # bytes that are read at once


def sha256(paths: Iterable[Path]) -> str:
    """SHA-256 of the contents of files, one behind the other, as hexadecimal digits. Raises OSError for a file that cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Return a free temporary path beside `path`, with the same suffix, after proving that files can be made there.

    Creates missing folders. Worth calling before hours of work, too. Raises OSError, naming `path`, when its folder
    cannot be created or written, or when `path` is a folder.
    """
    target = Path(path)
    partial = target.with_name(f".{target.stem}-{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if target.parent.is_file():
            raise NotADirectoryError(0, f"{target.parent} is a file, not a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()
    except OSError as error:
        raise OSError(f"cannot write {target}: {error.strerror or error}. Choose a file in a folder that you may write to.") from error
    return partial


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`, with the same suffix; renamed to `path` when the block ends, deleted when it fails.

    Raises OSError as `check_writable` does, before the block runs.
    """
    partial = check_writable(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new, hidden folder beside `path`; it takes the place of `path`, and of what is there, when the block ends, or is deleted.

    Raises OSError as `check_writable` does, before the block runs.
    """
    target = Path(path).resolve()  # a name to put another beside, also for "."
    if not target.is_dir():
        check_writable(target)
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.mkdir()
        yield partial
        if target.is_dir():
            old = partial.with_suffix(".old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
