"""Training the transformer: clips encoded once, captions encoded as they come, the diffusion objective of the paper."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from ..data.moving_shapes import MovingShapes
from ..files import atomic_path
from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.rope import rope_for
from ..models.transformer import CogVideoXTransformer3DModel, initialize_for_training
from ..presets import PRESETS
from ..schedulers.scheduler import CogVideoXScheduler
from .config import DataOptions, TrainConfig
from .latents import encode_clips
from .objectives import DiffusionObjective, loss_by_bucket, stratified_timesteps
from .start import start_model
from .text_encoder import tokenize

__all__ = ["TransformerTask"]

logger = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Clips:
    """Encoded clips of one length: latents (N, F, C, H, W) in half precision; clip i is sample i of `world`."""

    world: MovingShapes
    latents: Tensor
    rotary: Rotary | None


class TransformerTask:
    """Latents of rendered clips, noised; their captions; v-prediction."""

    def __init__(self, config: TrainConfig) -> None:
        if config.vae is None or config.text_encoder is None or config.data.clips is None:
            raise ValueError("a transformer run needs vae, text_encoder (folders) and data.clips (a number)")
        self.config = config
        self.tokenizer = T5Tokenizer.from_pretrained(config.text_encoder)
        self.text_encoder = T5EncoderModel.from_pretrained(config.text_encoder).eval().requires_grad_(False)
        scheduler = CogVideoXScheduler(**PRESETS["5b"].scheduler | config.scheduler)
        self.train_timesteps = scheduler.config.num_train_timesteps
        self.transformer = transformer = start_model(CogVideoXTransformer3DModel, config, initialize_for_training)
        self.clips = self._encode(config.vae, transformer.config)
        self.text_dropout = config.objective_options(text_dropout=0.1)["text_dropout"]
        self.objective = DiffusionObjective(transformer, scheduler.alphas_cumprod)

    def _encode(self, folder: str, model: Mapping[str, Any]) -> dict[int, _Clips]:
        """Clips of every length that the stages ask for, scaled; encoded once and kept in the run folder."""
        vae = AutoencoderKLCogVideoX.from_pretrained(folder).eval()
        clips = {}
        for frames in sorted({stage.frames for stage in self.config.stages}):
            world = _world(self.config.data, frames)
            path = Path(self.config.output) / f"latents_{frames}.safetensors"
            if not path.exists():
                with atomic_path(path) as partial:
                    save_file({"latents": encode_clips(vae, world, self.config.data.clips or 0)}, partial)
            latents = load_file(path)["latents"] * vae.config.scaling_factor
            clips[frames] = _Clips(world, latents, rope_for(model, latents.shape[1], *latents.shape[-2:]))
        return clips

    def batch(self, step: int) -> dict[str, Any]:
        """The diffusion objective's arguments for optimiser step `step`."""
        config, stage = self.config, self.config.stage_at(step)
        clips, rng = self.clips[stage.frames], np.random.default_rng((config.seed, config.data.seed, step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        index = rng.integers(len(clips.latents), size=stage.batch_size)
        captions = [clips.world.describe(int(i), rng)[1] if rng.random() >= self.text_dropout else "" for i in index]
        latents = clips.latents[torch.from_numpy(index)].float()
        return {
            "latents": latents,
            "text": self._embed(captions),
            "timesteps": stratified_timesteps(stage.batch_size, self.train_timesteps, generator),
            "noise": torch.randn(latents.shape, generator=generator),
            "rotary": clips.rotary,
        }

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Tensor:
        """Text embeddings (B, L, D); a dropped caption is the empty string, as the pipeline's unconditional half."""
        length = self.config.model["max_text_seq_length"]
        return self.text_encoder(tokenize(self.tokenizer, captions, length)).last_hidden_state

    def save(self, folder: Path) -> None:
        """The transformer."""
        self.transformer.save_pretrained(folder)

    def metrics(self, batch: Mapping[str, Any], result: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss by timestep range."""
        return dict(loss_by_bucket(result["per_sample"].detach(), batch["timesteps"], self.train_timesteps))


def _world(data: DataOptions, frames: int) -> MovingShapes:
    return MovingShapes(data.seed, objects=data.objects, frames=frames, height=data.height, width=data.width)
