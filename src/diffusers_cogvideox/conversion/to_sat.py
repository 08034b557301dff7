"""The files that the original code loads: a transformer's folder with `latest`, the VAE's pickle, and the folder of the text encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.lazy import LazyTensor
from ..checkpoints.lora import Lora
from ..checkpoints.reading import LATEST, SAT_MODEL_FILE
from ..checkpoints.sat import MODEL_PREFIX, POSITIONS, ROPE_COS, ROPE_SIN, UNUSED_POSITIONS, transformer_rules, vae_rules
from .loras import sat_lora, sat_lora_config
from .parts import Part
from .plan import Output, Weights
from .positions import generated
from .sources import SAT_CONFIGS
from .text_encoder import copy_tokenizer, encoder_config, encoder_tensors

__all__ = ["T5_FOLDER", "configs_file", "lora", "sat_tensors", "text_encoder", "transformer", "vae"]

T5_FOLDER = "t5-v1_1-xxl"
"""Where the configs of the original code look for the text encoder."""

_TAG = "1"
_VAE_FILE = "3d-vae.pt"


def sat_tensors(part: Part) -> dict[str, LazyTensor]:
    """All tensors of a part under the original code's names, in its order, with what it computes; without prefix."""
    if part.kind == "vae":
        return vae_rules(len(part.config["block_out_channels"])).backward(part.tensors)
    learned = bool(part.config.get("use_learned_positional_embeddings"))
    tensors = transformer_rules(learned).backward(part.tensors)
    extra = generated(part.config, next(iter(part.tensors.values())).dtype)
    first = {name: (extra | tensors)[name] for name in (POSITIONS, ROPE_SIN, ROPE_COS) if name in extra or name in tensors}
    own = [name for name in tensors if not name.startswith("transformer.") and name.startswith("mixins.")]
    unused = {UNUSED_POSITIONS: extra[UNUSED_POSITIONS]} if UNUSED_POSITIONS in extra else {}
    return first | {name: tensors[name] for name in own} | unused | tensors


def transformer(part: Part, place: str = "") -> Output:
    """`latest`, and the folder that it names with the pickle."""
    tensors = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in sat_tensors(part).items()}
    weights = Weights(f"{place}{_TAG}/{SAT_MODEL_FILE}", tensors, wrapper="module")
    return Output([weights], texts={f"{place}{LATEST}": _TAG})


def vae(part: Part, place: str = "") -> Output:
    """The pickle of the VAE."""
    return Output([Weights(f"{place}{_VAE_FILE}", sat_tensors(part), wrapper="state_dict")])


def lora(found: Lora, dtype: torch.dtype | None) -> Output:
    """A LoRA in the place of a transformer."""
    config = sat_lora_config(found)
    notes = [f"for the lora_config of the original code's YAML file: r {config['r']}, lora_alpha {config['lora_alpha']:g}"]
    return Output([sat_lora(found, f"{_TAG}/{SAT_MODEL_FILE}", dtype)], texts={LATEST: _TAG}, notes=notes)


def text_encoder(folders: tuple[Path, Path], dtype: torch.dtype | None) -> Output:
    """Text encoder and tokenizer in one folder."""
    tensors = encoder_tensors(folders[0], dtype)
    return Output(
        [Weights(T5_FOLDER, tensors, stem="model")],
        others=[partial(_tokenizer, folders[1])],
        texts={f"{T5_FOLDER}/config.json": encoder_config(folders[0], tensors)},
    )


def _tokenizer(source: Path, root: Path) -> None:
    copy_tokenizer(source, root / T5_FOLDER)


def configs_file(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The file that keeps what diffusers' configs say and the tensors do not tell, for the way back."""
    return {SAT_CONFIGS: json.dumps(configs, indent=2, sort_keys=True) + "\n"} if configs else {}
