"""The text encoder and its tokenizer, which every layout keeps as transformers does: found, copied, put into one folder or into two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..checkpoints.lazy import LazyTensor, lazily
from ..checkpoints.reading import inside, read_tensors
from ..pipelines.folder import read_json

__all__ = ["copy_tokenizer", "encoder_config", "encoder_tensors", "find_text_encoder"]

_FILES = ("*.json", "*.safetensors", "*.model", "*.bin")
_TOKENIZER = ("spiece.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_OF_ENCODER = ("shared.", "encoder.")  # T5 checkpoints may hold a decoder too


def find_text_encoder(place: str) -> tuple[Path, Path]:
    """Folders of the text encoder and of the tokenizer.

    Args:
        place: a pipeline folder with text_encoder/ and tokenizer/, a folder with both together as SAT has it, or such a repository
            on the hub.

    Raises:
        FileNotFoundError: neither a folder nor a repository with a T5 encoder.
    """
    folder = Path(place)
    if not folder.is_dir():
        folder = _download(place)
    found = (folder / "text_encoder", folder / "tokenizer")
    if not all(part.is_dir() for part in found):
        found = (folder, folder)
    if not (found[0] / "config.json").is_file() or read_json(found[0] / "config.json").get("model_type") != "t5":
        raise FileNotFoundError(f"{folder} holds no T5 text encoder: neither its config.json says so, nor is there a text_encoder/ in it.")
    if not any((found[1] / name).is_file() for name in _TOKENIZER[:2]):
        raise FileNotFoundError(f"{found[1]} holds no tokenizer: spiece.model or tokenizer.json is missing.")
    return found


def _download(repository: str) -> Path:
    if repository.count("/") != 1 or repository.startswith((".", "~", "/")):
        raise FileNotFoundError(f"there is no folder {repository!r}, and repositories are named owner/name.")
    patterns = [f"{part}{name}" for part in ("", "text_encoder/", "tokenizer/") for name in _FILES]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"there is no folder {repository!r}, and no such repository on the hub ({reason}).") from error


def encoder_tensors(folder: Path, dtype: torch.dtype | None = None) -> dict[str, LazyTensor]:
    """The encoder's weights by name, without those of a decoder.

    Raises:
        FileNotFoundError: there are no weights, or shards are missing.
    """
    tensors: dict[str, LazyTensor] = {}
    for file in _weight_files(folder):
        tensors |= lazily(read_tensors(file)[0])
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(_OF_ENCODER)}
    if "encoder.embed_tokens.weight" in kept and "shared.weight" in kept:
        del kept["encoder.embed_tokens.weight"]  # the same values
    if not kept:
        raise FileNotFoundError(f"the weights in {folder} hold no T5 encoder.")
    return {name: tensor.to(dtype) if dtype and tensor.dtype.is_floating_point else tensor for name, tensor in kept.items()}


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, else its pickles."""
    for suffix, stem in ((".safetensors", "model"), (".bin", "pytorch_model")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return [inside(folder, name, index) for name in sorted(set(read_json(index)["weight_map"].values()))]
        if (folder / f"{stem}{suffix}").is_file():
            return [folder / f"{stem}{suffix}"]
    raise FileNotFoundError(f"{folder} holds no weights of a text encoder (model.safetensors).")


def encoder_config(folder: Path, tensors: Mapping[str, LazyTensor]) -> str:
    """The text of a config.json for the encoder alone, whose `dtype` is that of the tensors."""
    config = read_json(folder / "config.json") | {"architectures": ["T5EncoderModel"], "is_encoder_decoder": False}
    config.pop("torch_dtype", None)
    dtype = next(tensor.dtype for tensor in tensors.values() if tensor.dtype.is_floating_point)
    return json.dumps(config | {"dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n"


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer into an existing folder."""
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
