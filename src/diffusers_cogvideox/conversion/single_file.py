"""What `from_single_file` needs: the config of the model in a file, and its tensors under diffusers' names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import _extract_repo_id_and_weights_name
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from huggingface_hub import hf_hub_download
from torch import Tensor

from ..checkpoints.lazy import lazily
from ..checkpoints.reading import is_gguf
from ..models.single_file import Weights
from .detect import Kind, sort_tensors
from .hints import hints_for, parts_of
from .parts import MODELS, Part
from .sources import Source, open_source

__all__ = ["as_diffusers", "classes_in", "read_single_file"]

_KINDS: dict[str, Kind] = {model.__name__: kind for kind, model in MODELS.items()}


def read_single_file(
    class_name: str, weights: Weights, config: str | os.PathLike[str] | None = None, keep_quantised: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Understand a file of weights.

    Args:
        class_name: of the model that is wanted.
        weights: a file, the address of a file on the hub, or tensors by name.
        config: a release, a folder, a config.json, or a repository, that decides what the tensors leave open.
        keep_quantised: give the tensors of a GGUF file as they are.

    Returns:
        the config; and the tensors by the names in the file, for `as_diffusers`.

    Raises:
        FileNotFoundError, OSError: the file is not there, is damaged or dangerous.
        ValueError: it holds no model of that class, or one that is not whole.
    """
    source = _opened(weights)
    part = _wanted(class_name, source, None if config is None else _local_config(class_name, str(config)))
    if keep_quantised and source.path.is_file() and is_gguf(source.path):
        return part.config, load_gguf_checkpoint(str(source.path))
    return part.config, {name: tensor.make() for name, tensor in part.group.tensors.items()}


def classes_in(weights: Weights) -> set[str]:
    """Names of the classes of the models in a file; arguments and errors as `read_single_file`."""
    return {MODELS[kind].__name__ for kind in _opened(weights).groups if kind in MODELS}


def _opened(weights: Weights) -> Source:
    if not isinstance(weights, Mapping):
        return open_source(_local(weights))
    return Source(Path("the state dict"), sort_tensors(lazily(weights), "the state dict"))


def as_diffusers(checkpoint: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under diffusers' names, for diffusers' table of single files.

    Args:
        checkpoint: tensors of one model, any shapes, under the names of any layout.
        config: of the model.

    Raises:
        ValueError: they are not the tensors of that model.
    """
    class_name = config.get("_class_name") or ("AutoencoderKLCogVideoX" if "latent_channels" in config else "CogVideoXTransformer3DModel")
    kind = _KINDS[class_name]
    source = Source(Path("the state dict"), sort_tensors(lazily(checkpoint), "the state dict"), {kind: config})
    return {name: tensor.make() for name, tensor in _wanted(class_name, source, None).tensors.items()}


def _wanted(class_name: str, source: Source, like: str | None) -> Part:
    kind = _KINDS[class_name]
    if kind not in source.groups:
        raise ValueError(f"{source.path} holds no {kind} but only: {', '.join(source.groups)}.")
    needed = ("transformer", kind)  # the transformer tells the scale of the VAE
    chosen = replace(source, groups={name: group for name, group in source.groups.items() if name in needed})
    parts, _ = parts_of(chosen, hints_for(source, like))
    return parts[kind]


def _local(weights: str | os.PathLike[str]) -> Path:
    """The file itself, or the downloaded one that an address names."""
    if Path(weights).exists() or "huggingface.co/" not in str(weights):
        return Path(weights)
    repository, name = _extract_repo_id_and_weights_name(str(weights))
    return Path(hf_hub_download(repository, name))


def _local_config(class_name: str, config: str) -> str:
    """A folder with the config of a model, fetched where a repository is named."""
    if Path(config).exists() or config.count("/") != 1:
        return config
    kind = _KINDS[class_name]
    for name in (f"{kind}/config.json", "config.json"):
        try:
            return hf_hub_download(config, name)
        except OSError as error:
            reason = error
    raise FileNotFoundError(f"there is no folder {config!r}, and no such repository with the config of a {kind} ({reason}).")
