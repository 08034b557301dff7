"""What the planner knows of a model: the sizes of its parts, from their configs alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from ...geometry import Geometry
from ...models.autoencoder import AutoencoderKLCogVideoX
from ...models.collectives import Group
from ...models.tensor_parallel import keep_share
from ...models.transformer import CogVideoXTransformer3DModel
from ...presets import Preset
from ..quantisation import Quantisation, quantisation_of, quantised_layers
from ..streamed_parts import Parts

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
    """Parameters and buffers of a model that is a row of equal blocks between a beginning and an end, by how streaming brings them.

    Args:
        blocks: how many.
        block: of one block, what is brought with it.
        lent: of one block, what is brought only when it is called: modulation layers.
        alone: the largest of what is brought on its own.
        embeddings: of text, which are brought on their own.
        outside: everything else, which stays.
        final: those of the modulation layer at the end, a part of `outside`.
        float32: those of one block that stay in float32 when the model is loaded in float16.
        matrices, rows: those of one block that quantisation is about, and the rows of their matrices.
    """

    blocks: int
    block: int
    lent: int
    alone: int
    embeddings: int
    outside: int
    final: int = 0
    float32: int = 0
    matrices: int = 0
    rows: int = 0

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.blocks * (self.block + self.lent) + self.embeddings + self.outside

    @property
    def modulation(self) -> int:
        """Those of all modulation layers, which a loop with tables does not use."""
        return self.blocks * self.lent + self.final

    def block_bytes(self, dtype: str) -> int:
        """Bytes of what is brought with a block."""
        return self.block * WIDTHS[dtype] + (self.float32 * 2 if dtype == "float16" else 0)

    def quantised_block_bytes(self, dtype: str, way: Quantisation) -> int:
        """The same with its matrices quantised."""
        return math.ceil(way.stored_bytes(self.matrices, self.rows)) + (self.block - self.matrices) * WIDTHS[dtype]

    def bytes(self, dtype: str, way: Quantisation | None = None) -> int:
        """Bytes of all parameters as they are stored."""
        block = self.block_bytes(dtype) if way is None else self.quantised_block_bytes(dtype, way)
        return self.blocks * block + (self.parameters - self.blocks * self.block) * WIDTHS[dtype]


@dataclass(frozen=True)
class ModelFacts:
    """Configs of the parts of a pipeline, and what follows from them. Build it once: models are laid out on the meta device.

    Args:
        name: how to call the model.
        pipeline: class name.
        transformer, vae, text_encoder: the configs; no text encoder where only embeddings are passed.
        adapters: parameters of LoRA layers in the transformer.
        float32_residual: as `keep_residual_in_float32` of the transformer.
        tensor_ranks: that share the weights of the transformer's blocks; the facts are those of the rank with the most.
        quantised: the way in which the transformer is quantised already.
    """

    name: str
    pipeline: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None = None
    adapters: int = 0
    float32_residual: bool = False
    tensor_ranks: int = 1
    quantised: str | None = None

    @classmethod
    def of_preset(cls, preset: Preset) -> ModelFacts:
        """Of a released model."""
        return cls(preset.name, preset.pipeline, preset.transformer, preset.vae, T5_XXL)

    @classmethod
    def of_pipeline(cls, pipe: Any) -> ModelFacts:
        """Of a loaded pipeline, with the adapters that it has.

        Raises ValueError for a pipeline without transformer or VAE, for models of other packages and for quantisations that are not those
        of `runtime.quantisation`, whose memory is not known here.
        """
        for name, kind in (("transformer", CogVideoXTransformer3DModel), ("vae", AutoencoderKLCogVideoX)):
            if not isinstance(getattr(pipe, name), kind):
                raise ValueError(
                    f"the {name} is a {type(getattr(pipe, name)).__name__}, and a memory plan needs this package's {kind.__name__}: "
                    "load the pipeline with it."
                )
        encoder = pipe.text_encoder
        facts = cls(
            name=Path(pipe.name_or_path or type(pipe).__name__).name,
            pipeline=type(pipe).__name__,
            transformer=_plain(pipe.transformer.config),
            vae=_plain(pipe.vae.config),
            text_encoder=None if encoder is None else encoder.config.to_dict(),
            float32_residual=pipe.transformer.float32_residual,
            tensor_ranks=pipe.transformer.tensor_ranks,
            quantised=quantisation_of(pipe.transformer),
        )
        adapters = sum(p.numel() for name, p in pipe.transformer.named_parameters() if ".lora_" in name)
        return cls(**{**vars(facts), "adapters": adapters})

    @cached_property
    def geometry(self) -> Geometry:
        """Size rules of the model."""
        return Geometry.from_configs(self.vae, self.transformer)

    @cached_property
    def transformer_part(self) -> PartFacts:
        """Parameters of the transformer, without adapters."""
        return _transformer_facts(json.dumps(_plain(self.transformer)), self.tensor_ranks)

    @cached_property
    def text_part(self) -> PartFacts | None:
        """Parameters of the text encoder."""
        return None if self.text_encoder is None else _text_facts(json.dumps({key: self.text_encoder[key] for key in T5_XXL}))

    @cached_property
    def vae_parameters(self) -> int:
        """Parameters of both directions of the VAE."""
        return _count(self.vae_on_meta.parameters())

    @cached_property
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
def _transformer_facts(config: str, ranks: int) -> PartFacts:
    given = json.loads(config)
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**given | {"num_layers": 2})
    if ranks > 1:
        keep_share(model.transformer_blocks, Group("planned", 0, ranks))  # the first rank has no fewer heads and channels than others
    weights = [layer.weight for layer in quantised_layers(model.transformer_blocks[1])]
    quantised = {"matrices": _count(weights), "rows": sum(map(len, weights))}
    return _of_two_blocks(model, given["num_layers"], final=_count(model.norm_out.linear.parameters()), **quantised)


@lru_cache(maxsize=32)
def _text_facts(config: str) -> PartFacts:
    given = json.loads(config)
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**given | {"num_layers": 2}))
    down = _count(p for name, p in model.encoder.block[1].named_parameters() if name.endswith("wo.weight"))
    return _of_two_blocks(model, given["num_layers"], float32=down)


def _of_two_blocks(model: nn.Module, blocks: int, **more: int) -> PartFacts:
    """From a model of two blocks, the second of which all later ones equal."""
    parts = Parts.of(model)
    lent = {True: 0, False: 0}  # those of text, those of modulations
    for modules, tensors in parts.lent:
        lent[isinstance(modules[0], nn.Embedding)] += _count(tensors)
    first, second = map(_count, parts.block_tensors)
    return PartFacts(
        blocks=blocks,
        block=second,
        lent=lent[False] // 2,
        alone=max((_count(tensors) for _, tensors in parts.lent), default=0),
        embeddings=lent[True],
        outside=_count(parts.resident) + first - second,
        **more,
    )
