"""The layouts that LoRA files of CogVideoX come in: one reversible table of names each, and which one a file has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .layers import LAYERS
from .rules import KeyRules, rename

__all__ = ["ALPHA", "DOWN", "LAYOUTS", "MAGNITUDE", "ROLES", "SAT_TARGETS", "UP", "Layout", "find_layout", "is_adapter"]

DOWN, UP, ALPHA, MAGNITUDE = "lora_A.weight", "lora_B.weight", "alpha", "lora_magnitude_vector"
ROLES = (DOWN, UP, ALPHA, MAGNITUDE)
"""The tensors of one adapted layer. Every layout is translated to and from the names `layer.role`, which are PEFT's."""

# How the layouts spell the roles; where there are several ways, the first is written.
_KOHYA: dict[str, tuple[str, ...]] = {DOWN: ("lora_down.weight",), UP: ("lora_up.weight",), ALPHA: ("alpha",), MAGNITUDE: ("dora_scale",)}
_DOTTED: dict[str, tuple[str, ...]] = {
    DOWN: ("lora_A.weight", "lora_A.default.weight", "lora_down.weight", "lora.down.weight"),
    UP: ("lora_B.weight", "lora_B.default.weight", "lora_up.weight", "lora.up.weight"),
    ALPHA: ("alpha",),
    MAGNITUDE: ("lora_magnitude_vector", "lora_magnitude_vector.default.weight", "dora_scale"),
}
_ANY_ROLE = re.compile(r"\.(lora_[AB]|lora_down|lora_up|lora\.down|lora\.up|lora_magnitude_vector|dora_scale|matrix_[AB])\b")

# SAT adapts a fused projection by one pair of matrices for each of its outputs.
_SAT = {
    "attention.query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention.dense": ("attn1.to_out.0",),
}
SAT_TARGETS = tuple(target for targets in _SAT.values() for target in targets)
"""What SAT adapts in every block."""

_SAT_MODEL = "model.diffusion_model."
# What stands beside the matrices when the whole model was saved.
_SAT_REST = {
    r"^(?!.*\.matrix_)(model\.diffusion_model\.)?(transformer|mixins|time_embed|ofs_embed)\.": "a weight of the base model",
    r"^(first_stage_model|conditioner)\.": "the VAE or the text encoder",
}


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a LoRA.

    Args:
        name: what it is called in messages. Of several layouts with one name, which differ in a prefix, the first is written.
        marker: regular expression; a file has the first layout whose marker is found in any of its names.
        rules: from its names to `layer.role`, and back.
        usual_alpha: what its trainers use where they store no alpha; None means the rank, a strength of 1.
        stores_alpha: whether alpha stands among the tensors (elsewhere it stands in metadata, or nowhere).
    """

    name: str
    marker: str
    rules: KeyRules
    usual_alpha: float | None = None
    stores_alpha: bool = False


def _sat_rules(prefix: str) -> KeyRules:
    """`transformer.layers.0.attention.query_key_value.matrix_A.1` is the `lora_A.weight` of to_k."""
    rules = [
        rename(f"{prefix}transformer.layers.{{layer}}.{linear}.{matrix}.{part}", f"transformer_blocks.{{layer}}.{target}.{role}")
        for linear, targets in _SAT.items()
        for part, target in enumerate(targets)
        for matrix, role in (("matrix_A", DOWN), ("matrix_B", UP))
    ]
    return KeyRules(rules, dropped=_SAT_REST)


def _flat_rules(prefix: str) -> KeyRules:
    """`lora_unet__transformer_blocks_0_attn1_to_q.lora_down.weight`: the dots of the layer's name are underscores."""
    return _role_rules({f"{prefix}{layer.replace('.', '_')}": layer for layer in LAYERS}, _KOHYA)


def _dotted_rules(prefix: str) -> KeyRules:
    """`transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`."""
    return _role_rules({f"{prefix}{layer}": layer for layer in LAYERS}, _DOTTED)


def _role_rules(layers: dict[str, str], spellings: dict[str, tuple[str, ...]]) -> KeyRules:
    return KeyRules(
        [
            rename(f"{spelled_layer}.{spelled}", f"{layer}.{role}")
            for spelled_layer, layer in layers.items()
            for role, all_spelled in spellings.items()
            for spelled in all_spelled
        ]
    )


LAYOUTS = (
    Layout("sat", r"^model\.diffusion_model\..*\.matrix_[AB]\.", _sat_rules(_SAT_MODEL), usual_alpha=1.0),
    Layout("sat", r"\.matrix_[AB]\.", _sat_rules(""), usual_alpha=1.0),
    Layout("kohya", r"^lora_unet__", _flat_rules("lora_unet__"), stores_alpha=True),
    Layout("kohya", r"^lora_unet_", _flat_rules("lora_unet_"), stores_alpha=True),
    Layout("diffusers", r"^transformer\.", _dotted_rules("transformer.")),
    Layout("comfyui", r"^diffusion_model\.", _dotted_rules("diffusion_model."), stores_alpha=True),
    Layout("peft", r"^base_model\.model\.", _dotted_rules("base_model.model.")),
    Layout("bare", r"", _dotted_rules("")),
)
"""SAT's training, VideoX-Fun and kohya's scripts, diffusers, ComfyUI, PEFT's `save_pretrained`, and names without a prefix."""


def find_layout(names: Iterable[str]) -> Layout | None:
    """The layout of a file with tensors of these names; None when none of them belongs to a LoRA."""
    adapters = [name for name in names if _ANY_ROLE.search(name)]
    return next((layout for layout in LAYOUTS if any(re.search(layout.marker, name) for name in adapters)), None)


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to a LoRA."""
    return bool(_ANY_ROLE.search(name)) or name.endswith(f".{ALPHA}")
