"""Exactly the frames and pixels that were asked for: pad what goes into the model, crop what comes out of it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry

__all__ = ["crop_video", "pad_video"]


def pad_video(video: Tensor, geometry: Geometry, *, whole_patches: bool = False) -> Tensor:
    """Grow a video (B, C, F, H, W) to the next length and size that the model can make; `crop_video` gives it back.

    The last frame is repeated at the end, and the pixels at the edges are repeated outwards, evenly on both sides: what the
    model sees around the picture continues it. A video that fits already is returned as it is.

    Args:
        video: pixels, or a mask of them.
        geometry: size rules of the model.
        whole_patches: pad to a length whose latents are whole patches in time, for models that are padded at the end.

    Raises:
        ValueError: for a size that no padding makes legal.
    """
    frames, height, width = video.shape[2:]
    top, left = geometry.margins(height, width)
    padded_height, padded_width = geometry.padded_size(height, width)
    padded_frames = geometry.patched_frames(frames) if whole_patches else geometry.padded_frames(frames)
    if (padded_frames, padded_height, padded_width) == (frames, height, width):
        return video
    sides = (left, padded_width - width - left, top, padded_height - height - top)
    return F.pad(video, (*sides, 0, padded_frames - frames), mode="replicate")


def crop_video(video: Tensor, *, frames: int, height: int, width: int) -> Tensor:
    """The first `frames` frames and the middle `height` x `width` pixels of a decoded video (B, C, F, H, W)."""
    top, left = (video.shape[-2] - height) // 2, (video.shape[-1] - width) // 2
    return video[:, :, :frames, top : top + height, left : left + width]
