"""Clips as latents: encoding them once, and the statistics that give the scaling factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.moving_shapes import MovingShapes
from ..models.autoencoder import AutoencoderKLCogVideoX
from .config import DataOptions

__all__ = ["clips_of", "encode_clips", "latent_statistics"]


def clips_of(data: DataOptions, frames: int) -> MovingShapes:
    """The clips of this length that a run trains on."""
    emphasis = data.emphasis if frames > 1 else None  # nothing moves in a single frame
    return MovingShapes(data.seed, objects=data.objects, frames=frames, height=data.height, width=data.width, emphasis=emphasis)


def latent_statistics(latents: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of latents (N, F, C, H, W), overall and per channel, and the scaling factor 1 / std."""
    values = latents.float()
    per_channel = values.transpose(0, 2).flatten(1)
    return {
        "mean": values.mean().item(),
        "std": values.std().item(),
        "scaling_factor": 1 / values.std().item(),
        "channel_mean": per_channel.mean(1).tolist(),
        "channel_std": per_channel.std(1).tolist(),
    }


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLCogVideoX, world: MovingShapes, span: range, *, first_frame: bool = False, bf16: bool = False, batch_size: int = 16
) -> Tensor:
    """Latents (N, F, C, H, W) float16 of the samples of `world` numbered in `span`: the posterior's mean, unscaled.

    With `first_frame`, of the first frame alone, encoded as a picture: what an image-to-video model is shown (F = 1). `bf16` runs
    convolutions in bfloat16.
    """
    parts = []
    title = f"encoding {'first frames' if first_frame else f'{world.frames}-frame clips'}"
    for start in tqdm(range(span.start, span.stop, batch_size), desc=title, mininterval=5):
        videos, _, _ = world.batch(start, min(batch_size, span.stop - start))
        video = torch.from_numpy(videos[:, :1] if first_frame else videos).movedim(-1, 1).to(vae.device, vae.dtype)
        with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
            latents = vae.encode(video).latent_dist.mode()
        parts.append(latents.transpose(1, 2).half().cpu())
    return torch.cat(parts)
