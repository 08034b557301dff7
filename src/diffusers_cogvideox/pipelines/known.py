"""Frames that are known beforehand, put back into the latents at every step: the model invents the rest so that it fits them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["KnownFrames"]


@dataclass(frozen=True, kw_only=True)
class KnownFrames:
    """The first K latent frames of B videos, clean, and the noise that hides them while the loop runs.

    Before the step at timestep t they are replaced by a sample of q(x_t | x_0) = alpha_t x_0 + sigma_t eps, as in RePaint (Lugmayr et
    al., arXiv:2201.09865, algorithm 1, without its jumps back), but with one eps for all steps: the known frames then follow the path
    that DDIM would take to them. After the last step they are put back clean.

    Args:
        clean: (B, K, C, H, W), as the transformer sees latents.
        noise: eps, of the same shape.
        scheduler: the one that the loop runs on, for its `add_noise`.
    """

    clean: Tensor
    noise: Tensor
    scheduler: Any

    def __post_init__(self) -> None:
        """Raise ValueError when noise and frames are not of one shape."""
        if self.clean.shape != self.noise.shape:
            raise ValueError(f"known frames {tuple(self.clean.shape)} and their noise {tuple(self.noise.shape)} must have one shape.")

    def put_back(self, latents: Tensor, timestep: Tensor | None) -> Tensor:
        """Latents (B, F, C, H, W) with the first K frames replaced: noised to `timestep`, or clean for None."""
        known = self.clean if timestep is None else self.scheduler.add_noise(self.clean, self.noise, timestep.reshape(1))
        return torch.cat([known.to(latents), latents[:, known.shape[1] :]], dim=1)
