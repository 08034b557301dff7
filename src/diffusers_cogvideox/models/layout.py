"""How latents are laid out for the transformer, in sampling and in training: padding in front, and the channels of what is known.

The conventions of inpainting models are those of VideoX-Fun's sampling code (`pipeline_cogvideox_fun_inpaint.py`) and of its
training code, which agree. In pixels a mask is 1 where something is to be made, 0 where the video is kept; pixels to be made are
black. To the transformer the mask is shown the other way round, 1 where the video is kept, and multiplied with the VAE's scaling
factor like the latents beside it. Where a whole video is to be made, mask and latents are both zero.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BLACK", "frames_mask", "front_padded", "image_channels", "inpaint_channels", "kept_latents", "masked"]

BLACK = -1.0
"""Value of pixels that are to be made."""


def front_padded(latents: Tensor, padding: int) -> Tensor:
    """Latents (B, F, C, H, W) with their first frame repeated `padding` times in front, as CogVideoX 1.5 was trained."""
    return torch.cat([latents[:, :1]] * padding + [latents], dim=1)


def image_channels(image: Tensor, frames: int) -> Tensor:
    """The extra channels (B, F, C, H, W) of an image-to-video model: the scaled latents of an image (B, 1, C, H, W) first, then zeros.

    CogVideoX (arXiv 2408.06072), appendix "Image To Video Model". With padding in front, that is the first of the padding frames.
    """
    return torch.cat([image, image.new_zeros((len(image), frames - 1, *image.shape[2:]))], dim=1)


# --- inpainting -----------------------------------------------------------------------------------------------------------


def frames_mask(frames: int, height: int, width: int, kept: Iterable[int]) -> Tensor:
    """The mask (1, 1, F, H, W) of a video of which whole frames are `kept`: 0 in those, 1 in all others."""
    mask = torch.ones(1, 1, frames, height, width)
    mask[:, :, list(kept)] = 0
    return mask


def masked(video: Tensor, mask: Tensor) -> Tensor:
    """`video` (B, 3, F, H, W) with black in place of what `mask` (B, 1, F, H, W) says is to be made; either B may be 1."""
    return torch.where(mask > 0.5, BLACK, video)


def kept_latents(mask: Tensor, latent_frames: int, height: int, width: int) -> Tensor:
    """How much of each latent is kept, (B, f, 1, h, w) in [0, 1], for a mask (B, 1, F, H, W) of pixels.

    The first frame, which has a latent frame of its own, is resized alone, and the others together, trilinearly between pixel
    centres. As in the training code nothing is averaged: of the 4 x 8 x 8 pixels of a latent, the middle 2 x 2 x 2 count. What is kept of
    other pixels alone shows in the masked video beside the mask only; so does a single last frame, the fourth of its latent.

    Args:
        mask: 1 where something is to be made.
        latent_frames, height, width: the latents' size.
    """
    kept = 1 - mask.float()
    parts = [(kept[:, :, :1], 1)] + [(kept[:, :, 1:], latent_frames - 1)] * (latent_frames > 1)
    resized = [F.interpolate(part, size=(frames, height, width), mode="trilinear") for part, frames in parts]
    return torch.cat(resized, dim=2).transpose(1, 2)


def inpaint_channels(kept: Tensor, known: Tensor, shown: Tensor, scaling_factor: float) -> Tensor:
    """The extra channels (B, f, 1 + C, h, w) of an inpainting model: mask, then masked video.

    Args:
        kept: how much of each latent is kept (B, f, 1, h, w), see `kept_latents`.
        known: latents of the masked video (B, f, C, h, w), multiplied with the scaling factor.
        shown: (B, 1, 1, 1, 1), 0 for videos of which nothing is known: both are zero there.
        scaling_factor: the VAE's.
    """
    return torch.cat([kept * scaling_factor, known], dim=2) * shown
