"""LoRAs in a conversion: read from any layout, written to diffusers' or the original code's, or put into the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.lazy import LazyTensor, combine, lazily
from ..checkpoints.lora import Lora, check_fits, read_lora, to_layout, to_peft, with_alpha
from ..checkpoints.lora_config import DIFFUSERS_METADATA
from .detect import Group
from .parts import Part
from .plan import Weights

__all__ = ["diffusers_lora", "lora_of", "merged", "sat_lora", "sat_lora_config"]

_PREFIX = "transformer."
_FILE = "pytorch_lora_weights.safetensors"


def lora_of(group: Group, config: Mapping[str, Any] | None, alpha: float | None) -> Lora:
    """The LoRA in a group of tensors, with an alpha for every layer.

    Args:
        group: of kind "lora".
        config: PEFT's LoraConfig or SAT's (r, lora_alpha), where one stands beside the file.
        alpha: for a file that does not say its own.

    Raises:
        ValueError: as `read_lora` and `with_alpha`.
    """
    tensors = {name: tensor.make() for name, tensor in group.tensors.items()}
    return with_alpha(read_lora(tensors, group.source, group.header, config), alpha)


def diffusers_lora(lora: Lora, place: str, dtype: torch.dtype | None) -> Weights:
    """As diffusers saves it, with alpha in the metadata, where diffusers looks for it."""
    tensors, config = to_peft(lora)
    named = {f"{_PREFIX}{name}": tensor for name, tensor in lazily(tensors).items()}
    metadata = {f"{_PREFIX}{key}": value for key, value in config.items()}
    header = {"format": "pt", DIFFUSERS_METADATA: json.dumps(metadata, indent=2, sort_keys=True)}
    return Weights(f"{place}{_FILE}", _in(named, dtype), metadata=header)


def sat_lora(lora: Lora, place: str, dtype: torch.dtype | None) -> Weights:
    """As the original code saves it. Its alpha belongs into the `lora_config` of a YAML file: see `sat_lora_config`."""
    return Weights(place, _in(lazily(to_layout(lora, "sat")), dtype), wrapper="module")


def sat_lora_config(lora: Lora) -> dict[str, Any]:
    """What the `lora_config` of the original code must say: r and lora_alpha, which are the same for all layers there."""
    layer = next(iter(lora.layers.values()))
    return {"r": layer.rank, "lora_alpha": layer.alpha}


def _in(tensors: dict[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    return {name: tensor.to(dtype) if dtype else tensor for name, tensor in tensors.items()}


def merged(part: Part, lora: Lora) -> Part:
    """A transformer with the LoRA in its weights, W + alpha / r * B A, summed in float32.

    Raises:
        ValueError: it does not fit, or is a DoRA, whose magnitudes are left to PEFT.
    """
    check_fits(lora, part.config)
    if lora.is_dora:
        raise ValueError(f"{lora.source} is a DoRA, which cannot be merged here: convert it, load both, and call fuse_lora().")
    changed = {}
    for name, layer in lora.layers.items():
        assert layer.alpha is not None
        sum_of = partial(_sum, down=layer.down, up=layer.up, scale=layer.alpha / layer.rank)
        changed[f"{name}.weight"] = combine(sum_of, [part.tensors[f"{name}.weight"]])
    return replace(part, tensors={**part.tensors, **changed}, rules=None)


def _sum(weight: Tensor, *, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """W + scale * B A for W (out, in), or (out, C, p, p) of the patch convolution."""
    if weight.is_meta:
        return weight
    update = scale * (up.float().flatten(1) @ down.float().flatten(1))
    return (weight.float() + update.view_as(weight)).to(weight.dtype)
