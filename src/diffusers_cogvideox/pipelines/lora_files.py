"""LoRA files where people keep them: a file, a folder with one, a repository on the hub, or tensors in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from torch import Tensor

from ..checkpoints.lora import Lora, read_lora
from ..checkpoints.reading import SAT_MODEL_FILE, newest, read_tensors
from .folder import read_json

__all__ = ["WEIGHTS", "fetch_lora", "find_lora_file", "has_lora_file", "open_lora"]

logger = logging.get_logger(__name__)

_USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
_HUB = {"revision", "token", "cache_dir", "local_files_only", "force_download"}  # arguments of hf_hub_download that are handed on
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_PEFT_CONFIG = "adapter_config.json"  # beside adapter_model.*, as PEFT saves


def open_lora(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> Lora:
    """Read a LoRA.

    Args:
        source: a file, a folder, a repository on the hub (owner/name), or tensors by name.
        weight_name: the file, where a folder or repository holds several.
        subfolder: folder within the folder or repository.
        use_safetensors: True allows no pickles.
        hub: revision, token, cache_dir, local_files_only, force_download, as in `huggingface_hub.hf_hub_download`.

    Raises:
        FileNotFoundError: there is no such file, or none that can be chosen.
        OSError: the file is cut off, or is no weight file.
        ValueError: the tensors are no LoRA of CogVideoX.
        TypeError: an argument that is none of these.
    """
    if unknown := sorted(set(hub) - _HUB):
        known = ", ".join(sorted(_HUB))
        raise TypeError(f"unknown arguments {', '.join(unknown)}: known are weight_name, subfolder, use_safetensors, {known}.")
    if isinstance(source, Mapping):
        return read_lora(source, "the state dict")
    place = Path(source) / (subfolder or "")
    if place.is_dir():
        path = find_lora_file(place, weight_name)
    else:
        path = place if place.is_file() else _download(str(source), weight_name, subfolder, hub)
    tensors, header = read_tensors(path, allow_pickle=use_safetensors is not True)
    beside = path.with_name(_PEFT_CONFIG)
    config = read_json(beside) if path.stem == "adapter_model" and beside.is_file() else None
    return read_lora(tensors, str(path), header, config)


def find_lora_file(folder: Path, weight_name: str | None = None) -> Path:
    """The LoRA file of a folder: the one that is named, a usual name, the newest of a SAT run, or the only weight file.

    Raises:
        FileNotFoundError: there is none, or none of several that can be chosen.
        OSError: the newest is said to be outside of the folder.
    """
    run = newest(folder) if weight_name is None else None
    if run is not None:
        return run / SAT_MODEL_FILE
    return folder / (weight_name or _choose([path.name for path in folder.iterdir()], str(folder)))


def has_lora_file(folder: Path) -> bool:
    """Whether `find_lora_file` finds a file in a folder."""
    try:
        return find_lora_file(folder).is_file()
    except OSError:
        return False


def _choose(names: Sequence[str], where: str) -> str:
    weights = sorted(name for name in names if name.endswith(WEIGHTS))
    usual = [name for name in _USUAL if name in weights]
    if not usual and len(weights) != 1:
        raise FileNotFoundError(
            f"{where} holds {len(weights)} weight files ({', '.join(weights[:8]) or 'none'}): name the one that is the LoRA, in "
            "Python with weight_name=..."
        )
    return (usual or weights)[0]


def fetch_lora(text: str) -> Path:
    """The file on disk behind what somebody writes: a file, its folder, `owner/name` on the hub, or `owner/name/FILE` of a repository
    that holds several. What is neither there nor named like a repository is returned as it is.

    Raises:
        FileNotFoundError: there is no such file or repository, or none of several files can be chosen.
    """
    path = Path(text)
    if path.is_dir():
        return find_lora_file(path)
    owner, _, rest = text.partition("/")
    name, _, file = rest.partition("/")
    if path.exists() or not name or owner in ("", ".", "..", "~") or (name.endswith(WEIGHTS) and not file):
        return path
    subfolder, _, weight_name = file.rpartition("/")
    return _download(f"{owner}/{name}", weight_name or None, subfolder or None, {})


def _download(repository: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """The file of a repository on the hub, from the cache where it is there."""
    if repository.count("/") != 1 or repository.startswith((".", "~", "/")):
        raise FileNotFoundError(f"there is no file or folder {repository!r}, and repositories are named owner/name.")
    known = {key: value for key, value in hub.items() if value is not None}
    inside = f"{subfolder}/" if subfolder else ""
    try:
        if weight_name is None:
            here = [file.removeprefix(inside) for file in _listing(repository, known) if file.startswith(inside)]
            weight_name = _choose([name for name in here if "/" not in name], f"{repository}/{inside}")
        if weight_name.startswith("adapter_model."):
            hf_hub_download(repository, f"{inside}{_PEFT_CONFIG}", **known)
        return Path(hf_hub_download(repository, f"{inside}{weight_name}", **known))
    except (HFValidationError, HfHubHTTPError, EntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"there is no file or folder {repository!r}, and no such repository or file on the hub or in its cache ({reason})."
        ) from error


def _listing(repository: str, hub: dict[str, Any]) -> list[str]:
    """Names of the files of a repository; without a connection, of those in the cache."""
    listing = {key: value for key, value in hub.items() if key in ("revision", "token")}
    try:
        if not hub.get("local_files_only"):
            return HfApi().list_repo_files(repository, **listing)
    except (HFValidationError, HfHubHTTPError):
        raise
    except Exception as error:  # offline mode, or no connection, which each HTTP library calls something else
        logger.info(f"{repository} cannot be listed ({error}): looking into the cache.")
    cached = {key: value for key, value in hub.items() if key in ("revision", "cache_dir")}
    folder = Path(snapshot_download(repository, local_files_only=True, **cached))
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
