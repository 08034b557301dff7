"""What a pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
from diffusers.utils import BaseOutput
from torch import Tensor

from .decoding import FrameStream

__all__ = ["CogVideoXPipelineOutput"]


@dataclass
class CogVideoXPipelineOutput(BaseOutput):
    """Videos, one entry per prompt and video.

    `frames` is, by `output_type`: "pil" a list of B lists of F images; "np" an array (B, F, H, W, 3) and "pt" a tensor
    (B, F, 3, H, W) on the CPU, both in [0, 1]; "stream" a list of B iterables of uint8 chunks (F', H, W, 3), which `write_video`
    takes; "latent" the latents (B, f, C, h, w).
    """

    frames: Tensor | np.ndarray | list[list[PIL.Image.Image]] | list[FrameStream]
