"""Pictures and clips to start from: smooth, colourful, the same every time."""

import PIL.Image
import torch
from torch.nn.functional import interpolate

__all__ = ["clip", "images", "picture"]


def clip(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Whole bytes as floats in [0, 1], (F, 3, H, W): colours that drift."""
    coarse = torch.rand(1, 3, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    smooth = interpolate(coarse, (frames, height, width), mode="trilinear", align_corners=True)[0].transpose(0, 1)
    return (smooth * 255).round() / 255


def images(video: torch.Tensor) -> list[PIL.Image.Image]:
    """Frames (F, 3, H, W) as PIL images."""
    return [PIL.Image.fromarray(frame) for frame in (video * 255).round().byte().movedim(1, -1).numpy()]


def picture(height: int, width: int, seed: int = 0) -> PIL.Image.Image:
    """One frame of a clip."""
    return images(clip(1, height, width, seed))[0]
