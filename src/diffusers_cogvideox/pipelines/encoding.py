"""From pixels to the latents that a call starts from, and from one source to the videos of several prompts."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .request import Request

__all__ = ["broadcast", "check_noise", "check_sources", "encode_sources", "encode_video"]

Generators = torch.Generator | list[torch.Generator] | None


def encode_video(vae: Any, video: Tensor, generator: Generators = None, *, sample: bool = True) -> Tensor:
    """Latents (B, f, C, h, w) of videos, in the layout of the denoise loop, not multiplied by the scaling factor.

    Videos are encoded one after the other: the memory of one, and the random numbers that each would get alone.

    Args:
        vae: 3D causal VAE, ours or diffusers'.
        video: (B, 3, F, H, W) in [-1, 1], on the device that the VAE runs on; cast to its dtype.
        generator: source of the random numbers, one for all videos or one for each.
        sample: draw from the posterior, as image- and video-to-video do; otherwise take its mean.

    Raises:
        ValueError: for another number of generators than videos.
    """
    generators = generator if isinstance(generator, list) else [generator] * len(video)
    if len(generators) != len(video):
        raise ValueError(f"{len(generators)} generators for {len(video)} videos: pass one for all, or one for each.")
    latents = []
    for clip, source in zip(video.to(vae.dtype).split(1), generators, strict=True):
        posterior = vae.encode(clip).latent_dist
        latents.append(posterior.sample(source) if sample else posterior.mode())
    return torch.cat(latents).transpose(1, 2)


def encode_sources(vae: Any, video: Tensor, request: Request, *, name: str, sample: bool = True, noise: float = 0.0) -> Tensor:
    """Unscaled latents (B, f, C, h, w) for the B videos of `request`, from one source for all or from one for each prompt.

    With one generator, videos of one source share its latents. With a generator for each video, each is encoded with its
    own random numbers, as if it were made alone.

    Args:
        vae, sample: as in `encode_video`.
        video: (1, 3, F, H, W) or (prompts, 3, F, H, W) in [-1, 1]; pictures are videos of one frame.
        request: number of prompts and videos, and the source of the random numbers.
        name: what the argument is called, for the error message.
        noise: standard deviation of Gaussian noise added to the pixels.

    Raises:
        ValueError: for another number of sources.
    """
    generator = request.generator if sample or noise else None
    if isinstance(generator, list):
        video = broadcast(video, request, name=name)
    if noise:
        video = video + noise * randn_tensor(video.shape, generator=generator, device=video.device, dtype=video.dtype)
    latents = encode_video(vae, video, generator, sample=sample)
    return latents if isinstance(generator, list) else broadcast(latents, request, name=name)


def broadcast(sources: Tensor, request: Request, *, name: str) -> Tensor:
    """Tensors (B, ...) for the B videos of `request`, from (1, ...) for all or (prompts, ...) for each prompt.

    Raises:
        ValueError: for another number of sources; `name` is what the argument is called.
    """
    return sources.repeat_interleave(check_sources(len(sources), request, name=name), dim=0)


def check_sources(sources: int, request: Request, *, name: str) -> int:
    """Return how many of the videos of `request` are made from each source.

    Raises:
        ValueError: unless there is one source for all, or one for each prompt.
    """
    prompts = request.inputs.count
    if sources not in (1, prompts):
        raise ValueError(
            f"{name}: {sources} were passed for {prompts} prompt(s). Pass one for all or one for each, and repeat the prompt where needed."
        )
    return request.count if sources == 1 else request.num_videos_per_prompt


def check_noise(image_noise: float) -> float:
    """Return the standard deviation of noise on pixels, or raise ValueError for one that is negative, infinite or NaN."""
    if not 0 <= image_noise < math.inf:
        raise ValueError(f"image_noise={image_noise} is not possible: it is a standard deviation, 0 or more.")
    return image_noise
