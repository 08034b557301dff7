"""What the denoise loop starts from: one frozen value per call. Tasks differ only in how they make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..geometry import Geometry
from .request import Request

__all__ = ["Condition", "noise_condition"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Start of one denoise loop, for B videos of F latent frames (padding included).

    `latents` (B, F, C, H, W) is pure noise, or a noised video when the loop starts late; `extra` (B, F, C', H, W) joins
    the latents on the channel axis at every step (an image, a mask, a control video), and is the same for both halves of
    the guidance. The loop runs from `first_step` of the timesteps. `ofs` is the extra embedding of CogVideoX 1.5 I2V.
    The first `padding` frames exist only because the patch size asks for them, and are dropped from the result.
    """

    latents: Tensor
    extra: Tensor | None = None
    first_step: int = 0
    ofs: float | None = None
    padding: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError when `extra` does not fit `latents`."""
        if self.extra is None:
            return
        latents, extra = self.latents.shape, self.extra.shape
        if (*extra[:2], *extra[3:]) != (*latents[:2], *latents[3:]):
            raise ValueError(f"extra channels {tuple(extra)} do not fit latents {tuple(latents)}: only the channel axis may differ.")

    def model_input(self, latents: Tensor) -> Tensor:
        """`latents` (B, F, C, H, W) with the extra channels behind: (B, F, C + C', H, W)."""
        return latents if self.extra is None else torch.cat([latents, self.extra.to(latents)], dim=2)


def noise_condition(request: Request, geometry: Geometry, channels: int, scheduler: Any, like: Tensor) -> Condition:
    """The text-to-video condition: noise for the videos of `request`, at the scale that `scheduler` starts from.

    Args:
        request: number, length and size of the videos, and the noise, (B, F, C, H, W) with F including the padding frames, or its source.
        geometry: size rules of the model.
        channels: latent channels C.
        scheduler: for its `init_noise_sigma`.
        like: a tensor of the dtype and on the device that the latents shall have.

    Raises:
        ValueError: for latents of another shape.
    """
    frames = geometry.latent_frames(request.num_frames)
    padding = geometry.front_padding(frames)
    latents, shape = request.latents, (request.count, padding + frames, channels, *geometry.latent_size(request.height, request.width))
    if latents is None:
        latents = randn_tensor(shape, generator=request.generator, device=like.device, dtype=like.dtype)
    elif tuple(latents.shape) != shape:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, but {request.count} video(s) of {request.num_frames} frames of "
            f"{request.height}x{request.width} need {shape}: (videos, latent frames, channels, height, width)"
            + (f", {padding} of the latent frames as padding." if padding else ".")
        )
    return Condition(latents=latents.to(like) * scheduler.init_noise_sigma, padding=padding)
