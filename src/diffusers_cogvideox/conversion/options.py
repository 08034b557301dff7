"""What the verb `convert` can be told."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from ..options import Precision

__all__ = ["ConvertOptions"]


@dataclass(frozen=True)
class ConvertOptions:
    """Convert a checkpoint between the original code (SAT), DeepSpeed, single files, LoRA files and model folders of diffusers.

    What the input is, its tensors tell: layout, variant and sizes need no options. The result appears whole or not at all.
    """

    input: str
    """File or folder: a transformer, VAE or release folder of the original code, a DeepSpeed checkpoint, a LoRA, a single file of a
    model, or a model folder."""
    output: str
    """Folder for the result, or a file where the result is one (.safetensors, .pt)."""
    _: KW_ONLY
    to: Literal["diffusers", "sat"] | None = None
    """Whose layout to write: diffusers', or that of the original code (default: sat for model folders, else diffusers)."""
    dtype: Precision | None = None
    """Precision of the result (default: as it is)."""
    max_shard_size: str = "5GB"
    """Most bytes of weights in one file of a model folder, with KB, MB or GB."""
    text_encoder: str | None = None
    """T5 encoder with tokenizer for a pipeline: folder, pipeline folder, or repository on the Hugging Face hub."""
    like: str | None = None
    """What decides what tensors leave open, such as the scale of a VAE: a release (2b, 5b, 5b-i2v, 1.5-5b, ...), a config.json, or a
    model folder (default: the transformer beside it, or the release of the same architecture)."""
    only: Literal["transformer", "vae", "lora"] | None = None
    """Convert only this of several models in one file or folder."""
    lora_alpha: float | None = None
    """Alpha of a LoRA that does not say its own (default: what its trainer uses, or its rank, with a warning)."""
    merge_lora: bool = False
    """Put the LoRA of a training checkpoint into the weights of its transformer."""
    verify: bool = False
    """Open the result again, compare it with the source bit by bit and by its outputs, and print the hash of every tensor."""
    trust_pickle: bool = False
    """Run the code in a pickle that cannot be opened without: it can do whatever you can. Other files never need it."""
    overwrite: bool = False
    """Replace an earlier result."""

    def __post_init__(self) -> None:
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"--lora-alpha {self.lora_alpha} is not possible: it must be positive and finite.")
