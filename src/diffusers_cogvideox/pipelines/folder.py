"""Is a pipeline folder whole? Checks that name the file and the remedy, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = ["check_complete", "check_folder", "stored_names"]

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".flashpack")


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
    for name, entry in _read_json(folder / INDEX).items():
        if isinstance(entry, list) and entry[0] is not None and name not in passed and not name.startswith("_"):
            _check_component(folder / name)


def stored_names(folder: Path) -> set[str]:
    """Names of all tensors in the safetensors files of a component folder."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names.update(tensors.keys())
    return names


def check_complete(folder: Path, model: Any) -> None:
    """Raise OSError when the weights in `folder` leave parameters of `model` at their random initial values."""
    stored = stored_names(folder)
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
        shards = set(_read_json(file)["weight_map"].values())
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if absent:
            raise FileNotFoundError(f"{folder} lacks {', '.join(absent)} of {len(shards)} weight files. Download them again.")
    if (folder / "config.json").is_file():
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    _read_json(folder / "config.json")
    if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
        raise FileNotFoundError(
            f"{folder} holds a config.json but no weight file (*.safetensors). Download the repository again, or pass the component "
            f"as {folder.name}=..."
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise OSError(f"{file} is corrupt or was not copied completely ({error}). Download it again.") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise OSError(f"{file} is not valid JSON ({error}). Download it again.") from error
