"""Training the VAE: rendered clips in, reconstruction out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.moving_shapes import MovingShapes
from ..models.autoencoder import AutoencoderKLCogVideoX
from .config import TrainConfig
from .latents import clips_of, encode_clips, latent_statistics
from .objectives import VAEObjective
from .processes import ALONE, Share
from .start import start_model

__all__ = ["VAETask"]

_STATISTICS_CLIPS = 64


def use_channels_last(model: nn.Module) -> None:
    """Store convolution weights channels-last; 4-D and 5-D weights need different formats."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in model.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.to(memory_format=formats[parameter.ndim])


class VAETask:
    """Reconstruction of rendered clips, whole or in random square crops."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        vae = start_model(AutoencoderKLCogVideoX, config)
        if config.channels_last:
            use_channels_last(vae)
        self.objective = VAEObjective(vae, **config.objective_options(kl_weight=2e-4, l1_weight=1.0))

    def batch(self, step: int, share: Share = ALONE) -> dict[str, Any]:
        """{"video": (B, 3, F, H, W)}: this share of optimiser step `step`."""
        config, stage = self.config, self.config.stage_at(step)
        data = config.data
        world = clips_of(data, stage.frames)
        # Every step has indices of its own, whatever the batch sizes of the stages.
        start, part = step * max(s.batch_size for s in config.stages), share.of(stage.batch_size)
        videos, _, _ = world.batch(start + part.start, part.stop - part.start)
        if stage.crop is not None:
            corners = np.random.default_rng((data.seed, step)).random((stage.batch_size, 2))
            videos = _crops(videos, stage.crop, corners[part])
        video = torch.from_numpy(np.ascontiguousarray(videos)).movedim(-1, 1)
        return {"video": video.to(memory_format=torch.channels_last_3d) if config.channels_last else video.contiguous()}

    def save(self, folder: Path) -> None:
        """The VAE with the scaling factor of its own latents, and their statistics beside it; a frozen encoder's are those it came with."""
        vae = self.objective.model
        world = MovingShapes(self.config.data.seed, objects=self.config.data.objects)
        statistics = latent_statistics(encode_clips(vae.eval(), world, range(_STATISTICS_CLIPS)))
        if "encoder" not in self.config.frozen:
            vae.register_to_config(scaling_factor=round(statistics["scaling_factor"], 6))
        vae.save_pretrained(folder)
        (folder / "latent_statistics.json").write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf8")

    def metrics(self, batch: Mapping[str, Any], result: Mapping[str, Tensor]) -> dict[str, float]:  # noqa: ARG002
        """The parts of the loss, and PSNR in dB (range 2)."""
        parts = {name: float(result[name].detach()) for name in ("l1", "mse", "kl")}
        return parts | {"psnr": float(10 * torch.log10(4 / result["mse"].detach()))}


def _crops(videos: np.ndarray, side: int, corners: np.ndarray) -> np.ndarray:
    """A square of `side` pixels from every clip, its corner at the share (B, 2) of the room: (B, F, H, W, 3) -> (B, F, side, side, 3)."""
    places = (corners * (np.array(videos.shape[2:4]) - side + 1)).astype(int)
    return np.stack([video[:, y : y + side, x : x + side] for video, (y, x) in zip(videos, places, strict=True)])
