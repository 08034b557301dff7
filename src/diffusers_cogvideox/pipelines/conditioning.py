"""What the denoise loop starts from: one frozen value per call. Tasks differ only in how they make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..geometry import Geometry
from ..models.layout import front_padded
from .known import KnownFrames
from .request import Request

__all__ = ["Condition", "noise_condition", "starting_noise", "video_condition"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Start of one denoise loop, for B videos of F latent frames (padding included).

    `latents` (B, F, C, H, W) is pure noise, or a noised video when the loop starts late; `extra` (B, F, C', H, W) joins
    the latents on the channel axis at every step (an image, a mask, a control video), and is the same for both halves of
    the guidance; in steps outside `extra_steps`, counted from the start of the loop, zeros take its place. The loop runs from
    `first_step` of the timesteps. `ofs` is the extra embedding of CogVideoX 1.5 I2V. The first `padding` frames, and all that
    follow those of the video, exist only because the patch size asks for them, and are dropped from the result. `known` frames
    at the beginning are kept as they are. The `anchors` first frames hold an image that the whole video depends on: context windows
    keep them (`windows.Windows`).
    """

    latents: Tensor
    extra: Tensor | None = None
    extra_steps: range | None = None
    first_step: int = 0
    ofs: float | None = None
    padding: int = 0
    known: KnownFrames | None = None
    anchors: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError when `extra` does not fit `latents`."""
        if self.extra is None:
            return
        latents, extra = self.latents.shape, self.extra.shape
        if (*extra[:2], *extra[3:]) != (*latents[:2], *latents[3:]):
            raise ValueError(f"extra channels {tuple(extra)} do not fit latents {tuple(latents)}: only the channel axis may differ.")

    def hold(self, latents: Tensor, timestep: Tensor | None) -> Tensor:
        """`latents` (B, F, C, H, W) with the known frames put back, at the noise of `timestep`, or clean for None."""
        return latents if self.known is None else self.known.put_back(latents, timestep)

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        """`latents` (B, F, C, H, W) with the extra channels of one step of the loop behind: (B, F, C + C', H, W)."""
        if self.extra is None:
            return latents
        extra = self.extra.to(latents)
        shown = self.extra_steps is None or step in self.extra_steps
        return torch.cat([latents, extra if shown else torch.zeros_like(extra)], dim=2)


def starting_noise(request: Request, geometry: Geometry, channels: int, like: Tensor) -> tuple[Tensor, int]:
    """Unit noise (B, F, C, H, W) for the videos of `request`, or the latents it brings, and how many of the frames are padding in front.

    Args:
        request: number, length and size of the videos, and the noise, with F including the padding frames, or its source.
        geometry: size rules of the model.
        channels: latent channels C.
        like: a tensor of the dtype and on the device that the latents shall have.

    Raises:
        ValueError: for latents of another shape.
    """
    frames, *size = geometry.latent_shape(request.num_frames, request.height, request.width)
    padding = geometry.front_padding(frames)
    latents, shape = request.latents, (request.count, padding + frames, channels, *size)
    if latents is None:
        latents = randn_tensor(shape, generator=request.generator, device=like.device, dtype=like.dtype)
    elif tuple(latents.shape) != shape:
        raise ValueError(
            f"latents have shape {tuple(latents.shape)}, but {request.count} video(s) of {request.num_frames} frames of "
            f"{request.height}x{request.width} need {shape}: (videos, latent frames, channels, height, width)"
            + (f", {padding} of the latent frames as padding." if padding else ".")
        )
    return latents.to(like), padding


def noise_condition(request: Request, geometry: Geometry, channels: int, scheduler: Any, like: Tensor) -> Condition:
    """The text-to-video condition: noise at the scale that `scheduler` starts from. Arguments as in `starting_noise`."""
    noise, padding = starting_noise(request, geometry, channels, like)
    return Condition(latents=noise * scheduler.init_noise_sigma, padding=padding)


def video_condition(clean: Tensor, request: Request, geometry: Geometry, scheduler: Any, timesteps: Tensor, first_step: int) -> Condition:
    """The video-to-video condition: a video with the noise of the timestep that the loop starts at.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps: SDEdit (arXiv 2108.01073), section 3. Padding frames repeat the first latent
    frame, as in the training of CogVideoX 1.5.

    Args:
        clean: latents of the videos (B, f, C, h, w), scaled, without padding frames.
        request: source of the noise.
        geometry: size rules of the model.
        scheduler: for its `add_noise`.
        timesteps: the scheduler's grid (N,).
        first_step: position on the grid where the loop starts.
    """
    noise, padding = starting_noise(request, geometry, clean.shape[2], clean)
    latents = scheduler.add_noise(front_padded(clean, padding), noise, timesteps[first_step].expand(len(clean)))
    return Condition(latents=latents, first_step=first_step, padding=padding)
