"""Tensor files as they come from the world: safetensors or pickles, told apart by their content, opened without running their code."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = ["LATEST", "SAT_MODEL_FILE", "inside", "is_gguf", "newest", "read_content", "read_tensors"]

LATEST = "latest"
"""A file of SAT and DeepSpeed: the name of the folder with the newest weights."""

SAT_MODEL_FILE = "mp_rank_00_model_states.pt"
"""The file of such a folder that holds the weights of a model on a single rank."""

_WRAPPERS = ("model", "module", "state_dict")  # what SAT, DeepSpeed and Lightning wrap a state dict in
# Training files of SAT and DeepSpeed hold the state of NumPy's generator, an array; rebuilding arrays runs no foreign code.
_ARRAYS: list[Any] = [
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]


class _Inert:
    """Stands in the place of DeepSpeed's bookkeeping: keeps what it is given, does nothing."""

    def __init__(self, *content: Any) -> None:
        self.content = content


_DEEPSPEED: list[Any] = [
    (_Inert, f"deepspeed.{name}")
    for name in (
        "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler",
        "runtime.zero.config.ZeroStageEnum",
        "utils.tensor_fragment.fragment_address",
    )
]
_TRUST = "If you trust whoever made it: `cogvideox convert --trust-pickle` runs that code, with all your rights, and saves the tensors."
# First bytes of what is saved by mistake in the place of weights.
_NO_WEIGHTS = {
    b"<": "a web page",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"{": "a JSON file",
}


def read_tensors(path: Path, *, allow_pickle: bool = True, trusted: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file by name, mapped from disk where the format allows it, and the file's own metadata (strings by name).

    Pickles are opened with `weights_only=True`; dictionaries around the state dict ("module", "state_dict", "model") are taken off.

    Args:
        path: a safetensors file under any name, or a torch pickle (.pt, .bin, .ckpt).
        allow_pickle: False refuses pickles.
        trusted: run the code in a pickle that needs it.

    Raises:
        FileNotFoundError: for a path that is no file.
        OSError: for a file that is cut off, is no weight file, or is a pickle that needs code to be run.
    """
    start = _start(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if not allow_pickle and not _what_it_is(start):
        raise OSError(f"{path} is not a safetensors file, and use_safetensors=True allows no other.")
    return _tensors(_unwrapped(read_content(path, trusted=trusted)), path), {}


def read_content(path: Path, *, trusted: bool = False) -> Any:
    """Everything in a torch pickle, as it is nested; tensors are mapped from disk where the format allows it.

    Raises:
        FileNotFoundError, OSError: as `read_tensors`.
    """
    if kind := _what_it_is(_start(path)):
        raise OSError(f"{path} is no weight file but {kind}. Download it again.")
    return _read_pickle(path, trusted)


def is_gguf(path: Path) -> bool:
    """Whether a file is in the format of llama.cpp, with quantised tensors."""
    return _start(path)[:4] == b"GGUF"


def inside(folder: Path, name: str, source: Path) -> Path:
    """`folder / name`, for a name that a file says.

    Raises:
        OSError: it leads out of the folder; the message names the file that says so.
    """
    path = folder / name
    if folder.resolve() not in path.resolve().parents:
        raise OSError(f"{source} names {name!r}, which is outside of its folder, so it is refused.")
    return path


def newest(folder: Path) -> Path | None:
    """The folder with the newest weights in the folder of a training run, as its file LATEST says; None where there is no such file.

    Raises:
        OSError: it lies elsewhere.
        FileNotFoundError: it is not there.
    """
    says = folder / LATEST
    if not says.is_file():
        return None
    tag = says.read_text(encoding="utf-8").strip()
    place = inside(folder, tag, says)
    if not place.is_dir():
        raise FileNotFoundError(f"{says} names {tag!r}, but there is no folder {place}.")
    return place


def _start(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    with path.open("rb") as stream:
        return stream.read(64)


def _what_it_is(start: bytes) -> str | None:
    """What a file is by its first bytes, if it is something that is mistaken for weights."""
    return next((kind for beginning, kind in _NO_WEIGHTS.items() if start.lstrip().startswith(beginning)), None)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise OSError(f"{path} is corrupt or was not copied completely ({error}). Copy or download it again.") from error


def _read_pickle(path: Path, trusted: bool) -> Any:
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            _check_sizes(path)
        with torch.serialization.safe_globals([*_ARRAYS, *_DEEPSPEED]):
            return torch.load(path, map_location="cpu", weights_only=not trusted, mmap=is_zip)
    except UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except (RuntimeError, EOFError, ValueError, OSError, SafetensorError, zipfile.BadZipFile) as error:  # torch reads .safetensors as such
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise OSError(f"{path} is corrupt or was not copied completely ({reason}). Copy or download it again.") from error


def _check_sizes(path: Path) -> None:
    """Refuse an archive whose parts claim more bytes than it has, or would grow when they are unpacked."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which PyTorch never does")
    if (claimed := sum(entry.file_size for entry in entries)) > path.stat().st_size:
        raise ValueError(f"its parts claim {claimed} bytes, but it has {path.stat().st_size}")


def _refused(path: Path, reason: str) -> OSError:
    """What to say about a pickle that PyTorch does not open; PyTorch itself advises to run its code."""
    if code := re.search(r"(?:GLOBAL|function|class) (\S+\.\w+)", reason):
        return OSError(
            f"{path} cannot be opened without running code that it contains ({code[1]}), so it is refused. Have it saved again as "
            f"safetensors. {_TRUST}"
        )
    return OSError(f"{path} is no weight file, or is corrupt, so it is refused. Copy or download it again.")


def _unwrapped(content: Any) -> Any:
    """The innermost state dict; what stands beside it (iteration, states of random generators) is left behind."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise OSError(f"{path} holds a {type(content).__name__}, not tensors by name.")
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise OSError(f"{path} holds something else than tensors by name: {', '.join(map(repr, strange[:3]))}. Save its state dict alone.")
    return dict(content)
