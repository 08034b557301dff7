"""Pictures and videos that a user has, in whatever form, as tensors of the size that a model wants."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from PIL import ImageOps
from torch import Tensor

from ..options import Fit
from ..video_io import read_video

__all__ = ["Fit", "load_image", "load_video"]

logger = logging.get_logger(__name__)

Size = tuple[int, int]  # height, width in pixels
Picture = PIL.Image.Image | Tensor
"""One picture: 8-bit RGB, or float32 (3, H, W) in [0, 1]."""

NOTICEABLE = 1.03  # a change of the aspect ratio by more than this is seen as a distortion
TOLERANCE = 1e-3  # beyond [0, 1]: what filters and half precision leave behind


def load_image(source: Any, height: int, width: int, fit: Fit = "stretch") -> Tensor:
    """One or several pictures as (B, 3, H, W), float32 in [-1, 1].

    Args:
        source: a path; a PIL image; an array (H, W, 3) or (B, H, W, 3); a tensor (3, H, W) or (B, 3, H, W); or a list of such
            single pictures. Arrays and tensors hold bytes, or floats in [0, 1].
        height, width: pixels of the result.
        fit: "stretch" scales each axis by itself, "cover" scales evenly and crops the middle, "contain" scales evenly and pads
            with black. What is lost is logged. 8-bit pictures are resampled with a Lanczos filter; floats take the nearest
            pixel when stretched, as in diffusers, and else a bicubic filter.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError, TypeError: for a file that is no picture, another shape, another range of values, or nothing at all.
    """
    return _fitted(_pictures(source), (height, width), fit)


def load_video(source: Any, height: int, width: int, fit: Fit = "stretch") -> Tensor:
    """One or several videos as (B, 3, F, H, W), float32 in [-1, 1].

    Args:
        source: a path of a video file; a list of frames (PIL images, arrays (H, W, 3) or tensors (3, H, W)); an array
            (F, H, W, 3) or (B, F, H, W, 3); a tensor (F, 3, H, W) or (B, F, 3, H, W); or a list of such single videos, all of
            one length. Arrays and tensors hold bytes, or floats in [0, 1].
        height, width, fit: as in `load_image`.

    Raises: as `load_image`, and ValueError for videos of different lengths.
    """
    clips = _clips(source)
    lengths = [len(clip) for clip in clips]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The videos have {lengths} frames: videos that are made together must have the same number. Cut them, or call twice."
        )
    frames = _fitted([frame for clip in clips for frame in clip], (height, width), fit)
    return frames.unflatten(0, (len(clips), -1)).transpose(1, 2)  # B 3 F H W


# --- what was passed --------------------------------------------------------------------------------------------------


def _pictures(source: Any) -> list[Picture]:
    if isinstance(source, np.ndarray | Tensor) and source.ndim == 4:
        return _each(_picture, source)
    return _each(_picture, source if isinstance(source, list | tuple) else [source])


def _clips(source: Any) -> list[list[Picture]]:
    several = isinstance(source, np.ndarray | Tensor) and source.ndim == 5
    if isinstance(source, list | tuple) and source:
        first = source[0]
        several = isinstance(first, str | os.PathLike | list | tuple) or getattr(first, "ndim", 0) == 4
    return _each(_frames, source if several else [source])


def _frames(clip: Any) -> list[Picture]:
    """The frames of one video."""
    if isinstance(clip, str | os.PathLike):
        clip = read_video(clip)[0]
    if isinstance(clip, np.ndarray | Tensor) and clip.ndim != 4:
        raise ValueError(
            f"A video of shape {tuple(clip.shape)} is not understood: pass an array (frames, height, width, 3) or a tensor "
            "(frames, 3, height, width), with one more axis in front for several videos."
        )
    if not isinstance(clip, np.ndarray | Tensor | list | tuple):
        raise TypeError(f"A video must be a path, a list of frames, an array or a tensor, not {type(clip).__name__}.")
    return _each(_picture, clip)


def _each(read: Any, entries: Iterable[Any]) -> list[Any]:
    found = [read(entry) for entry in entries]
    if not found:
        raise ValueError("An empty list or array was passed: there is nothing to start from. Pass at least one picture.")
    return found


def _picture(source: Any) -> Picture:
    """One picture in one of the two forms."""
    if isinstance(source, str | os.PathLike):
        return _opened(Path(source))
    if isinstance(source, PIL.Image.Image):
        return _rgb(source)
    if isinstance(source, np.ndarray):
        return _from_tensor(torch.from_numpy(np.ascontiguousarray(source)), channels=-1)
    if isinstance(source, Tensor):
        return _from_tensor(source.detach().cpu(), channels=0)
    raise TypeError(f"A picture must be a path, a PIL image, an array or a tensor, not {type(source).__name__}.")


def _opened(path: Path) -> PIL.Image.Image:
    """The picture in a file, upright."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no image file {path}.")
    try:
        with PIL.Image.open(path) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except OSError as error:
        raise ValueError(f"{path} is not an image, or is damaged: {error}") from error


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """8-bit RGB; what is transparent becomes black, as what `fit="contain"` adds."""
    if image.mode[0] in "IF":
        raise ValueError(f"An image of mode {image.mode!r} has more than 8 bits per channel: convert it to RGB first.")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    return image.convert("RGB")


