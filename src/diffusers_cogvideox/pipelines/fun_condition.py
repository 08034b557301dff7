"""What the CogVideoX-Fun models share: frames that the patch size asks for stand behind the video, not in front of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .conditioning import Condition, noise_condition
from .request import Request

__all__ = ["fun_condition", "lasting"]


def fun_condition(pipe: Any, request: Request, like: Tensor) -> Condition:
    """Noise for the videos of `request`, with the padding frames of 1.5 at the end.

    CogVideoX 1.5 joins two latent frames to a token, and its authors pad odd numbers of them in front. CogVideoX-Fun 1.5 was
    trained on clips cut to an even number, 22 latent frames of 85 pixel frames, so that the first latent frame holds the first
    pixel frame; its scripts lengthen a video that does not fit (VideoX-Fun, `examples/cogvideox_fun/predict_i2v.py`).
    81 frames, 21 latent frames and one more, are therefore what it was trained on.

    Args:
        pipe: the pipeline, for its sizes and scheduler.
        request: number, length and size of the videos, and the source of the noise.
        like: a tensor of the dtype and on the device that the latents shall have.
    """
    return replace(noise_condition(request, pipe.geometry, pipe.latent_channels, pipe.scheduler, like), padding=0)


def lasting(request: Request, num_frames: int | None, there: int, *, name: str) -> Request:
    """`request` for `num_frames` frames, by default as many as are `there` in the video that is called `name`.

    Raises:
        ValueError: for more frames than there are.
    """
    if num_frames is not None and num_frames > there:
        raise ValueError(
            f"num_frames={num_frames} is more than the {there} frames of the {name}: ask for at most {there}, or pass a longer one."
        )
    return replace(request, num_frames=there if num_frames is None else num_frames)
