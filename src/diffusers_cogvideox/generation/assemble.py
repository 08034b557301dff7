"""A pipeline folder from separately trained parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5EncoderModel, T5Tokenizer

from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.transformer import CogVideoXTransformer3DModel
from ..pipelines.base import CogVideoXPipelineBase
from ..pipelines.fun_inpaint import CogVideoXFunInpaintPipeline
from ..pipelines.image_to_video import CogVideoXImageToVideoPipeline
from ..pipelines.pipeline import CogVideoXPipeline
from ..presets import PRESETS
from ..schedulers.scheduler import CogVideoXDDIMScheduler
from ..tasks import Task, tasks_of

__all__ = ["assemble"]

_PIPELINES: dict[Task, type[CogVideoXPipelineBase]] = {
    "text": CogVideoXPipeline,
    "image": CogVideoXImageToVideoPipeline,
    "inpaint": CogVideoXFunInpaintPipeline,
}
"""Of what can be trained here."""


def assemble(
    folder: str | Path,
    *,
    transformer: str | Path | nn.Module,
    vae: str | Path,
    text_encoder: str | Path,
    scheduler: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a pipeline in the released folder layout to `folder`, and return it: that of the task that the transformer was made for.

    Args:
        folder: where to write; weights are stored in `dtype`.
        transformer: folder of the trained model, or the model itself, which is left as it is.
        vae: folder of the trained model.
        text_encoder: folder of the text encoder with its tokenizer.
        scheduler: config keys of the noise schedule where they differ from CogVideoX-5B's.
        dtype: of the stored weights.
    """
    model = _loaded(transformer)
    tasks = tasks_of(model.config)
    pipe = next(pipeline for task, pipeline in _PIPELINES.items() if task in tasks)(
        tokenizer=T5Tokenizer.from_pretrained(text_encoder),
        text_encoder=T5EncoderModel.from_pretrained(text_encoder),
        vae=AutoencoderKLCogVideoX.from_pretrained(vae),
        transformer=model,
        scheduler=CogVideoXDDIMScheduler(**PRESETS["5b"].scheduler | dict(scheduler)),
    )
    pipe.to(dtype=dtype).save_pretrained(folder)
    return Path(folder)


def _loaded(transformer: str | Path | nn.Module) -> CogVideoXTransformer3DModel:
    """The transformer of a folder, or a copy of one in memory."""
    if not isinstance(transformer, CogVideoXTransformer3DModel):
        return CogVideoXTransformer3DModel.from_pretrained(transformer)
    copy = CogVideoXTransformer3DModel.from_config(transformer.config)
    copy.load_state_dict(transformer.state_dict())
    return copy.eval()
