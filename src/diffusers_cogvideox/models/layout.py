"""How latents are laid out for the transformer, in sampling and in training: padding in front, and the channels of an image."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["front_padded", "image_channels"]


def front_padded(latents: Tensor, padding: int) -> Tensor:
    """Latents (B, F, C, H, W) with their first frame repeated `padding` times in front, as CogVideoX 1.5 was trained."""
    return torch.cat([latents[:, :1]] * padding + [latents], dim=1)


def image_channels(image: Tensor, frames: int) -> Tensor:
    """The extra channels (B, F, C, H, W) of an image-to-video model: the scaled latents of an image (B, 1, C, H, W) first, then zeros.

    CogVideoX (arXiv 2408.06072), appendix "Image To Video Model". With padding in front, that is the first of the padding frames.
    """
    return torch.cat([image, image.new_zeros((len(image), frames - 1, *image.shape[2:]))], dim=1)
