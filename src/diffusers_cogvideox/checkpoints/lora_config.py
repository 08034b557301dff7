"""What the metadata of a LoRA file say: alpha, and options that change what an adapter computes, which are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from math import sqrt
from typing import Any

__all__ = ["DIFFUSERS_METADATA", "adapter_config", "alpha_of", "check_options"]

DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Entry of a safetensors header in which diffusers keeps PEFT's LoraConfig as JSON, its keys behind "transformer."."""

# Entries of PEFT's LoraConfig that need nothing of us: the tensors tell them, or they matter in training only.
_TOLD_BY_TENSORS = {"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora"}
_ABOUT = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_TRAINING = {"lora_dropout", "megatron_core", "megatron_config", "qalora_group_size", "runtime_config", "eva_config", "ensure_weight_tying"}
_ALPHA = {"lora_alpha", "alpha_pattern", "use_rslora"}
_STARTS = ("True", "False", "None", "gaussian", "eva", "orthogonal")  # of `init_lora_weights`: those that leave the base as it is


def adapter_config(header: Mapping[str, str], layer_prefix: str = "transformer.") -> dict[str, Any]:
    """The LoraConfig entries in the header of a safetensors file, {} when there are none.

    Known are diffusers' "lora_adapter_metadata", finetrainers' "lora_config" (both JSON) and kohya's "ss_network_alpha".

    Raises:
        ValueError: for an entry that cannot be read.
    """
    try:
        if text := header.get(DIFFUSERS_METADATA):
            entries = json.loads(text)
            inside = {key.removeprefix(layer_prefix): value for key, value in entries.items() if key.startswith(layer_prefix)}
            return inside or entries
        if text := header.get("lora_config"):
            return dict(json.loads(text))
        if (alpha := header.get("ss_network_alpha", "None")) != "None":
            return {"lora_alpha": float(alpha)}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"the metadata about the LoRA cannot be read ({error})") from error
    return {}


def alpha_of(config: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """Alpha of one layer such that its strength is alpha / rank; None when `config` holds no alpha.

    `use_rslora` (arXiv:2312.03732) divides by the root of the rank instead, which is an alpha that many times larger.
    """
    if config.get("lora_alpha") is None:
        return None
    patterns = config.get("alpha_pattern") or {}
    matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))
    alpha = float(next(matching, config["lora_alpha"]))
    return alpha * sqrt(rank) if config.get("use_rslora") else alpha


def check_options(config: Mapping[str, Any]) -> None:
    """Raise ValueError for options that are switched on and that we would have to ignore."""
    known = _TOLD_BY_TENSORS | _ABOUT | _TRAINING | _ALPHA | {"init_lora_weights"}
    strange = [f"{key}={value!r}" for key, value in config.items() if key not in known and value and value != "none"]
    start = str(config.get("init_lora_weights"))
    strange += [f"init_lora_weights={start!r}"] if start not in _STARTS else []
    if strange:
        raise ValueError(f"its metadata ask for what is not supported: {', '.join(strange)}. Load it with PEFT and save it as a plain LoRA")
