"""Which models the tensors of a checkpoint belong to, told from their names alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..checkpoints.lazy import LazyTensor
from ..checkpoints.lora_layouts import is_adapter
from ..checkpoints.rules import listed

__all__ = ["Group", "Kind", "Layout", "sort_tensors"]

Kind = Literal["transformer", "vae", "lora", "text_encoder"]
Layout = Literal["sat", "diffusers"]

# Wrappers of training frameworks around the names, at their beginning and inside.
_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod|base_model\.model)\.)+")
_INSIDE = ".base_layer."

# Kind and layout of the names that match. What an expression consumes is a prefix of the file; what it looks ahead at is the model's.
_NAMES: tuple[tuple[Kind, Layout, re.Pattern[str]], ...] = (
    (
        "transformer",
        "sat",
        re.compile(
            r"(?:model\.diffusion_model\.)?(?=(?:mixins|time_embed|ofs_embed)\."
            r"|transformer\.(?:layers|final_layernorm|word_embeddings|position_embeddings)\.)"
        ),
    ),
    (
        "transformer",
        "diffusers",
        re.compile(
            r"(?:model\.diffusion_model\.|diffusion_model\.|transformer\.)?"
            r"(?=(?:transformer_blocks|patch_embed|time_embedding|ofs_embedding|norm_final|norm_out|proj_out)\.)"
        ),
    ),
    ("vae", "sat", re.compile(r"(?:first_stage_model\.)?(?=(?:encoder|decoder)\.(?:down|up|mid)\.|loss\.)")),
    (
        "vae",
        "diffusers",
        re.compile(
            r"(?:first_stage_model\.|vae\.)?(?=(?:encoder|decoder)\.(?:down_blocks|up_blocks|mid_block|conv_in|conv_out|norm_out)\."
            r"|(?:post_)?quant_conv\.)"
        ),
    ),
    (
        "text_encoder",
        "diffusers",
        re.compile(r"(?:conditioner|cond_stage_model|text_encoder)\.|(?=shared\.|encoder\.block\.|encoder\.embed_tokens\.)"),
    ),
)
_SAT_VAE = re.compile(r"(?:encoder|decoder)\.(?:down|up|mid)\.")  # what only SAT's VAE has; the ends are named alike


@dataclass(frozen=True)
class Group:
    """The tensors of one model.

    Args:
        kind: what it is.
        layout: whose names they have; a LoRA's are those of its file.
        tensors: by name, without the prefix of the file.
        source: where they come from, for messages.
        header: metadata of the file.
    """

    kind: Kind
    layout: Layout
    tensors: Mapping[str, LazyTensor]
    source: str
    header: Mapping[str, str]


def sort_tensors(tensors: Mapping[str, LazyTensor], source: str, header: Mapping[str, str] | None = None) -> dict[Kind, Group]:
    """The models that a checkpoint holds.

    Raises:
        ValueError: no tensors, or tensors that belong to no known layout; the message lists them.
    """
    if not tensors:
        raise ValueError(f"{source} is empty: it holds no tensors.")
    found: dict[Kind, dict[str, LazyTensor]] = {}
    layouts: dict[Kind, set[Layout]] = {}
    strange = []
    for name, tensor in tensors.items():
        place = _place(name)
        if place is None:
            strange.append(name)
            continue
        kind, layout, bare = place
        group = found.setdefault(kind, {})
        if bare in group:
            raise ValueError(f"{source} holds {bare} twice, under several prefixes.")
        group[bare] = tensor
        layouts.setdefault(kind, set()).add(layout)
    if strange:
        raise ValueError(_unknown(source, strange, len(tensors)))
    return {kind: Group(kind, _layout(kind, layouts[kind], group, source), group, source, header or {}) for kind, group in found.items()}


def _place(name: str) -> tuple[Kind, Layout, str] | None:
    """Kind, layout and name without prefix."""
    if is_adapter(name):
        return "lora", "diffusers", name
    bare = _WRAPPERS.sub("", name).replace(_INSIDE, ".")
    for kind, layout, pattern in _NAMES:
        if match := pattern.match(bare):
            return kind, layout, bare[match.end() :]
    return None


def _layout(kind: Kind, layouts: set[Layout], names: Mapping[str, LazyTensor], source: str) -> Layout:
    if kind == "vae":
        return "sat" if any(_SAT_VAE.match(name) for name in names) else "diffusers"
    if len(layouts) > 1:
        raise ValueError(f"{source} mixes the names of the original code with those of diffusers, so it is neither.")
    return next(iter(layouts))


def _unknown(source: str, strange: list[str], total: int) -> str:
    return (
        f"{source} holds {len(strange)} of {total} tensors that belong to no layout of CogVideoX that is known: {listed(sorted(strange))}. "
        "Known are transformers and VAEs of the original code (SAT) and of diffusers, and LoRAs. It is the checkpoint of another model, or "
        "has keys that must be removed first."
    )
