"""Inputs for the tiny transformers of parity.py, with the rotary tables that stock's pipeline computes for them."""

from types import SimpleNamespace
from typing import Any

import torch

from diffusers_cogvideox.models.transformer import CogVideoXTransformer3DModel
from parity import TINY_TRANSFORMERS, StockPipeline, StockTransformer, twins

VARIANTS = sorted(TINY_TRANSFORMERS)


def stock_rope(config: Any, frames: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What stock's pipeline gives to its transformer for latents of frames x height x width."""
    if not config.use_rotary_positional_embeddings:
        return None
    pipe = SimpleNamespace(vae_scale_factor_spatial=8, transformer=SimpleNamespace(config=config))
    return StockPipeline._prepare_rotary_positional_embeddings(pipe, 8 * height, 8 * width, frames, torch.device("cpu"))


def tiny_twins(variant: str, **changes: Any) -> tuple[CogVideoXTransformer3DModel, StockTransformer]:
    """Our tiny transformer and stock's, with equal random weights."""
    return twins(CogVideoXTransformer3DModel, StockTransformer, TINY_TRANSFORMERS[variant] | changes)


def inputs(
    model: torch.nn.Module, frames: int | None = None, height: int = 8, width: int = 12, batch: int = 2, text: int = 7
) -> dict[str, Any]:
    """Keyword arguments for a forward pass: native size unless told otherwise, one timestep per sample."""
    config = model.config
    frames = frames or (4 if config.patch_size_t else 3)
    return {
        "hidden_states": torch.randn(batch, frames, config.in_channels, height, width),
        "encoder_hidden_states": torch.randn(batch, text, config.text_embed_dim),
        "timestep": torch.tensor([999, 431][:batch]),
        "ofs": torch.full((1,), 2.0) if config.ofs_embed_dim else None,
        "image_rotary_emb": stock_rope(config, frames, height, width),
        "return_dict": False,
    }
