"""Video continuation: the end of a video is known, the model invents what follows, window after window."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..models.layout import front_padded
from ..tasks import Task, check_task, tasks_of
from .base import CogVideoXPipelineBase
from .call import FIRST, task_call
from .conditioning import Condition, noise_condition
from .decoding import shown
from .encoding import broadcast, encode_video
from .framing import pad_video
from .image_to_video import image_condition
from .inputs import Fit, load_video
from .known import KnownFrames
from .output import CogVideoXPipelineOutput
from .prompts import PromptInputs
from .request import Request

__all__ = ["CogVideoXContinuationPipeline"]


class CogVideoXContinuationPipeline(CogVideoXPipelineBase):
    """Continuation with a text-to-video or an image-to-video model: any number of frames after those that are there.

    A window of the length that the model was trained for starts with the last frames of the video, whose latents are put back with the
    noise of every step (`KnownFrames`); what the model makes behind them is appended, and the next window starts from there. An
    image-to-video model gets the first of these frames as its image besides. The frames that were given stay as they are.
    """

    @task_call(without=("latents",), video=FIRST)
    def __call__(
        self, request: Request, *, video: Any, fit: Fit = "stretch", overlap_frames: int | None = None, window_frames: int | None = None
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Go on with videos; the result is the frames that were given (at the size asked for) and `num_frames` new ones.

        video: one video for all prompts or one for each: a path, a list of frames, an array (F, H, W, 3) or a tensor
            (F, 3, H, W) in [0, 1], or a list of such.
        fit: how pictures of another shape are made to fit: "stretch", "cover" (crop the middle) or "contain" (pad with black).
        overlap_frames: how many of the last frames a window starts with, 8k + 1; by default 9, and 1 for image-to-video models.
            More carry more of the motion over, and make each window add less.
        window_frames: frames that the model makes at once, the overlap included, 8k + 1; by default as trained. Of the last window, what
            is too much is cut off.
        """
        if request.inputs.starts:
            raise ValueError("prompts by frame are for a video in context windows; go on from one prompt after the other, call by call.")
        kind: Task = "image" if "image" in tasks_of(self.transformer.config) else "text"
        check_task(self.transformer.config, kind)
        overlap = overlap_frames if overlap_frames is not None else 1 if kind == "image" else self.geometry.frame_step + 1
        length = self.call_defaults()["num_frames"] if window_frames is None else window_frames
        window = replace(request, num_frames=length, return_dict=False)
        self.geometry.padded_frames(request.num_frames)
        self._check_window(window, overlap)
        clip = load_video(video, request.height, request.width, fit)
        if clip.shape[2] < overlap:
            raise ValueError(f"overlap_frames={overlap} is more than the {clip.shape[2]} frame(s) of the video: choose fewer.")
        frames = self._extend(broadcast(clip, request, name="video"), request.num_frames, self._with_embeddings(window), overlap)
        result = shown(self.video_processor, frames, request.output_type)
        return CogVideoXPipelineOutput(frames=result) if request.return_dict else (result,)

    def _check_window(self, window: Request, overlap: int) -> None:
        """Raise ValueError for a window that the model cannot make, or that leaves no room for new frames."""
        self.geometry.check_frames(window.num_frames, "window_frames")
        self.geometry.check_frames(overlap, "overlap_frames")
        if overlap >= window.num_frames:
            raise ValueError(f"overlap_frames={overlap} leaves nothing new in window_frames={window.num_frames}: choose fewer.")
        if window.output_type == "latent":
            raise ValueError("output_type='latent' is not possible: a continued video is put together from frames. Use 'pt'.")
        window.check_size(self.geometry)
        self._check_components(window)

    def _with_embeddings(self, window: Request) -> Request:
        """The same request with its texts encoded, once for all windows, and one prompt for each video."""
        positive, negative = self._embeddings(window)
        inputs = PromptInputs(prompt_embeds=positive, negative_prompt_embeds=negative)
        return replace(window, inputs=inputs, num_videos_per_prompt=1, zero_unconditional=False, output_type="pt")

    def _extend(self, clip: Tensor, count: int, window: Request, overlap: int) -> Tensor:
        """`clip` (B, 3, F, H, W) in [-1, 1] and `count` new frames; fewer when a callback interrupts."""
        wanted = clip.shape[2] + count
        while clip.shape[2] < wanted:
            known = clip[:, :, -overlap:]
            made = self.generate(window, partial(self._condition, known, window))[0]  # (B, F, 3, H, W) in [0, 1]
            new = 2 * made[:, overlap:].transpose(1, 2).to(clip) - 1
            clip = torch.cat([clip, new], dim=2)[:, :, :wanted]
            if self.interrupt:
                break
        return clip

    def _condition(self, known: Tensor, window: Request, _: Tensor, like: Tensor) -> Condition:
        """Noise whose first frames are held at `known` (B, 3, K, H, W); the padding frames of 1.5 repeat the first of them."""
        known = pad_video(known, self.geometry).to(like.device)
        if self.latent_channels == self.transformer.config.in_channels:
            start = noise_condition(window, self.geometry, self.latent_channels, self.scheduler, like)
        else:
            start = image_condition(self, known[:, :, :1], window, like)
        clean = encode_video(self.vae, known, sample=False).to(like) * self.vae_scaling_factor_image
        clean = front_padded(clean, start.padding)
        noise = start.latents[:, : clean.shape[1]] / self.scheduler.init_noise_sigma
        return replace(start, known=KnownFrames(clean=clean, noise=noise, scheduler=self.scheduler))
