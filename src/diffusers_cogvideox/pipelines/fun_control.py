"""Video from a text and a control video (edges, depth, poses), with the CogVideoX-Fun Control models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .base import CogVideoXPipelineBase
from .call import task_call
from .conditioning import Condition
from .encoding import broadcast, encode_video
from .framing import pad_video
from .fun_condition import fun_condition, lasting, nominal_steps, shown_steps
from .inputs import Fit, load_video
from .output import CogVideoXPipelineOutput
from .request import Request
from .task import check_task

__all__ = ["CogVideoXFunControlPipeline"]


class CogVideoXFunControlPipeline(CogVideoXPipelineBase):
    """Controlled text to video: loads CogVideoX-Fun Control and Pose, and models of 2C input channels that are trained like them.

    The latents of the control video, the mean of the VAE's posterior for every frame, are C extra channels at every step.
    """

    model_cpu_offload_seq = "text_encoder->vae->transformer->vae"  # type: ignore[assignment]

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
        self.geometry.padded_size(request.height, request.width)  # raises before files are read
        if not 0 <= control_strength < math.inf:
            raise ValueError(f"control_strength={control_strength} is not possible: it must be 0 or more.")
        shown = shown_steps(control_start, control_end, nominal_steps(request, self.scheduler))
        there, channels = self._control(control_video, control_video_latents, (request.height, request.width), fit)
        request = lasting(request, num_frames, there, name="control video")

        def controlled(_: Tensor, like: Tensor) -> Condition:
            start, control = fun_condition(self, request, like), channels(request.num_frames)
            _check_latents(control, start.latents)
            extra = broadcast(control.to(like), request, name="control_video") * control_strength
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
        return self._encode_control(load_video(control_video, height or defaults["height"], width or defaults["width"], fit))

    def _control(self, video: Any, latents: Tensor | None, size: tuple[int, int], fit: Fit) -> tuple[int, Callable[[int], Tensor]]:
        """Frames of the control that was passed, and a function that gives the channels (B, f, C, h, w) of its first ones."""
        if (video is None) == (latents is None):
            raise ValueError("Pass exactly one of control_video and control_video_latents.")
        if latents is None:
            clip = load_video(video, *size, fit)
            return clip.shape[2], lambda frames: self._encode_control(clip[:, :, :frames])
        if fit != "stretch":
            raise ValueError(f"fit={fit!r} has no effect on control_video_latents: pass it to encode_control_video.")
        if latents.ndim != 5:
            raise ValueError(
                f"control_video_latents must be of shape (videos, latent frames, channels, height, width), not {tuple(latents.shape)}."
            )
        return self.geometry.unpadded_frames(latents.shape[1]), lambda _: latents

    def _encode_control(self, clip: Tensor) -> Tensor:
        """Scaled latents (B, f, C, h, w) of control videos (B, 3, F, H, W)."""
        if self.vae is None:
            raise ValueError("The pipeline has no vae to encode control_video with: load it with one, or pass control_video_latents.")
        pixels = pad_video(clip, self.geometry, whole_patches=True).to(self._execution_device)
        return encode_video(self.vae, pixels, sample=False) * self.vae_scaling_factor_image


def _check_latents(given: Tensor, noise: Tensor) -> None:
    """Raise ValueError when control channels are not of the shape of the noise (B, f, C, h, w), whose batch may be larger."""
    if given.shape[1:] != noise.shape[1:]:
        raise ValueError(
            f"control_video_latents have shape {tuple(given.shape)}, but a video of this length and size needs {tuple(noise.shape)}: "
            "(videos, latent frames, channels, height, width), with 1 for one control video for all. Make them with encode_control_video."
        )
