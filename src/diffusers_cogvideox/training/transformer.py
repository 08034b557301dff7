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
from ..models.layout import image_channels
from ..models.rope import rope_for
from ..models.transformer import CogVideoXTransformer3DModel, initialize_for_training
from ..presets import PRESETS
from ..schedulers.scheduler import CogVideoXScheduler
from ..tasks import tasks_of
from .config import TrainConfig
from .latents import clips_of, encode_clips
from .objectives import DiffusionObjective, loss_by_bucket, stratified_timesteps
from .processes import ALONE, Share, gather_parts, process_state
from .start import check_folders, start_model
from .text_encoder import tokenize
from .vae import use_channels_last

__all__ = ["TransformerTask"]

logger = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Clips:
    """Encoded clips of one length: latents (N, F, C, H, W) in half precision, scaled; clip i is sample i of `world`.

    `images` (N, 1, C, H, W) are their first frames, encoded as pictures, where the model is shown one.
    """

    world: MovingShapes
    latents: Tensor
    images: Tensor | None
    rotary: Rotary | None


class TransformerTask:
    """Latents of rendered clips, noised; their captions; v-prediction. A model with twice the channels also sees the first frame."""

    def __init__(self, config: TrainConfig) -> None:
        if config.vae is None or config.text_encoder is None or config.data.clips is None:
            raise ValueError("a transformer run needs vae, text_encoder (folders) and data.clips (a number)")
        check_folders(config)
        self.config = config
        self.tokenizer = T5Tokenizer.from_pretrained(config.text_encoder)
        self.text_encoder = T5EncoderModel.from_pretrained(config.text_encoder).eval().requires_grad_(False)
        scheduler = CogVideoXScheduler(**PRESETS["5b"].scheduler | config.scheduler)
        self.train_timesteps = scheduler.config.num_train_timesteps
        self.transformer = transformer = start_model(CogVideoXTransformer3DModel, config, initialize_for_training)
        self.shows_image = _shows_image(transformer.config)
        if self.shows_image and config.evaluate_prompts:
            raise ValueError("evaluate_prompts measures text-to-video models, and this one is shown an image: leave it out.")
        self.clips = self._encode(config.vae, transformer.config)
        options = config.objective_options(text_dropout=0.1, image_dropout=0.05, balance=0.0)
        self.text_dropout, self.image_dropout = options["text_dropout"], options["image_dropout"]
        self.objective = DiffusionObjective(transformer, scheduler.alphas_cumprod, options["balance"])

    def _encode(self, folder: str, model: Mapping[str, Any]) -> dict[int, _Clips]:
        """Clips of every length that the stages ask for, scaled; encoded once, by all processes together, and kept in the run folder."""
        vae = AutoencoderKLCogVideoX.from_pretrained(folder).eval()
        if self.config.mixed_precision == "bf16":
            use_channels_last(vae)  # convolutions in bfloat16 are several times as fast then
        clips = {}
        for frames in sorted({stage.frames for stage in self.config.stages}):
            world = clips_of(self.config.data, frames)
            latents = self._encoded(vae, world, f"latents_{frames}")
            images = self._encoded(vae, world, f"images_{frames}", first_frame=True) if self.shows_image else None
            clips[frames] = _Clips(world, latents, images, rope_for(model, latents.shape[1], *latents.shape[-2:]))
        return clips

    def _encoded(self, vae: AutoencoderKLCogVideoX, world: MovingShapes, name: str, **what: bool) -> Tensor:
        """Scaled latents of all clips from the run folder's file of this name, which is made when it is absent."""
        path, share, count = Path(self.config.output) / f"{name}.safetensors", Share.current(), self.config.data.clips or 0
        if not path.exists():
            part, bf16 = share.of(count), self.config.mixed_precision == "bf16"
            latents = gather_parts(encode_clips(vae, world, range(part.start, part.stop), bf16=bf16, **what), share)
            if share.rank == 0:
                with atomic_path(path) as partial:
                    save_file({"latents": latents}, partial)
            process_state().wait_for_everyone()
        return load_file(path)["latents"] * vae.config["scaling_factor"]

    def batch(self, step: int, share: Share = ALONE) -> dict[str, Any]:
        """The diffusion objective's arguments: this share of optimiser step `step`."""
        config, stage = self.config, self.config.stage_at(step)
        clips, rng, part = (
            self.clips[stage.frames],
            np.random.default_rng((config.seed, config.data.seed, step)),
            share.of(stage.batch_size),
        )
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        index = rng.integers(len(clips.latents), size=stage.batch_size)
        captions = [clips.world.describe(int(i), rng)[1] if rng.random() >= self.text_dropout else "" for i in index]
        chosen = torch.from_numpy(index)
        timesteps = stratified_timesteps(stage.batch_size, self.train_timesteps, generator)
        noise = torch.randn((stage.batch_size, *clips.latents.shape[1:]), generator=generator)
        shown = torch.from_numpy(rng.random(stage.batch_size) >= self.image_dropout)[part, None, None, None, None]
        return {
            "latents": clips.latents[chosen[part]].float(),
            "text": self._embed(captions[part]),
            "timesteps": timesteps[part],
            "noise": noise[part],
            "rotary": clips.rotary,
            "extra": None if clips.images is None else image_channels(clips.images[chosen[part]].float() * shown, noise.shape[1]),
        }

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Tensor:
        """Text embeddings (B, L, D); a dropped caption is the empty string, as the pipeline's unconditional half."""
        length = self.transformer.config["max_text_seq_length"]
        return self.text_encoder(tokenize(self.tokenizer, captions, length)).last_hidden_state

    def save(self, folder: Path) -> None:
        """The transformer."""
        self.transformer.save_pretrained(folder)

    def metrics(self, batch: Mapping[str, Any], result: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss by timestep range, which the objective takes note of."""
        per_sample, timesteps = result["per_sample"].detach(), batch["timesteps"]
        self.objective.observe(per_sample, timesteps.to(per_sample.device))
        return dict(loss_by_bucket(per_sample, timesteps, self.train_timesteps))


def _shows_image(model: Mapping[str, Any]) -> bool:
    """Whether a transformer of this config reads an image beside the latents. Raises ValueError for models of other tasks."""
    tasks = tasks_of(model)
    if not tasks & {"text", "image"}:
        raise ValueError(
            f"in_channels={model['in_channels']} with out_channels={model['out_channels']} cannot be trained here: as many is text to "
            "video, twice as many is image to video."
        )
    return "image" in tasks
