"""A quick look at latents without the VAE: a linear map from the channels of a latent to the mean colour of the pixels behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Geometry
from ..video_io import contact_sheet, write_image

__all__ = ["Preview", "PreviewMap", "drawn_clips", "fit_to_vae", "mean_colours"]

_SHEETS = 10  # updates of the picture in one denoise loop


@dataclass(frozen=True)
class PreviewMap:
    """colour = weight z + bias: RGB in [-1, 1] of one latent z, as the VAE encodes it (unscaled). weight (3, C), bias (3,)."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, latents: Tensor, colours: Tensor) -> PreviewMap:
        """The least-squares map between latents (B, C, f, h, w) and the `mean_colours` (B, 3, f, h, w) of their video."""
        inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], dim=1)
        rows, targets = (tensor.float().movedim(1, -1).flatten(0, -2) for tensor in (inputs, colours))  # (B f h w, C + 1), (B f h w, 3)
        solution = torch.linalg.lstsq(rows, targets).solution
        return cls(weight=solution[:-1].T.contiguous(), bias=solution[-1])

    @classmethod
    def from_json(cls, content: Mapping[str, Sequence[Any]]) -> PreviewMap:
        """The inverse of `to_json`. Raises ValueError for anything else."""
        try:
            weight, bias = (torch.tensor(content[name], dtype=torch.float32) for name in ("weight", "bias"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"a preview map holds numbers under the keys weight and bias, not {content!r:.80}: {error}.") from error
        if weight.ndim != 2 or len(weight) != 3 or bias.shape != (3,):
            raise ValueError(f"a preview map has weight (3, channels) and bias (3,), not {tuple(weight.shape)} and {tuple(bias.shape)}.")
        return cls(weight, bias)

    def to_json(self) -> dict[str, Any]:
        """Numbers for a JSON file, to four decimals: finer than the eye."""
        return {
            "weight": [[round(value, 4) for value in row] for row in self.weight.tolist()],
            "bias": [round(b, 4) for b in self.bias.tolist()],
        }

    def __call__(self, latents: Tensor) -> Tensor:
        """Colours (B, 3, f, h, w) in about [-1, 1] of unscaled latents (B, C, f, h, w)."""
        bias = self.bias[:, None, None, None]
        return torch.einsum("rc,bcfhw->brfhw", self.weight, latents.float().cpu()) + bias


def mean_colours(video: Tensor, geometry: Geometry) -> Tensor:
    """Mean of the pixels that each latent stands for: video (B, 3, F, H, W) to (B, 3, f, h, w); the first frame has latents of its own."""
    ratio = geometry.spatial_ratio
    first = F.avg_pool3d(video[:, :, :1], (1, ratio, ratio))
    return torch.cat([first, F.avg_pool3d(video[:, :, 1:], (geometry.temporal_ratio, ratio, ratio))], dim=2)


def drawn_clips(geometry: Geometry, seed: int = 0) -> Tensor:
    """Clips (B, 3, F, H, W) in [-1, 1] of smooth random colours that drift and fade, to fit a map on where there are no others."""
    generator, size = torch.Generator().manual_seed(seed), geometry.pixel_size(8, 8)
    shape = (1 + geometry.frame_step, *size)
    grids = [torch.randn((1, 3, 3, cells, cells), generator=generator) for cells in (2, 3, 4, 6)]
    fields = [F.interpolate(grid, shape, mode="trilinear", align_corners=True) for grid in grids]
    return torch.cat(fields).clamp(-1, 1)


@torch.no_grad()
def fit_to_vae(vae: Any, geometry: Geometry) -> PreviewMap:
    """The map of any VAE, fitted to how it encodes `drawn_clips`; takes one encoding of four clips of 64x64 pixels."""
    clips = drawn_clips(geometry)
    latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode()
    return PreviewMap.fit(latents.float().cpu(), mean_colours(clips, geometry))


class Preview:
    """A contact sheet on disk that shows the video in the making: the clean latents that each step predicts, through a map.

    Args:
        path: PNG file, written about ten times in a loop.
        colours: the map.
        geometry: size rules of the model.
        scaling_factor: what the VAE's latents are multiplied with for the transformer.
    """

    def __init__(self, path: Path, colours: PreviewMap, geometry: Geometry, scaling_factor: float) -> None:
        self.path = path
        self._colours, self._geometry, self._scaling = colours, geometry, scaling_factor

    def after_step(self, pipe: Any, index: int, latents: Tensor) -> None:
        """Write the sheet when it is due. Where the scheduler keeps no prediction of the clean latents, the noisy ones are shown."""
        steps = pipe.num_timesteps
        if index % max(1, steps // _SHEETS) and index + 1 < steps:
            return
        history = pipe.scheduler.history() if hasattr(pipe.scheduler, "history") else {}
        clean = history.get("previous_clean", latents)
        write_image(self.path, contact_sheet(self.frames(clean), labels=[f"step {index + 1} of {steps}"]))

    def frames(self, latents: Tensor) -> np.ndarray:
        """Bytes (f, H, W, 3): one picture for each latent frame of the first video in (B, f, C, h, w), in the size of the video."""
        colours = self._colours(latents[:1].transpose(1, 2) / self._scaling)[0].transpose(0, 1)  # f 3 h w
        pixels = F.interpolate(colours, scale_factor=self._geometry.spatial_ratio, mode="bilinear")
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()
