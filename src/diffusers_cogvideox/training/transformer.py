"""Training the transformer: clips encoded once, captions encoded as they come, the diffusion objective of the paper."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from ..data.moving_shapes import MovingShapes
from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.layout import frames_mask, image_channels, inpaint_channels, kept_latents
from ..models.rope import rope_for
from ..models.transformer import CogVideoXTransformer3DModel, initialize_for_training
from ..presets import PRESETS
from ..schedulers.scheduler import CogVideoXScheduler
from ..tasks import tasks_of
from .config import TrainConfig
from .latents import KEPT, clips_of, encode_clips, made_from, read_latents, write_latents
from .objectives import DiffusionObjective, loss_by_bucket, stratified_timesteps
from .processes import ALONE, Share, gather_parts, process_state
from .resume import check_resumed
from .start import check_folders, start_model
from .text_encoder import tokenize
from .vae import use_channels_last

__all__ = ["TransformerTask"]

logger = logging.getLogger(__name__)

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Clips:
    """Encoded clips of one length: latents (N, F, C, H, W) in half precision, scaled; clip i is sample i of `world`.

    `known` are the views (`latents.VIEWS`) of them that the model is shown, and `kept` the masks (1, F, 1, H, W) of those that have one.
    """

    world: MovingShapes
    latents: Tensor
    known: dict[str, Tensor]
    kept: dict[str, Tensor]
    rotary: Rotary | None


class TransformerTask:
    """Latents of rendered clips, noised; their captions; v-prediction.

    A model of twice the latents' channels, 2C, is also shown the first frame: image to video. One of 2C + 1 is shown a mask and the masked
    clip, as CogVideoX-Fun InP is: of each clip the first frame, or the first and the last (`objective.last_image`, one half), or
    nothing (`objective.image_dropout`).
    """

    def __init__(self, config: TrainConfig) -> None:
        if config.vae is None or config.text_encoder is None or config.data.clips is None:
            raise ValueError("a transformer run needs vae, text_encoder (folders) and data.clips (a number)")
        check_folders(config)
        check_resumed(config)  # before clips are encoded
        self.config = config
        self.tokenizer = T5Tokenizer.from_pretrained(config.text_encoder)
        self.text_encoder = T5EncoderModel.from_pretrained(config.text_encoder).eval().requires_grad_(False)
        scheduler = CogVideoXScheduler(**PRESETS["5b"].scheduler | config.scheduler)
        self.train_timesteps = scheduler.config.num_train_timesteps
        self.transformer = transformer = start_model(CogVideoXTransformer3DModel, config, initialize_for_training)
        self.views = _views(transformer.config)
        if self.views and config.evaluate_prompts:
            raise ValueError("evaluate_prompts measures text-to-video models, and this one is shown an image: leave it out.")
        self.options = config.objective_options(**_defaults(self.views))
        self.clips = self._encode(config.vae, transformer.config)
        self.objective = DiffusionObjective(transformer, scheduler.alphas_cumprod, self.options["balance"])

    def _encode(self, folder: str, model: Mapping[str, Any]) -> dict[int, _Clips]:
        """Clips of every length that the stages ask for; encoded once, by all processes together, and kept in the run folder."""
        vae = AutoencoderKLCogVideoX.from_pretrained(folder).eval()
        self.scaling_factor = float(vae.config["scaling_factor"])
        if self.config.mixed_precision == "bf16":
            use_channels_last(vae)  # convolutions in bfloat16 are several times as fast then
        clips = {}
        for frames in sorted({stage.frames for stage in self.config.stages}):
            world = clips_of(self.config.data, frames)
            latents, *known = (self._encoded(vae, world, view) for view in ("latents", *self.views))
            size = latents.shape[1], *latents.shape[-2:]
            masks = {view: frames_mask(frames, world.height, world.width, KEPT[view]) for view in self.views if view in KEPT}
            kept = {view: kept_latents(mask, *size) for view, mask in masks.items()}
            clips[frames] = _Clips(world, latents, dict(zip(self.views, known, strict=True)), kept, rope_for(model, *size))
        return clips

    def _encoded(self, vae: AutoencoderKLCogVideoX, world: MovingShapes, view: str) -> Tensor:
        """Latents (N, F, C, H, W) of one view of all clips, from the run folder's file, which is made when it is absent."""
        path, share, count = Path(self.config.output) / f"{view}_{world.frames}.safetensors", Share.current(), self.config.data.clips or 0
        bf16 = self.config.mixed_precision == "bf16"
        facts = made_from(self.config.data, world.frames, vae, bf16=bf16)
        if not path.exists():
            part = share.of(count)
            latents = gather_parts(encode_clips(vae, world, range(part.start, part.stop), view=view, bf16=bf16), share)
            if share.rank == 0:
                write_latents(path, latents, facts)
            process_state().wait_for_everyone()
        return read_latents(path, facts) * vae.config["scaling_factor"]

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
        captions = [clips.world.describe(int(i), rng)[1] if rng.random() >= self.options["text_dropout"] else "" for i in index]
        chosen = torch.from_numpy(index)
        timesteps = stratified_timesteps(stage.batch_size, self.train_timesteps, generator)
        noise = torch.randn((stage.batch_size, *clips.latents.shape[1:]), generator=generator)
        return {
            "latents": clips.latents[chosen[part]].float(),
            "text": self._embed(captions[part]),
            "timesteps": timesteps[part],
            "noise": noise[part],
            "rotary": clips.rotary,
            "extra": self._extra(clips, chosen, rng, part) if self.views else None,
        }

    def _extra(self, clips: _Clips, chosen: Tensor, rng: np.random.Generator, part: slice) -> Tensor:
        """The channels (B, F, C', H, W) that show the model something of the `chosen` clips, for this share of them."""
        shown = torch.from_numpy(rng.random(len(chosen)) >= self.options["image_dropout"])[part, None, None, None, None]
        if "images" in self.views:
            return image_channels(clips.known["images"][chosen[part]].float() * shown, clips.latents.shape[1])
        both = torch.from_numpy(rng.random(len(chosen)) < self.options["last_image"])[part, None, None, None, None]
        ends, starts = (clips.known[view][chosen[part]].float() for view in ("ends", "starts"))
        kept = torch.where(both, clips.kept["ends"], clips.kept["starts"])
        return inpaint_channels(kept, torch.where(both, ends, starts), shown, self.scaling_factor)

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


def _views(model: Mapping[str, Any]) -> tuple[str, ...]:
    """What a transformer of this config is shown of a clip. Raises ValueError for models of tasks that cannot be trained here."""
    tasks = tasks_of(model)
    if "image" in tasks:
        return ("images",)
    if "inpaint" in tasks:
        return tuple(KEPT)
    if "text" not in tasks:
        raise ValueError(
            f"in_channels={model['in_channels']} with out_channels={model['out_channels']} cannot be trained here: as many is text to "
            "video, twice as many is image to video, and one more than that is inpainting."
        )
    return ()


def _defaults(views: tuple[str, ...]) -> dict[str, float]:
    """The options of the objective that a model reads which is shown these views."""
    shown = {"image_dropout": 0.05} if views else {}
    both = {"last_image": 0.5} if "ends" in views else {}
    return {"text_dropout": 0.1, "balance": 0.0, **shown, **both}