def _from_tensor(values: Tensor, channels: int) -> Picture:
    """A picture from bytes or from floats in [0, 1], with three channels on the given axis."""
    order = "(height, width, 3)" if channels else "(3, height, width)"
    if values.ndim != 3 or values.shape[channels] != 3 or not values.numel():
        raise ValueError(f"A picture of shape {tuple(values.shape)} is not understood: its shape must be {order}, in RGB.")
    values = values.movedim(channels, 0)
    if values.dtype == torch.uint8:
        return PIL.Image.fromarray(values.movedim(0, -1).contiguous().numpy())
    if not values.is_floating_point():
        raise ValueError(f"A picture of {values.dtype} is not understood: pass bytes (uint8), or floats in [0, 1].")
    values = values.float()
    if not values.isfinite().all():
        raise ValueError("A picture contains NaN or infinity.")
    low, high = values.min().item(), values.max().item()
    if low < -TOLERANCE or high > 1 + TOLERANCE:
        raise ValueError(
            f"A picture has values from {low:.3g} to {high:.3g}; floats must lie in [0, 1]. Divide bytes by 255, and map [-1, 1] "
            "by (x + 1) / 2."
        )
    return values


# --- to the size that is wanted ---------------------------------------------------------------------------------------


def _fitted(pictures: Sequence[Picture], target: Size, fit: Fit) -> Tensor:
    """Pictures of any size as (N, 3, H, W) in [-1, 1]."""
    if fit not in get_args(Fit):
        raise ValueError(f"fit={fit!r} is unknown: use one of {', '.join(get_args(Fit))}.")
    for size in dict.fromkeys(map(_size, pictures)):  # each size is reported once
        _report(size, target, fit)
    return 2 * torch.stack([_centred(_scaled(picture, _scaled_size(_size(picture), target, fit), fit), target) for picture in pictures]) - 1


def _size(picture: Picture) -> Size:
    return (picture.height, picture.width) if isinstance(picture, PIL.Image.Image) else (picture.shape[1], picture.shape[2])


def _scaled_size(size: Size, target: Size, fit: Fit) -> Size:
    """Size (H, W) before cropping or padding: one side is the target's, the other at least (cover) or at most (contain)."""
    if fit == "stretch":
        return target
    beyond = max if fit == "cover" else min
    scale = beyond(wanted / there for wanted, there in zip(target, size, strict=True))
    height, width = (beyond(wanted, max(1, round(there * scale))) for wanted, there in zip(target, size, strict=True))
    return height, width


def _scaled(picture: Picture, size: Size, fit: Fit) -> Tensor:
    """A picture resampled to `size`, as floats (3, H, W) in [0, 1]."""
    if isinstance(picture, PIL.Image.Image):
        scaled = picture.resize(size[::-1], PIL.Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 255).movedim(-1, 0)
    if picture.shape[1:] == size:
        return picture
    if fit == "stretch":
        return F.interpolate(picture[None], size)[0]
    return F.interpolate(picture[None], size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def _centred(picture: Tensor, target: Size) -> Tensor:
    """The middle of a picture (3, h, w) that is larger than (3, H, W), or black around one that is smaller."""
    top, left = ((wanted - there) // 2 for wanted, there in zip(target, picture.shape[1:], strict=True))
    bottom, right = target[0] - picture.shape[1] - top, target[1] - picture.shape[2] - left
    return F.pad(picture, (left, right, top, bottom))  # negative widths crop


def _report(size: Size, target: Size, fit: Fit) -> None:
    """Log what happens to pictures of this size (H, W)."""
    if size == target:
        return
    scaled, aspect = _scaled_size(size, target, fit), (size[1] / size[0]) / (target[1] / target[0])
    text = f"A picture of {size[0]}x{size[1]} (height x width) is scaled to {scaled[0]}x{scaled[1]}"
    if scaled != target:
        text += f" and {'cropped' if fit == 'cover' else 'padded with black'} to {target[0]}x{target[1]}"
    if fit == "stretch" and max(aspect, 1 / aspect) > NOTICEABLE:
        logger.warning(f"{text}: its content is distorted. Pass fit='cover' to crop it, or fit='contain' to pad it.")
    else:
        logger.info(f"{text}.")
