"""Video from a text and a control video (edges, depth, poses), with the CogVideoX-Fun Control models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..tasks import check_task
from .base import CogVideoXPipelineBase
from .call import task_call
from .conditioning import Condition
from .encoding import broadcast, check_sources, encode_video
from .framing import pad_video
from .fun_condition import fun_condition, lasting
from .guidance import check_interval, steps_inside
from .inputs import Fit, load_video
from .output import CogVideoXPipelineOutput
from .request import Request

__all__ = ["CogVideoXFunControlPipeline"]


class CogVideoXFunControlPipeline(CogVideoXPipelineBase):
    """Controlled text to video: loads CogVideoX-Fun Control and Pose, and models of 2C input channels that are trained like them.

    The latents of the control video, the mean of the VAE's posterior for every frame, are C extra channels at every step.
    """

    @task_call(without=("num_frames",), control_video="negative_prompt", control_video_latents="latents")
    def __call__(
        self,
        request: Request,
        *,
        control_video: Any = None,
        control_video_latents: Tensor | None = None,
        num_frames: int | None = None,
        control_strength: float = 1.0,
        control_start: float = 0.0,
        control_end: float = 1.0,
        fit: Fit = "stretch",
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Make videos that follow a control video, with as many frames as it has.

        control_video: one for all prompts or one for each: a path, a list of frames, an array (F, H, W, 3) or a tensor
            (F, 3, H, W) in [0, 1], or a list of such.
        control_video_latents: in its place, what `encode_control_video` returns.
        num_frames: take only that many frames of the control video, from its beginning.
        control_strength: factor for the control channels; 0 turns control off.
        control_start, control_end: fractions of the steps between which the control is seen; outside it is zero.
        fit: how pictures of another shape are made to fit: "stretch", "cover" (crop the middle) or "contain" (pad with black).
        """
        check_task(self.transformer.config, "control")
        if not 0 <= control_strength < math.inf:
            raise ValueError(f"control_strength={control_strength} is not possible: it must be 0 or more.")
        check_interval((control_start, control_end), "(control_start, control_end)")
        source, there = self._control(control_video, control_video_latents, (request.height, request.width), fit)
        request = lasting(request, num_frames, there, name="control video")
        check_sources(len(source), request, name="control_video")

        def controlled(timesteps: Tensor, like: Tensor) -> Condition:
            start = fun_condition(self, request, like)
            control = source if control_video is None else self._encode_control(source[:, :, : request.num_frames])
            _check_latents(control, start.latents)
            extra = broadcast(control.to(like), request, name="control_video") * control_strength
            shown = steps_inside((control_start, control_end), len(timesteps), "(control_start, control_end)")
            return replace(start, extra=extra, extra_steps=shown)

        return self.generate(request, controlled)

    @torch.no_grad()
    def encode_control_video(self, control_video: Any, height: int | None = None, width: int | None = None, fit: Fit = "stretch") -> Tensor:
        """Control channels (B, f, C, h, w) of one or several videos, to be passed as `control_video_latents` any number of times.

        They are scaled for the transformer, and padded where frames or pixels do not fit the model. Arguments as in `__call__`.

        Raises:
            ValueError: without a vae, and as `__call__` for the video.
        """
        defaults = self.call_defaults()
        size = defaults["height"] if height is None else height, defaults["width"] if width is None else width
        return self._encode_control(self._load_control(control_video, size, fit))

    def _control(self, video: Any, latents: Tensor | None, size: tuple[int, int], fit: Fit) -> tuple[Tensor, int]:
        """The control video (B, 3, F, H, W), or the `latents` (B, f, C, h, w) in its place, and its number of frames."""
        if (video is None) == (latents is None):
            raise ValueError("Pass exactly one of control_video and control_video_latents.")
        if latents is None:
            clip = self._load_control(video, size, fit)
            return clip, clip.shape[2]
        if fit != "stretch":
            raise ValueError(f"fit={fit!r} has no effect on control_video_latents: pass it to encode_control_video.")
        if latents.ndim != 5:
            raise ValueError(
                f"control_video_latents must be of shape (videos, latent frames, channels, height, width), not {tuple(latents.shape)}."
            )
        return latents, self.geometry.unpadded_frames(latents.shape[1])

    def _load_control(self, video: Any, size: tuple[int, int], fit: Fit) -> Tensor:
        """Control videos (B, 3, F, H, W) that can be encoded."""
        self.check_component("vae", "load it with one, or pass control_video_latents")
        self.geometry.padded_size(*size)  # raises before files are read
        return load_video(video, *size, fit)

    def _encode_control(self, clip: Tensor) -> Tensor:
        """Scaled latents (B, f, C, h, w) of control videos (B, 3, F, H, W)."""
        pixels = pad_video(clip, self.geometry, whole_patches=True).to(self._execution_device)
        return encode_video(self.vae, pixels, sample=False) * self.vae_scaling_factor_image


def _check_latents(given: Tensor, noise: Tensor) -> None:
    """Raise ValueError when control channels are not of the shape of the noise (B, f, C, h, w), whose batch may be larger."""
    if given.shape[1:] != noise.shape[1:]:
        raise ValueError(
            f"control_video_latents have shape {tuple(given.shape)}, but a video of this length and size needs {tuple(noise.shape)}: "
            "(videos, latent frames, channels, height, width), with 1 for one control video for all. Make them with encode_control_video."
        )
