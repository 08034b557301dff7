"""What the planner knows of a model: the sizes of its parts, from their configs alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from ...geometry import Geometry
from ...models.autoencoder import AutoencoderKLCogVideoX
from ...models.block import AdaLayerNorm
from ...models.transformer import CogVideoXTransformer3DModel
from ...presets import Preset

__all__ = ["T5_XXL", "WIDTHS", "ModelFacts", "PartFacts"]

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""

T5_XXL: dict[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
}
"""Sizes of the text encoder of every release, google/t5-v1_1-xxl."""


@dataclass(frozen=True)
class PartFacts:
    """Parameters of a model that is a row of equal blocks between a beginning and an end.

    Args:
        blocks: how many.
        block: parameters of one.
        outside: parameters and buffers of everything else.
        modulation: those of all modulation layers, which a loop with tables does not need: of one block, and outside.
        float32: those of one block that stay in float32 when the model is loaded in float16.
    """

    blocks: int
    block: int
    outside: int
    modulation: tuple[int, int] = (0, 0)
    float32: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.blocks * self.block + self.outside

    def block_bytes(self, dtype: str) -> int:
        """Bytes of a block as it is stored."""
        return self.block * WIDTHS[dtype] + (self.float32 * 2 if dtype == "float16" else 0)

    def bytes(self, dtype: str) -> int:
        """Bytes of all parameters as they are stored."""
        return self.blocks * self.block_bytes(dtype) + self.outside * WIDTHS[dtype]


@dataclass(frozen=True)
class ModelFacts:
    """Configs of the parts of a pipeline, and what follows from them. Build it once: models are laid out on the meta device.

    Args:
        name: how to call the model.
        pipeline: class name.
        transformer, vae, text_encoder: the configs; no text encoder where only embeddings are passed.
        adapters: parameters of LoRA layers in the transformer.
        float32_residual: as `keep_residual_in_float32` of the transformer.
    """

    name: str
    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    adapters: int = 0
    float32_residual: bool = False

    @classmethod
    def of_preset(cls, preset: Preset) -> ModelFacts:
        """Of a released model."""
        return cls(preset.name, preset.pipeline, preset.transformer, preset.vae, T5_XXL)

    @classmethod
    def of_pipeline(cls, pipe: Any) -> ModelFacts:
        """Of a loaded pipeline, with the adapters that it has.

        Raises ValueError for a pipeline without transformer or VAE, and for models of other packages, whose memory is not known here.
        """
        for name, kind in (("transformer", CogVideoXTransformer3DModel), ("vae", AutoencoderKLCogVideoX)):
            if not isinstance(getattr(pipe, name), kind):
                raise ValueError(
                    f"the {name} is a {type(getattr(pipe, name)).__name__}, and a memory plan needs this package's {kind.__name__}: load the "
                    "pipeline with it."
                )
        encoder = pipe.text_encoder
        facts = cls(
            name=str(pipe.name_or_path or type(pipe).__name__),
            pipeline=type(pipe).__name__,
            transformer=_plain(pipe.transformer.config),
            vae=_plain(pipe.vae.config),
            text_encoder=None if encoder is None else encoder.config.to_dict(),
            float32_residual=pipe.transformer.float32_residual,
        )
        adapters = sum(p.numel() for name, p in pipe.transformer.named_parameters() if ".lora_" in name)
        return cls(**{**vars(facts), "adapters": adapters})

    @cached_property
    def geometry(self) -> Geometry:
        """Size rules of the model."""
        return Geometry.from_configs(self.vae, self.transformer)

    @property
    def transformer_part(self) -> PartFacts:
        """Parameters of the transformer, without adapters."""
        return _transformer_facts(json.dumps(_plain(self.transformer)))

    @property
    def text_part(self) -> PartFacts | None:
        """Parameters of the text encoder."""
        return None if self.text_encoder is None else _text_facts(json.dumps({key: self.text_encoder[key] for key in T5_XXL}))

    @property
    def vae_parameters(self) -> int:
        """Parameters of both directions of the VAE."""
        return _count(self.vae_on_meta.parameters())

    @property
    def vae_on_meta(self) -> AutoencoderKLCogVideoX:
        """The VAE without weights, whose layers tell what they take."""
        return _vae(json.dumps(_plain(self.vae)))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _count(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


@lru_cache(maxsize=32)
def _vae(config: str) -> AutoencoderKLCogVideoX:
    with torch.device("meta"):
        return AutoencoderKLCogVideoX(**json.loads(config)).eval()


@lru_cache(maxsize=32)
def _transformer_facts(config: str) -> PartFacts:
    """Of one block, which all others equal."""
    given = json.loads(config)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**given | {"num_layers": 1})
    block = model.transformer_blocks[0]
    inside = _count(block.parameters())
    outside = _count(model.parameters()) - inside + _count(model.buffers())

    def modulation(part: nn.Module) -> int:
        return sum(_count(m.linear.parameters()) for m in part.modules() if isinstance(m, AdaLayerNorm))

    return PartFacts(given["num_layers"], inside, outside, (modulation(block), modulation(model.norm_out)))


@lru_cache(maxsize=32)
def _text_facts(config: str) -> PartFacts:
    """Of the second block, which all later ones equal; the first one has the table of relative positions."""
    given = json.loads(config)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**given | {"num_layers": 2}))
    block = model.encoder.block[1]
    inside = _count(block.parameters())
    down = _count(p for name, p in block.named_parameters() if name.endswith("wo.weight"))
    return PartFacts(given["num_layers"], inside, _count(model.parameters()) - 2 * inside, float32=down)
