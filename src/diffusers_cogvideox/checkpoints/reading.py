"""Tensor files as they come from the world: safetensors or pickles, told apart by their content, opened without running any code."""

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

__all__ = ["read_tensors"]

_WRAPPERS = ("model", "module", "state_dict")  # what SAT, DeepSpeed and Lightning wrap a state dict in
# Training files of SAT and DeepSpeed hold the state of NumPy's generator, an array; rebuilding arrays runs no foreign code.
_ARRAYS: list[Any] = [
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
]
# First bytes of what is saved by mistake in the place of weights.
_NO_WEIGHTS = {
    b"<": "a web page",
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"{": "a JSON file",
}


def read_tensors(path: Path, *, allow_pickle: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a file by name, mapped from disk where the format allows it, and the file's own metadata (strings by name).

    Pickles are opened with `weights_only=True`; dictionaries around the state dict ("module", "state_dict", "model") are taken off.

    Args:
        path: a safetensors file under any name, or a torch pickle (.pt, .bin, .ckpt).
        allow_pickle: False refuses pickles.

    Raises:
        FileNotFoundError: for a path that is no file.
        OSError: for a file that is cut off, is no weight file, or is a pickle that needs code to be run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    with path.open("rb") as stream:
        start = stream.read(64)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    for beginning, kind in _NO_WEIGHTS.items():
        if start.lstrip().startswith(beginning):
            raise OSError(f"{path} is no weight file but {kind}. Download it again.")
    if not allow_pickle:
        raise OSError(f"{path} is not a safetensors file, and use_safetensors=True allows no other.")
    return _read_pickle(path), {}


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as content:
            return {name: content.get_tensor(name) for name in content.keys()}, content.metadata() or {}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise OSError(f"{path} is corrupt or was not copied completely ({error}). Copy or download it again.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except (RuntimeError, EOFError, ValueError, OSError, SafetensorError) as error:  # torch reads what is named .safetensors as such
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise OSError(f"{path} is corrupt or was not copied completely ({reason}). Copy or download it again.") from error
    return _tensors(_unwrapped(content), path)


def _refused(path: Path, reason: str) -> OSError:
    """What to say about a pickle that PyTorch does not open; PyTorch itself advises to run its code."""
    if code := re.search(r"(?:GLOBAL|function|class) (\S+\.\w+)", reason):
        return OSError(
            f"{path} cannot be opened without running code that it contains ({code[1]}), so it is refused. Have it saved again as "
            "safetensors by somebody who trusts it."
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
