"""The mask of the CogVideoX-Fun inpainting models, as a user gives it: what is kept, what is to be made (`models.layout` has the rest)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from ..models.layout import BLACK, frames_mask
from ..video_io import is_picture
from .inputs import Fit, load_image, load_video

__all__ = ["frames_between", "load_mask", "window_anchors"]


def load_mask(source: Any, height: int, width: int, frames: int, fit: Fit = "stretch") -> Tensor:
    """One or several masks as (B, 1, F, H, W): 1 where the source is brighter than middle grey.

    Args:
        source: what `load_video` takes, where arrays (F, H, W) and tensors (F, H, W) or (F, 1, H, W), also of bools, hold masks
            of one channel; or a single picture, as a path, PIL image or array (H, W), for all frames.
        height, width, fit: as for the video that is masked.
        frames: frames F of that video.

    Raises:
        ValueError: for another number of frames.
    """
    source = _in_colour(source)
    picture = isinstance(source, PIL.Image.Image) or (isinstance(source, str | os.PathLike) and is_picture(source))
    mask = load_image(source, height, width, fit).unsqueeze(2) if picture else load_video(source, height, width, fit)
    if mask.shape[2] not in (1, frames):
        raise ValueError(f"mask_video has {mask.shape[2]} frames for a video of {frames}: pass as many, or a single picture for all.")
    return (mask.mean(dim=1, keepdim=True) > 0).to(mask.dtype).expand(-1, -1, frames, -1, -1)


def _in_colour(source: Any) -> Any:
    """Masks of one channel as arrays or tensors of three, on a fourth axis."""
    if isinstance(source, np.ndarray):
        return np.asarray(_in_colour(torch.from_numpy(source)).movedim(1, -1)) if source.ndim < 4 else source
    if not isinstance(source, Tensor):
        return source
    source = source.float() if source.dtype == torch.bool else source
    if source.ndim < 4:
        source = source.reshape(-1, 1, *source.shape[-2:])  # F 1 H W
    return source.expand(*source.shape[:-3], 3, -1, -1) if source.shape[-3] == 1 else source


def frames_between(first: Tensor | None, last: Tensor | None, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A video (B, 3, F, H, W) that begins with one picture and ends with another, and its mask (1, 1, F, H, W): all else is to be made.

    Args:
        first, last: pictures (B, 3, H, W) in [-1, 1], or None for an end that is left open.
        frames: length F of the video.
        height, width: its size.

    Raises:
        ValueError: for two pictures and a single frame, and for different numbers of them, unless one is 1.
    """
    given = {place: picture for place, picture in ((0, first), (frames - 1, last)) if picture is not None}
    if len(given) < (first is not None) + (last is not None):
        raise ValueError("num_frames=1 has no place for both image and last_image: ask for at least 2 frames, or pass one of them.")
    counts = {len(picture) for picture in given.values()} - {1}
    if len(counts) > 1:
        raise ValueError(f"image and last_image: {len(first)} and {len(last)} were passed. Pass as many of both, or one.")  # type: ignore[arg-type]
    video = torch.full((max(counts, default=1), 3, frames, height, width), BLACK)
    for place, picture in given.items():
        video[:, :, place] = picture
    return video, frames_mask(frames, height, width, kept=given)


def window_anchors(mask: Tensor) -> int:
    """How many first latent frames context windows must keep, 0 or 1, so that none of them sees a video with all of it to be made.

    The models were trained on videos of which something is known, and, for text alone, on zeros in place of all channels. A window
    without anything known, cut from a video with a known frame elsewhere, is neither.

    Args:
        mask: (B, 1, F, H, W), 1 where something is to be made.

    Raises:
        ValueError: when a part of a video is known, but nothing of its first frame.
    """
    known = (mask < 0.5).flatten(3).any(dim=3)[:, 0]  # B F
    uneven = known.any(dim=1) & ~known.all(dim=1)
    if not known[uneven, 0].all():
        raise ValueError(
            "Context windows would see parts of the video in which nothing is known, which the model was not trained for: give the "
            "first frame too, or a mask that leaves something of every frame."
        )
    return int(uneven.any())
