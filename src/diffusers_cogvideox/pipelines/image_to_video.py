"""Image to video: the first frame is given, and joins the noise as extra channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from ..models.layout import image_channels
from ..tasks import check_task
from .base import CogVideoXPipelineBase
from .call import FIRST, task_call
from .conditioning import Condition, noise_condition
from .encoding import check_noise, check_sources, encode_sources
from .framing import pad_video
from .inputs import Fit, load_image
from .output import CogVideoXPipelineOutput
from .request import Request

__all__ = ["CogVideoXImageToVideoPipeline", "ImageLatentScaling", "image_condition", "image_latent_factor"]

ImageLatentScaling = Literal["stock", "scaled", "raw"]
"""What an image's latents are multiplied with; see `CogVideoXImageToVideoPipeline`."""

OFS = 2.0
"""The only value of `ofs` that CogVideoX 1.5 image-to-video was trained with."""


class CogVideoXImageToVideoPipeline(CogVideoXPipelineBase):
    """Image to video: loads CogVideoX-5b-I2V and 1.5-5B-I2V, and models of 2C input channels that are trained like them.

    The image is encoded as a video of one frame. Its latents stand at the first latent frame of C extra channels that are zero
    elsewhere (CogVideoX, arXiv 2408.06072, appendix "Image To Video Model"); for 1.5 that is the frame which pads the video in front.
    """

    @task_call(image=FIRST)
    def __call__(
        self,
        request: Request,
        *,
        image: Any,
        fit: Fit = "stretch",
        image_latent_scaling: ImageLatentScaling = "stock",
        image_noise: float = 0.0,
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Make videos that start with a given picture.

        image: the first frame: one for all prompts or one for each, as a path, PIL image, array (H, W, 3) or tensor
            (3, H, W) in [0, 1], or a list of such.
        fit: how a picture of another shape is made to fit: "stretch", "cover" (crop the middle) or "contain" (pad with black).
        image_latent_scaling: what the latents of the image are multiplied with, s being the VAE's scaling factor: "scaled" is s
            (as CogVideoX-5b-I2V and the training of 1.5), "raw" is 1 (the original code's sampling of 1.5), "stock" is s, or
            1/s where the VAE's config has `invert_scale_latents` (what diffusers does for 1.5).
        image_noise: standard deviation of noise that is added to the picture, in [-1, 1] pixels. The models were trained with
            exp(N(-3, 0.5)), about 0.05, and released without it; some makes the video follow the picture less and move more.
        """
        check_task(self.transformer.config, "image")
        check_noise(image_noise)
        _check_scaling(image_latent_scaling)
        self.check_component("vae")
        request.check_size(self.geometry)  # before there are pictures of an impossible size
        picture = load_image(image, request.height, request.width, fit).unsqueeze(2)  # B 3 1 H W
        check_sources(len(picture), request, name="image")

        def from_image(_: Tensor, like: Tensor) -> Condition:
            return image_condition(self, picture, request, like, scaling=image_latent_scaling, noise=image_noise)

        return self.generate(request, from_image)


def image_condition(
    pipe: CogVideoXPipelineBase,
    picture: Tensor,
    request: Request,
    like: Tensor,
    *,
    scaling: ImageLatentScaling = "stock",
    noise: float = 0.0,
) -> Condition:
    """The image-to-video condition: noise, and the latents of the first frame in the extra channels.

    Args:
        pipe: for its VAE, scheduler and size rules.
        picture: (1 or prompts, 3, 1, H, W) in [-1, 1], of the size of `request`.
        request: number, length and size of the videos, and the source of the random numbers.
        like: a tensor of the dtype and on the device that the latents shall have.
        scaling: convention of the image's latents, see `CogVideoXImageToVideoPipeline`.
        noise: standard deviation of noise on the pixels.
    """
    pixels = pad_video(picture, pipe.geometry).to(like.device)
    first = encode_sources(pipe.vae, pixels, request, name="image", noise=noise)
    start = noise_condition(request, pipe.geometry, pipe.latent_channels, pipe.scheduler, like)
    image = first.to(like) * image_latent_factor(scaling, pipe.vae.config)
    return replace(
        start,
        extra=image_channels(image, start.latents.shape[1]),
        anchors=1,
        ofs=OFS if pipe.transformer.config.get("ofs_embed_dim") else None,
    )


def image_latent_factor(scaling: ImageLatentScaling, vae: Mapping[str, Any]) -> float:
    """What the latents of an image are multiplied with, for a VAE with this config."""
    if scaling == "raw":
        return 1.0
    return 1 / vae["scaling_factor"] if scaling == "stock" and vae.get("invert_scale_latents") else vae["scaling_factor"]


def _check_scaling(scaling: str) -> None:
    if scaling not in get_args(ImageLatentScaling):
        raise ValueError(f"image_latent_scaling={scaling!r} is unknown: use one of {', '.join(get_args(ImageLatentScaling))}.")
