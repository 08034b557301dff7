"""A pipeline folder from separately trained parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import T5EncoderModel, T5Tokenizer

from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.transformer import CogVideoXTransformer3DModel
from ..presets import PRESETS
from ..schedulers.scheduler import CogVideoXDDIMScheduler
from .pipeline import CogVideoXPipeline

__all__ = ["assemble"]


def assemble(
    folder: str | Path,
    *,
    transformer: str | Path,
    vae: str | Path,
    text_encoder: str | Path,
    scheduler: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a text-to-video pipeline in the released folder layout to `folder`, and return it.

    Args:
        folder: where to write; weights are stored in `dtype`.
        transformer, vae: folders of the trained models.
        text_encoder: folder of the text encoder with its tokenizer.
        scheduler: config keys of the noise schedule where they differ from CogVideoX-5B's.
        dtype: of the stored weights.
    """
    pipe = CogVideoXPipeline(
        tokenizer=T5Tokenizer.from_pretrained(text_encoder),
        text_encoder=T5EncoderModel.from_pretrained(text_encoder),
        vae=AutoencoderKLCogVideoX.from_pretrained(vae),
        transformer=CogVideoXTransformer3DModel.from_pretrained(transformer),
        scheduler=CogVideoXDDIMScheduler(**PRESETS["5b"].scheduler | dict(scheduler)),
    )
    pipe.to(dtype=dtype).save_pretrained(folder)
    return Path(folder)
