"""What the shapes of tensors tell about a model: the config of a transformer or of a VAE, under diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..presets import PRESETS, Preset, match_preset

__all__ = ["VAE_FAMILY", "closest_release", "family_of", "transformer_config", "vae_config", "vae_levels"]

Shapes = Mapping[str, tuple[int, ...]]

VAE_FAMILY = "5b"
"""The release that a VAE without a transformer is taken for: four of the five released models share its scaling factor."""

_GROUPS = 32  # of every GroupNorm of the original VAE
_PATCH_T = 2  # of CogVideoX 1.5; its patch layer is linear, so the shapes tell only the product
_TOLD_APART_BY = ("num_attention_heads", "attention_head_dim", "num_layers")


def _shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"the tensor {name} is missing, without which the architecture cannot be told")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that a group of the pattern matches."""
    return max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1) + 1


def _check_no_contradiction(told: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    wrong = [
        f"{key} {like[key]} (tensors: {value})" for key, value in told.items() if key in like and (like[key] or None) != (value or None)
    ]
    if wrong:
        raise ValueError(f"the config that it is to be like (from --like, or beside it) contradicts its tensors: {', '.join(wrong)}")


# --- transformer --------------------------------------------------------------------------------------------------------


def family_of(config: Mapping[str, Any]) -> Preset:
    """The release whose VAE scale, scheduler, text length and sampling a transformer with this config shares: its own, or the nearest."""
    if preset := match_preset(config):
        return preset
    if config.get("patch_size_t"):
        return PRESETS["1.5-5b-i2v" if config.get("ofs_embed_dim") else "1.5-5b"]
    if not config.get("use_rotary_positional_embeddings"):
        return PRESETS["2b"]
    return PRESETS["5b-i2v" if config.get("use_learned_positional_embeddings") else "5b"]


def transformer_config(shapes: Shapes, *, rotary: bool | None = None, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a transformer with tensors of these shapes.

    Args:
        shapes: by diffusers' names; `patch_embed.pos_embedding` only where it is learned.
        rotary: whether it has rotary positions; None where that is not known, and must follow from the rest.
        like: a config that decides what shapes leave open.

    Raises:
        ValueError: a tensor is missing that is needed to tell, shapes contradict `like`, or the kind of positions cannot be told.
    """
    like = dict(like or {})
    projection, width = _shape(shapes, "patch_embed.proj.weight"), _shape(shapes, "patch_embed.text_proj.weight")[0]
    is_linear = len(projection) == 2
    patch = like.get("patch_size", 2) if is_linear else projection[2]
    depth = (like.get("patch_size_t") or _PATCH_T) if is_linear else None
    volume = patch * patch * (depth or 1)
    head = _shape(shapes, "transformer_blocks.0.attn1.norm_q.weight")[0]
    told: dict[str, Any] = {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": projection[1] // volume if is_linear else projection[1],
        "out_channels": _shape(shapes, "proj_out.weight")[0] // volume,
        "time_embed_dim": _shape(shapes, "time_embedding.linear_1.weight")[0],
        "text_embed_dim": _shape(shapes, "patch_embed.text_proj.weight")[1],
        "num_layers": _count(shapes, r"transformer_blocks\.(\d+)\."),
        "use_learned_positional_embeddings": "patch_embed.pos_embedding" in shapes,
        "ofs_embed_dim": shapes["ofs_embedding.linear_1.weight"][0] if "ofs_embedding.linear_1.weight" in shapes else None,
        "patch_size_t": depth,
        "patch_size": patch,
        **({} if "transformer_blocks.0.attn1.to_q.bias" in shapes else {"attention_bias": False}),
    }
    if not is_linear and "patch_embed.proj.bias" not in shapes:
        told["patch_bias"] = False
    if "out_channels" in like and like["out_channels"] is None:  # as many as it reads
        told["out_channels"] = None if told["out_channels"] == told["in_channels"] else told["out_channels"]
    _check_no_contradiction(told, like)
    told["use_rotary_positional_embeddings"] = _is_rotary(told, rotary, like)
    return family_of(told).transformer | _sizes_of(like) | told


def _sizes_of(like: Mapping[str, Any]) -> dict[str, Any]:
    """What a config knows beyond the shapes, without the entries that diffusers adds."""
    return {key: value for key, value in like.items() if not key.startswith("_")}


def _is_rotary(told: Mapping[str, Any], rotary: bool | None, like: Mapping[str, Any]) -> bool:
    if rotary is not None:
        _check_no_contradiction({"use_rotary_positional_embeddings": rotary}, like)
        return rotary
    if told["patch_size_t"] or told["use_learned_positional_embeddings"]:
        return True
    if "use_rotary_positional_embeddings" in like:
        return like["use_rotary_positional_embeddings"]
    same = {
        preset.transformer["use_rotary_positional_embeddings"]
        for preset in PRESETS.values()
        if all(preset.transformer[key] == told[key] for key in _TOLD_APART_BY)
    }
    if len(same) != 1:
        raise ValueError(
            "its tensors do not tell whether its positions are rotary (as in 5B) or sin-cos (as in 2B), and it has the size of no "
            "release: say it with --like 2b or --like 5b"
        )
    return same.pop()


def closest_release(config: Mapping[str, Any]) -> str:
    """Name of the release that shares most entries with a config."""
    return max(PRESETS.values(), key=lambda preset: sum(preset.transformer.get(key) == value for key, value in config.items())).name


# --- VAE ----------------------------------------------------------------------------------------------------------------


def vae_levels(names: Mapping[str, Any]) -> int:
    """Number of resolutions of a VAE, from its tensors' names in SAT's or diffusers' spelling."""
    return _count(names, r"encoder\.down(?:_blocks)?\.(\d+)\.")


def vae_config(shapes: Shapes, *, family: Preset, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a VAE with tensors of these shapes.

    Args:
        shapes: by diffusers' names.
        family: the release whose scaling factor it has.
        like: a config that decides what shapes leave open.

    Raises:
        ValueError: a tensor is missing that is needed to tell, shapes contradict `like`, or the number of norm groups cannot be told.
    """
    like = dict(like or {})
    levels = vae_levels(shapes)
    widths = tuple(_shape(shapes, f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight")[0] for level in range(levels))
    if not widths:
        raise ValueError("the encoder is missing, without which the architecture cannot be told")
    told = {
        "in_channels": _shape(shapes, "encoder.conv_in.conv.weight")[1],
        "out_channels": _shape(shapes, "decoder.conv_out.conv.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": _shape(shapes, "decoder.conv_in.conv.weight")[1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }
    comparable = like | {"block_out_channels": tuple(like["block_out_channels"])} if "block_out_channels" in like else like
    _check_no_contradiction(told, comparable)
    blocks = {f"{word}_block_types": (f"CogVideoX{word.title()}Block3D",) * levels for word in ("down", "up")}
    config = family.vae | blocks | _sizes_of(like) | told
    if any(width % config["norm_num_groups"] for width in widths):
        raise ValueError(
            f"its channels {widths} cannot be normalised in {config['norm_num_groups']} groups: say how many with --like CONFIG.json"
        )
    return config
