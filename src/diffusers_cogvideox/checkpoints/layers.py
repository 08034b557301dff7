"""The layers of the transformer that a LoRA can adapt: their names and shapes, computed from a config, and the releases that have them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

from ..presets import PRESETS

__all__ = ["LAYERS", "fitting_presets", "layer_shapes"]

LAYERS = (
    "transformer_blocks.{layer}.attn1.to_q",
    "transformer_blocks.{layer}.attn1.to_k",
    "transformer_blocks.{layer}.attn1.to_v",
    "transformer_blocks.{layer}.attn1.to_out.0",
    "transformer_blocks.{layer}.ff.net.0.proj",
    "transformer_blocks.{layer}.ff.net.2",
    "transformer_blocks.{layer}.norm1.linear",
    "transformer_blocks.{layer}.norm2.linear",
    "patch_embed.proj",
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "ofs_embedding.linear_1",
    "ofs_embedding.linear_2",
    "norm_out.linear",
    "proj_out",
)
"""Names of all linear layers and of the patch convolution; `{layer}` is the number of a block."""


def layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Weight shapes of all layers of a transformer by name: (out, in), or (out, C, p, p) of the patch convolution of CogVideoX 1.0.

    Args:
        config: the transformer's config.json.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = (config["patch_size"],) * 2
    depth = config.get("patch_size_t")
    time, ofs = config["time_embed_dim"], config.get("ofs_embed_dim")
    channels = config["in_channels"]
    shapes = {
        **{f"transformer_blocks.{{layer}}.attn1.{name}": (width, width) for name in ("to_q", "to_k", "to_v", "to_out.0")},
        "transformer_blocks.{layer}.ff.net.0.proj": (4 * width, width),
        "transformer_blocks.{layer}.ff.net.2": (width, 4 * width),
        **{f"transformer_blocks.{{layer}}.{name}.linear": (6 * width, time) for name in ("norm1", "norm2")},
        "patch_embed.proj": (width, channels * depth * prod(patch)) if depth else (width, channels, *patch),
        "patch_embed.text_proj": (width, config["text_embed_dim"]),
        "time_embedding.linear_1": (time, width),
        "time_embedding.linear_2": (time, time),
        **({f"ofs_embedding.linear_{n}": (ofs, ofs) for n in (1, 2)} if ofs else {}),
        "norm_out.linear": (2 * width, time),
        "proj_out": ((depth or 1) * prod(patch) * (config.get("out_channels") or channels), width),
    }
    blocks = range(config["num_layers"])
    return {name.format(layer=block): shape for name, shape in shapes.items() for block in (blocks if "{" in name else (0,))}


def fitting_presets(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the releases whose transformer has layers of these names and shapes, as `layer_shapes` gives them."""
    return [name for name, preset in PRESETS.items() if shapes.items() <= layer_shapes(preset.transformer).items()]
