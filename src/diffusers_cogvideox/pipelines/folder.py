"""The files of a pipeline folder: read, and checked to be whole before anything is loaded. Errors name the file and the remedy."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

__all__ = ["INDEX", "StoredTensor", "check_complete", "check_folder", "component_names", "read_header", "read_json"]

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".flashpack")


class StoredTensor(NamedTuple):
    """One tensor in a weight file; `dtype` in the words of safetensors, such as "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, and OSError for anything else than an object."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors are both ValueErrors
        raise OSError(f"{file} is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise OSError(f"{file} holds a {type(content).__name__}, not a JSON object. Copy or download it again.")
    return content


def read_header(file: Path) -> list[StoredTensor]:
    """All tensors of a safetensors file; their values are not read. Raises OSError for a file that is cut off or something else."""
    try:
        with safe_open(file, "pt") as content:
            parts = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 - not a dict
            return [StoredTensor(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()]
    except SafetensorError as error:
        raise OSError(f"{file} is corrupt or was not copied completely ({error}). Copy or download it again.") from error


def component_names(folder: Path) -> list[str]:
    """Names of the components of a pipeline folder, without those that its model_index.json leaves empty."""
    entries = read_json(folder / INDEX).items()
    return [name for name, entry in entries if isinstance(entry, list) and entry[0] is not None and not name.startswith("_")]


def check_folder(folder: Path, passed: Collection[str] = ()) -> None:
    """Check that every component folder that `folder`/model_index.json names is there and readable.

    Only headers of weight files are read. Components in `passed` are handed over by the caller and not looked at.

    Raises:
        FileNotFoundError: for a missing index, component folder or weight file.
        OSError: for a file that is not valid JSON, or a weight file that is cut off or not a weight file.
    """
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {INDEX}, so it is not a pipeline folder. Give the folder above transformer/ and vae/; raw weights "
            "must be converted first."
        )
    for name in component_names(folder):
        if name not in passed:
            _check_component(folder / name)


def check_complete(folder: Path, model: Any) -> None:
    """Raise OSError when the weights in `folder` leave parameters of `model` at their random initial values."""
    stored = {tensor.name for file in folder.glob("*.safetensors") for tensor in read_header(file)}
    missing = sorted(set(model.state_dict()) - stored)
    if stored and missing:
        raise OSError(
            f"The weights in {folder} lack {len(missing)} of the model's tensors, among them {missing[0]!r}: the file is incomplete "
            "or belongs to another architecture. Download it again, or correct config.json."
        )


def _check_component(folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing, although {INDEX} names it. Copy or download the whole repository again.")
    for file in folder.glob("*.index.json"):
        shards = set(read_json(file)["weight_map"].values())
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)} of {len(shards)} weight files. Download them again.")
    if (folder / "config.json").is_file():
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    read_json(folder / "config.json")
    if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
        raise FileNotFoundError(
            f"{folder} holds a config.json but no weight file (*.safetensors). Download the repository again, or pass the component "
            f"as {folder.name}=..."
        )
    for file in sorted(folder.glob("*.safetensors")):
        read_header(file)
