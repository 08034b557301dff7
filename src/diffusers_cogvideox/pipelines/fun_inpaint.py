"""Video from a text and parts of the video: first frame, last frame, or what a mask leaves, with the CogVideoX-Fun InP models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.layout import BLACK, inpaint_channels, kept_latents, masked
from ..tasks import check_task
from .base import CogVideoXPipelineBase
from .call import task_call
from .conditioning import Condition
from .encoding import broadcast, check_noise, check_sources, encode_sources, encode_video
from .framing import pad_video
from .fun_condition import fun_condition, lasting
from .fun_mask import frames_between, load_mask, window_anchors
from .inputs import Fit, load_image, load_video
from .output import CogVideoXPipelineOutput
from .request import Request

__all__ = ["CogVideoXFunInpaintPipeline"]

TRAINED_NOISE = 0.0563
"""Noise on kept pixels that VideoX-Fun samples with, for models trained with such noise."""


class CogVideoXFunInpaintPipeline(CogVideoXPipelineBase):
    """Image to video, interpolation and inpainting: loads CogVideoX-Fun InP, and models of 2C + 1 input channels like them.

    The extra channels are the mask, at the size of the latents, and the latents of the masked video, the mean of the VAE's
    posterior; `models.layout` says how they are made. Without pictures or video this is text to video.
    """

    @task_call(without=("num_frames",), num_frames="width")
    def __call__(
        self,
        request: Request,
        *,
        num_frames: int | None = None,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        mask_video: Any = None,
        image_noise: float | None = None,
        fit: Fit = "stretch",
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Make videos that contain given pictures, or the part of a video that a mask leaves.

        num_frames: any number; by default as trained, or as many as `video` has. A longer video is cut.
        image: the first frame: one for all prompts or one for each, as a path, PIL image, array (H, W, 3) or tensor
            (3, H, W) in [0, 1], or a list of such.
        last_image: the last frame, likewise. With both, what lies between is made. Models of the first generation know it from the masked
            video alone: at the size of the latents the mask of a single last frame is zero (`models.layout.kept_latents`), as it was in
            their training. Given as the last three frames of `video`, with a mask, it is marked there too.
        video: a video of which a part is kept: a path, a list of frames, an array (F, H, W, 3) or a tensor (F, 3, H, W) in
            [0, 1], or a list of such.
        mask_video: what of it is to be made, in white; as many frames as `video`, or one picture for all of them.
        image_noise: standard deviation of noise on what is kept, in [-1, 1] pixels: 0.0563 by default for models whose config
            has `add_noise_in_inpaint_model`, which were trained with some, and 0 for others.
        fit: how pictures of another shape are made to fit: "stretch", "cover" (crop the middle) or "contain" (pad with black).
        """
        check_task(self.transformer.config, "inpaint")
        noise = self._trained_noise() if image_noise is None else check_noise(image_noise)
        self.geometry.padded_size(request.height, request.width)  # raises before files are read
        if video is None and mask_video is None:
            request = request if num_frames is None else replace(request, num_frames=num_frames)
            clip, mask = self._from_pictures(request, image, last_image, fit)
        elif video is None or mask_video is None or image is not None or last_image is not None:
            raise ValueError(
                "video and mask_video belong together, and take the place of image and last_image: pass one pair or the other."
            )
        else:
            clip = load_video(video, request.height, request.width, fit)
            mask = load_mask(mask_video, request.height, request.width, clip.shape[2], fit)
            request = lasting(request, num_frames, clip.shape[2], name="video")
            clip, mask = (part[:, :, : request.num_frames] for part in (clip, mask))
        self._check_known(clip, mask, request, image_noise)
        windows = request.context is not None and request.context.frames < request.num_frames
        anchors = window_anchors(mask) if windows else 0

        def inpainted(_: Tensor, like: Tensor) -> Condition:
            start = fun_condition(self, request, like)
            return replace(start, extra=self._known_channels(clip, mask, request, noise, start.latents), anchors=anchors)

        return self.generate(request, inpainted)

    def _from_pictures(self, request: Request, image: Any, last_image: Any, fit: Fit) -> tuple[Tensor, Tensor]:
        """Video (B, 3, F, H, W) and mask (1, 1, F, H, W) of a request that knows its first or last frame, or neither."""
        request.check_size(self.geometry)
        if image is None and last_image is None and fit != "stretch":
            raise ValueError(f"fit={fit!r} has no effect without a picture or a video: leave it out.")
        size = request.height, request.width
        first, last = (None if picture is None else load_image(picture, *size, fit) for picture in (image, last_image))
        return frames_between(first, last, request.num_frames, *size)

    def _check_known(self, clip: Tensor, mask: Tensor, request: Request, image_noise: float | None) -> None:
        """Raise ValueError for a video and a mask that do not go with the prompts, or that the pipeline cannot encode."""
        for part, name in ((clip, "image or video"), (mask, "mask_video")):
            check_sources(len(part), request, name=name)
        if (mask < 0.5).any():
            self.check_component("vae")
        elif image_noise:
            raise ValueError(f"image_noise={image_noise} has no effect where nothing is kept: leave it out, or pass a picture.")

    def _trained_noise(self) -> float:
        return TRAINED_NOISE if self.transformer.config.get("add_noise_in_inpaint_model") else 0.0

    def _known_channels(self, clip: Tensor, mask: Tensor, request: Request, noise: float, latents: Tensor) -> Tensor:
        """Mask and masked video as channels (B, f, 1 + C, h, w) beside the latents (B, f, C, h, w).

        Args:
            clip: (1 or prompts, 3, F, H, W).
            mask: (1 or prompts, 1, F, H, W).
            request: number of prompts and videos, source of the noise.
            noise: its standard deviation.
            latents: for their shape, dtype and device.
        """
        batch, frames, channels, *size = latents.shape
        if not (mask < 0.5).any():
            return latents.new_zeros(batch, frames, 1 + channels, *size)
        clip, mask = (pad_video(part, self.geometry, whole_patches=True).to(latents.device) for part in (clip, mask))
        shown = broadcast((mask < 0.5).flatten(1).any(dim=1).to(latents)[:, None, None, None, None], request, name="mask_video")
        kept = broadcast(kept_latents(mask, frames, *size), request, name="mask_video").to(latents)
        known = self._encode_known(masked(clip, mask), request, noise).to(latents) * self.vae_scaling_factor_image
        return inpaint_channels(kept, known, shown, self.vae_scaling_factor_image)

    def _encode_known(self, pixels: Tensor, request: Request, noise: float) -> Tensor:
        """Unscaled latents (B, f, C, h, w) of masked videos (1 or prompts, 3, F, H, W), with noise on all that is not black."""
        if not noise:
            return encode_sources(self.vae, pixels, request, name="image or video", sample=False)
        pixels = broadcast(pixels, request, name="image or video")
        eps = randn_tensor(pixels.shape, generator=request.generator, device=pixels.device, dtype=pixels.dtype)
        return encode_video(self.vae, torch.where(pixels == BLACK, pixels, pixels + noise * eps), sample=False)
