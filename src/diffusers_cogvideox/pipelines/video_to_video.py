"""Video to video: the loop starts late, from a given video with noise on it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..tasks import check_task
from .base import CogVideoXPipelineBase
from .call import FIRST, task_call
from .conditioning import Condition, noise_condition, video_condition
from .encoding import check_sources, encode_sources
from .framing import pad_video
from .inputs import Fit, load_video
from .output import CogVideoXPipelineOutput
from .request import Request

__all__ = ["CogVideoXVideoToVideoPipeline", "skipped_steps"]


class CogVideoXVideoToVideoPipeline(CogVideoXPipelineBase):
    """Video to video with a text-to-video model (SDEdit, arXiv 2108.01073): loads CogVideoX-2b, -5b and 1.5-5B."""

    @task_call(without=("num_frames",), video=FIRST, strength="timesteps")
    def __call__(
        self, request: Request, *, video: Any = None, strength: float = 0.8, fit: Fit = "stretch"
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Remake videos as the prompts say, with as many frames as they have.

        video: one video for all prompts or one for each: a path, a list of frames, an array (F, H, W, 3) or a tensor
            (F, 3, H, W) in [0, 1], or a list of such.
        strength: share of the steps that is made, 0 to 1: how far the result may move away from the video.
        fit: how pictures of another shape are made to fit: "stretch", "cover" (crop the middle) or "contain" (pad with black).

        `latents`, in place of `video`, are the latents of a video that has the noise of the first step already.
        """
        check_task(self.transformer.config, "text")
        first_step = skipped_steps(strength, request.steps) * getattr(self.scheduler, "order", 1)
        if (video is None) == (request.latents is None):
            raise ValueError("Pass exactly one of video and latents.")
        if request.latents is not None:
            if fit != "stretch":
                raise ValueError(f"fit={fit!r} has no effect on latents: leave it out.")
            return self._from_latents(request, request.latents, first_step)
        self.check_component("vae")
        self.geometry.padded_size(request.height, request.width)  # refuses impossible sizes before there are pictures of them
        clip = load_video(video, request.height, request.width, fit)
        check_sources(len(clip), request, name="video")
        return self._from_video(request, clip, first_step)

    def _from_video(self, request: Request, clip: Tensor, first_step: int) -> CogVideoXPipelineOutput | tuple[Any]:
        """Remake `clip` (B, 3, F, H, W)."""
        request = replace(request, num_frames=clip.shape[2])

        def noised(timesteps: Tensor, like: Tensor) -> Condition:
            pixels = pad_video(clip, self.geometry).to(like.device)
            clean = encode_sources(self.vae, pixels, request, name="video").to(like) * self.vae_scaling_factor_image
            return video_condition(clean, request, self.geometry, self.scheduler, timesteps, first_step)

        return self.generate(request, noised)

    def _from_latents(self, request: Request, latents: Tensor, first_step: int) -> CogVideoXPipelineOutput | tuple[Any]:
        """Remake the video in `latents` (B, f, C, h, w), padding frames included, which are those of `request`."""
        if latents.ndim != 5:
            raise ValueError(f"latents must be of shape (videos, latent frames, channels, height, width), not {tuple(latents.shape)}.")
        request = replace(request, num_frames=self.geometry.unpadded_frames(latents.shape[1]))

        def given(_: Tensor, like: Tensor) -> Condition:
            start = noise_condition(request, self.geometry, self.latent_channels, self.scheduler, like)
            return replace(start, first_step=first_step)

        return self.generate(request, given)


def skipped_steps(strength: float, steps: int) -> int:
    """How many of `steps` are left out: all but the whole part of `strength * steps`.

    Raises:
        ValueError: for a strength outside 0 ... 1, and for one that leaves no step.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength={strength} is not possible: it must be between 0 (the video as it is) and 1 (from noise alone).")
    made = int(steps * strength)
    if made == 0:
        least = math.ceil(1000 / steps) / 1000
        raise ValueError(f"strength={strength} leaves none of {steps} steps: use at least {least}, or more steps.")
    return steps - made
