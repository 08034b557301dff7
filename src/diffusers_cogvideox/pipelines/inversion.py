"""DDIM inversion: the noise from which the sampler makes a given video again, found by walking its steps backwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.layout import front_padded
from ..tasks import check_task
from .call import task_call
from .conditioning import Condition
from .encoding import encode_sources
from .framing import pad_video
from .inputs import Fit, load_video
from .request import Request
from .sampling import Stepper

__all__ = ["InverseStepper", "Inversion", "InversionMixin", "check_invertible", "invertible_timesteps"]

# What has no meaning when nothing is drawn and nothing is shown, or would not be undone by the same argument of a later call.
_WITHOUT = (
    "num_frames",
    "guidance_scale",
    "use_dynamic_cfg",
    "guidance_interval",
    "skip_layers",
    "num_videos_per_prompt",
    "eta",
    "generator",
    "output_type",
    "return_dict",
    "journal",
    "guider",
)


class Inversion(NamedTuple):
    """Where a call has to start to make a video again: `pipe(prompt, latents=..., timesteps=..., guidance_scale=...)`.

    latents: (B, F, C, h, w), padding frames included.
    timesteps: falling, without those at which nothing of a video is left.
    """

    latents: Tensor
    timesteps: list[int]


class InversionMixin:
    """Gives a pipeline `invert`, which models that read more than noise refuse."""

    @task_call(without=_WITHOUT)
    def invert(
        self: Any, request: Request, *, video: Any = None, guidance_scale: float = 1.0, iterations: int = 3, fit: Fit = "stretch"
    ) -> Inversion:
        """Find the latents from which the same prompts, timesteps and guidance make given videos again.

        video: one video for all prompts or one for each: a path, a list of frames, an array (F, H, W, 3) or a tensor
            (F, 3, H, W) in [0, 1], or a list of such; or instead of it
        latents: clean, scaled latents (B, F, C, h, w) of the videos, without padding frames, as `output_type="latent"` gives.
        guidance_scale: that of the later call. Without guidance (1) the way back is the most exact.
        iterations: predictions for each step; 1 is the usual inversion, more of them come closer to the exact one.
        fit: how pictures of another shape are made to fit: "stretch", "cover" (crop the middle) or "contain" (pad with black).

        A `context` must be that of the later call; the windows of a timestep are the same on both ways, also where they move.
        """
        check_task(self.transformer.config, "text")
        if request.context is not None and request.context.shuffle_noise:
            raise ValueError("shuffle_noise=True has no meaning where nothing starts from noise: leave it out, in the later call too.")
        if iterations < 1:
            raise ValueError(f"iterations={iterations} is not possible: each step needs at least 1.")
        if (video is None) == (request.latents is None):
            raise ValueError("Pass exactly one of video and latents.")
        if video is None and fit != "stretch":
            raise ValueError(f"fit={fit!r} has no effect on latents: it is for videos.")
        if video is not None:
            self.check_component("vae", "load it with one, or pass latents")
        check_invertible(self.scheduler)
        clip = None if video is None else load_video(video, request.height, request.width, fit)
        request = replace(_of_length(self, request, clip), guidance_scale=guidance_scale)

        def clean(_: Tensor, like: Tensor) -> Condition:
            latents: Any = request.latents
            if clip is not None:
                pixels = pad_video(clip, self.geometry).to(like.device)
                latents = encode_sources(self.vae, pixels, request, name="video", sample=False) * self.vae_scaling_factor_image
            padding = self.geometry.front_padding(latents.shape[1])
            return Condition(latents=front_padded(latents, padding).to(like), padding=padding)

        def backwards(_: Tensor) -> tuple[Tensor, Stepper]:
            rising = torch.tensor(invertible_timesteps(self.scheduler)[::-1], device=self.scheduler.timesteps.device)
            return rising.repeat_interleave(iterations), InverseStepper.of(self.scheduler)

        latents, _ = self.run_loop(request, clean, backwards)
        self.maybe_free_model_hooks()
        return Inversion(latents, invertible_timesteps(self.scheduler))


def _of_length(pipe: Any, request: Request, clip: Tensor | None) -> Request:
    """The request with the number of frames and the size of its source, `clip` (B, 3, F, H, W) or its own latents."""
    if clip is not None:
        return replace(request, num_frames=clip.shape[2])
    latents = request.latents
    if latents is None or latents.ndim != 5 or len(latents) != request.count or latents.shape[2] != pipe.latent_channels:
        shape = None if latents is None else tuple(latents.shape)
        raise ValueError(f"latents of shape {shape} are not those of {request.count} video(s): pass ({request.count}, F, C, h, w).")
    height, width = pipe.geometry.pixel_size(*latents.shape[-2:])
    return replace(request, num_frames=pipe.geometry.frames(latents.shape[1]), height=height, width=width, output_type="latent")


def check_invertible(scheduler: Any) -> None:
    """Raise ValueError for a scheduler whose steps cannot be walked back, or that cannot start where inversion ends."""
    if getattr(scheduler, "algorithm_type", None) != "ddim" or scheduler.config["prediction_type"] != "v_prediction":
        raise ValueError(
            f"{type(scheduler).__name__} cannot be inverted: use diffusers_cogvideox.CogVideoXDDIMScheduler, whose steps draw no noise and "
            "which takes the timesteps that inversion ends with, for a model that predicts velocities."
        )


def invertible_timesteps(scheduler: Any) -> list[int]:
    """The scheduler's falling grid without timesteps at which nothing of a video is left (abar = 0, zero terminal SNR).

    There, the sampler makes of a noise what it would make of that noise for any video; a run that shall end at a certain one starts
    at the next timestep, from what inversion found.

    Raises:
        ValueError: when no timestep is left.
    """
    grid = scheduler.timesteps.tolist()
    left = [t for t in grid if scheduler.alphas_cumprod[t] > 0]
    if not left:
        raise ValueError(f"timesteps={grid} cannot be inverted: all of them are pure noise. Take more steps.")
    return left


class InverseStepper:
    r"""The inverse of a DDIM step, by fixed-point iteration.

    With alpha_t = cos(phi_t) and sigma_t = sin(phi_t), the DDIM step (arXiv 2010.02502, eq. 12) from t down to s is a rotation by
    delta = phi_t - phi_s of the pair of x and the velocity v (arXiv 2202.00512, appendix D):

        x_s = cos(delta) x_t - sin(delta) v(x_t, t)

    Its inverse is the solution of x_t = (x_s + sin(delta) v(x_t, t)) / cos(delta). Every call is one iteration of this equation: its
    latents are the guess of x_t that the velocity belongs to, and at the first call for a timestep they are x_s itself. One
    iteration is the usual DDIM inversion, which takes v(x_s, t) for v(x_t, t).

    Args:
        turns: delta in radians by timestep t.
    """

    def __init__(self, turns: Mapping[int, float]) -> None:
        self._turns = turns
        self._timestep: int | None = None
        self._start: Tensor | None = None  # x_s

    @classmethod
    def of(cls, scheduler: Any) -> InverseStepper:
        """The inverse of the steps that `scheduler` takes on its grid."""
        rising = invertible_timesteps(scheduler)[::-1]
        levels = torch.stack([torch.as_tensor(scheduler.final_alpha_cumprod), *scheduler.alphas_cumprod[rising]]).double()
        return cls(dict(zip(rising, levels.sqrt().acos().diff().tolist(), strict=True)))

    def __call__(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        """The next guess of x_t, (B, F, C, H, W) in float32, from the velocity at the guess `latents`."""
        if self._start is None or int(timestep) != self._timestep:
            self._timestep, self._start = int(timestep), latents
        turn = self._turns[int(timestep)]
        return (self._start.float() + math.sin(turn) * prediction) / math.cos(turn)
