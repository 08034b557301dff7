"""One model of a checkpoint, understood: its config, and its tensors under diffusers' names, checked to be all and of the right shapes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..checkpoints.architecture import VAE_FAMILY, closest_release, family_of, transformer_config, vae_config, vae_levels
from ..checkpoints.lazy import LazyTensor
from ..checkpoints.rules import KeyRules, listed
from ..checkpoints.sat import POSITIONS, ROPE_COS, transformer_rules, vae_rules
from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.transformer import CogVideoXTransformer3DModel
from ..presets import PRESETS, Preset
from .detect import Group, Kind
from .positions import read_sizes

__all__ = ["MODELS", "Part", "in_dtype", "model_on_meta", "transformer_part", "vae_part"]

Config = Mapping[str, Any]

MODELS: dict[Kind, type[nn.Module]] = {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX}
"""The class of each kind of part."""

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TABLE = "patch_embed.pos_embedding"


@dataclass(frozen=True)
class Part:
    """A transformer or a VAE.

    Args:
        kind: which of them.
        config: all keys of its config.json.
        tensors: by diffusers' names, in the order of the model's own.
        group: the tensors that it was made of.
        rules: the table between the two; None where they have the same names.
        left_out: names of tensors that were dropped, and why.
    """

    kind: Kind
    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    group: Group
    rules: KeyRules | None
    left_out: dict[str, str]

    @property
    def source(self) -> str:
        """Where it comes from, for messages."""
        return self.group.source

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Precisions of its weights; a position table does not count."""
        return {tensor.dtype for name, tensor in self.tensors.items() if name != _TABLE}


def model_on_meta(kind: Kind, config: Config) -> nn.Module:
    """The model of a config, without values."""
    with torch.device("meta"):
        return MODELS[kind](**config)


def in_dtype(part: Part, dtype: torch.dtype | None) -> Part:
    """The part with all tensors in one precision: `dtype`, or its own.

    Raises:
        ValueError: it has several, and none is chosen.
    """
    if dtype is None and len(part.dtypes) > 1:
        counts = {kind: sum(tensor.dtype == kind for tensor in part.tensors.values()) for kind in part.dtypes}
        stated = ", ".join(f"{str(kind).removeprefix('torch.')} ({count} tensors)" for kind, count in sorted(counts.items(), key=str))
        raise ValueError(f"{part.source} holds tensors in several precisions: {stated}. Choose one with --dtype.")
    chosen = dtype or next(iter(part.dtypes))
    if chosen not in _PRECISIONS:
        raise ValueError(
            f"{part.source} holds tensors in {str(chosen).removeprefix('torch.')}, which is not written: choose one with --dtype."
        )
    return replace(part, tensors={name: tensor.to(chosen) for name, tensor in part.tensors.items()})


def transformer_part(group: Group, like: Config | None = None) -> Part:
    """The transformer in a group of tensors.

    Args:
        group: of kind "transformer".
        like: a config that decides what the tensors leave open.

    Raises:
        ValueError: names that no rule knows, missing tensors, wrong shapes, or what cannot be told.
    """
    names = group.tensors
    try:
        if group.layout == "diffusers":
            tensors, rules, rotary = dict(names), None, None
        else:
            is_linear = getattr(names.get("mixins.patch_embed.proj.weight"), "shape", (0,) * 4)[2:] == ()
            has_rotary = ROPE_COS in names or is_linear
            rotary = True if has_rotary else False if POSITIONS in names else None
            rules = transformer_rules(learned_positions=POSITIONS in names and has_rotary)
            tensors = rules.forward(names)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config = _known("transformer", transformer_config(shapes, rotary=rotary, like=like))
        if rules is not None:
            config |= read_sizes(names, config)
        part = Part("transformer", config, tensors, group, rules, _left_out(rules, names))
        _check_table(part)
        return _checked(part)
    except ValueError as error:
        raise ValueError(f"{group.source} cannot be converted as a transformer: {error}.") from error


def vae_part(group: Group, *, transformer: Config | None = None, like: Config | None = None, family: Preset | None = None) -> Part:
    """The VAE in a group of tensors.

    Args:
        group: of kind "vae".
        transformer: config of the transformer beside it, which tells its scaling factor.
        like: a config that decides what the tensors leave open.
        family: the release that it belongs to, in place of the transformer's.

    Raises:
        ValueError: as `transformer_part`.
    """
    names = group.tensors
    family = family or (family_of(transformer) if transformer else PRESETS[VAE_FAMILY])
    try:
        rules = vae_rules(vae_levels(names)) if group.layout == "sat" else None
        tensors = rules.forward(names) if rules else dict(names)
        config = vae_config({name: tensor.shape for name, tensor in tensors.items()}, family=family, like=like)
        config = _known("vae", config)
        return _checked(Part("vae", config, tensors, group, rules, _left_out(rules, names)))
    except ValueError as error:
        raise ValueError(f"{group.source} cannot be converted as a VAE: {error}.") from error


def _known(kind: Kind, config: Config) -> dict[str, Any]:
    """The entries of a config that the model has; early uploads carry others, which no version of it reads."""
    known = inspect.signature(MODELS[kind].__init__).parameters
    return {key: value for key, value in config.items() if key in known}


def _left_out(rules: KeyRules | None, names: Iterable[str]) -> dict[str, str]:
    return {name: reason for name in names if rules and (reason := rules.reason_to_drop(name))}


def _check_table(part: Part) -> None:
    """Raise ValueError for a learned position table of another size than the config says."""
    expected = {name: tensor.shape for name, tensor in model_on_meta(part.kind, part.config).named_buffers()}.get(_TABLE)
    if _TABLE in part.tensors and expected is not None and part.tensors[_TABLE].shape[1] != expected[1]:
        raise ValueError(
            f"its position table has {part.tensors[_TABLE].shape[1]} rows, not the {expected[1]} of the release that is most like it: say "
            "for which size with --like CONFIG.json"
        )


def _checked(part: Part) -> Part:
    """The part in the order of its model's tensors, or a ValueError that lists how it differs from them."""
    expected = {name: tuple(tensor.shape) for name, tensor in model_on_meta(part.kind, part.config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in part.tensors.items()}
    absent, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [f"{name} {found[name]} in place of {shape}" for name, shape in expected.items() if name in found and found[name] != shape]
    faults = [
        f"{title} {listed(names)}"
        for title, names in (("missing:", absent), ("not part of it:", extra), ("of a wrong shape:", wrong))
        if names
    ]
    if faults:
        nearest = f" (the closest release is {closest_release(part.config)})" if part.kind == "transformer" else ""
        raise ValueError(f"its tensors are not those of the model that their shapes tell{nearest}; {'; '.join(faults)}")
    return replace(part, tensors={name: part.tensors[name] for name in expected})
