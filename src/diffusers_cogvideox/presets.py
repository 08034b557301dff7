"""The released models, one frozen row each: component configs, native size, precision and recommended sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PRESETS", "Preset", "match_preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One released model.

    `transformer`, `vae` and `scheduler` are the full contents of the published config.json files without their
    `_class_name`; the scheduler file of every release names `CogVideoXDDIMScheduler`. The remaining fields are what
    the authors recommend for sampling.
    """

    name: str  # key of this row in PRESETS
    repo_ids: tuple[str, ...]  # hub repositories with exactly this architecture, the current one first
    pipeline: str  # class name of the pipeline that samples from it
    transformer: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    dtype: str = "bfloat16"  # precision it was trained in
    height: int = 480  # pixels
    width: int = 720  # pixels
    num_frames: int = 49
    fps: int = 8
    max_sequence_length: int = 226  # text tokens seen in training
    sampler: str = "dpm"  # "ddim" or "dpm"
    guidance_scale: float = 6.0
    num_inference_steps: int = 50
    use_dynamic_cfg: bool = True


# --- transformer/config.json ------------------------------------------------------------------------------------------

_TRANSFORMER: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 64,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 16,
    "max_text_seq_length": 226,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "spatial_interpolation_scale": 1.875,
    "temporal_compression_ratio": 4,
    "temporal_interpolation_scale": 1.0,
    "text_embed_dim": 4096,
    "time_embed_dim": 512,
    "timestep_activation_fn": "silu",
}
_2B = _TRANSFORMER | {"num_attention_heads": 30, "num_layers": 30, "use_rotary_positional_embeddings": False}
_5B = _TRANSFORMER | {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
_V15 = _5B | {
    "patch_bias": False,
    "patch_size_t": 2,
    "sample_frames": 81,
    "sample_height": 300,  # size of the position table; the native size is Preset.height x Preset.width
    "sample_width": 300,
    "use_learned_positional_embeddings": False,
}
_IMAGE = {"in_channels": 32}  # noise latents + image latents
_INPAINT = {"in_channels": 33}  # noise latents + mask + masked-video latents
_CONTROL = {"in_channels": 32}  # noise latents + control-video latents

# --- vae/config.json: one set of weights, scaled differently ----------------------------------------------------------

_VAE: dict[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": (128, 256, 256, 512),
    "down_block_types": ("CogVideoXDownBlock3D",) * 4,
    "force_upcast": True,
    "in_channels": 3,
    "invert_scale_latents": False,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 3,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_height": 480,
    "sample_width": 720,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}

# --- scheduler/scheduler_config.json ----------------------------------------------------------------------------------

_SCHEDULER: dict[str, Any] = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}

# --- what whole families share ----------------------------------------------------------------------------------------

_SMALL: dict[str, Any] = {
    "vae": _VAE | {"scaling_factor": 1.15258426},
    "scheduler": _SCHEDULER | {"snr_shift_scale": 3.0},
    "dtype": "float16",
    "sampler": "ddim",
    "use_dynamic_cfg": False,
}
_LARGE: dict[str, Any] = {"vae": _VAE | {"scaling_factor": 0.7}, "scheduler": _SCHEDULER | {"snr_shift_scale": 1.0}}
_LARGE_V15: dict[str, Any] = _LARGE | {
    "vae": _LARGE["vae"] | {"invert_scale_latents": True},
    "height": 768,
    "width": 1360,
    "num_frames": 81,
    "fps": 16,
    "max_sequence_length": 224,
}
_FUN: dict[str, Any] = {"dtype": "bfloat16", "sampler": "ddim", "use_dynamic_cfg": False}
_FUN_INPAINT = _FUN | {"pipeline": "CogVideoXFunInpaintPipeline"}
_FUN_CONTROL = _FUN | {"pipeline": "CogVideoXFunControlPipeline"}


def _repos(owners: tuple[str, ...], *names: str) -> tuple[str, ...]:
    """Full repository ids of `names` under every owner."""
    return tuple(f"{owner}/{name}" for name in names for owner in owners)


_AUTHORS = ("zai-org", "THUDM")  # the organisation was renamed; both addresses answer
_FUN_AUTHORS = ("alibaba-pai",)

_ROWS = (
    Preset(
        name="2b",
        repo_ids=_repos(_AUTHORS, "CogVideoX-2b"),
        pipeline="CogVideoXPipeline",
        transformer=_2B,
        **_SMALL,
    ),
    Preset(
        name="5b",
        repo_ids=_repos(_AUTHORS, "CogVideoX-5b"),
        pipeline="CogVideoXPipeline",
        transformer=_5B,
        **_LARGE,
    ),
    Preset(
        name="5b-i2v",
        repo_ids=_repos(_AUTHORS, "CogVideoX-5b-I2V"),
        pipeline="CogVideoXImageToVideoPipeline",
        transformer=_5B | _IMAGE | {"use_learned_positional_embeddings": True},
        **_LARGE,
    ),
    Preset(
        name="1.5-5b",
        repo_ids=_repos(_AUTHORS, "CogVideoX1.5-5B"),
        pipeline="CogVideoXPipeline",
        transformer=_V15,
        **_LARGE_V15,
    ),
    Preset(
        name="1.5-5b-i2v",
        repo_ids=_repos(_AUTHORS, "CogVideoX1.5-5B-I2V"),
        pipeline="CogVideoXImageToVideoPipeline",
        transformer=_V15 | _IMAGE | {"ofs_embed_dim": 512},
        **_LARGE_V15,
    ),
    Preset(
        name="fun-2b-inp",
        repo_ids=_repos(_FUN_AUTHORS, "CogVideoX-Fun-V1.1-2b-InP", "CogVideoX-Fun-2b-InP"),
        transformer=_2B | _INPAINT,
        **_SMALL | _FUN_INPAINT,
    ),
    Preset(
        name="fun-5b-inp",
        repo_ids=_repos(_FUN_AUTHORS, "CogVideoX-Fun-V1.1-5b-InP", "CogVideoX-Fun-5b-InP"),
        transformer=_5B | _INPAINT,
        **_LARGE | _FUN_INPAINT,
    ),
    Preset(
        name="fun-1.5-5b-inp",
        repo_ids=_repos(_FUN_AUTHORS, "CogVideoX-Fun-V1.5-5b-InP"),
        transformer=_V15 | _INPAINT,
        # Trained on 22 latent frames: those of 81 pixel frames, and one more that makes their number even.
        **_LARGE_V15 | _FUN_INPAINT | {"vae": _LARGE["vae"], "fps": 8, "max_sequence_length": 226},
    ),
    Preset(
        name="fun-2b-control",
        repo_ids=_repos(_FUN_AUTHORS, "CogVideoX-Fun-V1.1-2b-Control", "CogVideoX-Fun-V1.1-2b-Pose"),
        transformer=_2B | _CONTROL,
        **_SMALL | _FUN_CONTROL,
    ),
    Preset(
        name="fun-5b-control",
        repo_ids=_repos(_FUN_AUTHORS, "CogVideoX-Fun-V1.1-5b-Control", "CogVideoX-Fun-V1.1-5b-Pose"),
        transformer=_5B | _CONTROL,
        **_LARGE | _FUN_CONTROL,
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}

# What tells two releases apart; an absent key and None (or False) mean the same. Table sizes (sample_*) are left out:
# CogVideoX 1.5 was published with two of them.
_FINGERPRINT = (
    "attention_head_dim",
    "in_channels",
    "num_attention_heads",
    "num_layers",
    "ofs_embed_dim",
    "patch_size",
    "patch_size_t",
    "use_learned_positional_embeddings",
    "use_rotary_positional_embeddings",
)


def match_preset(transformer_config: Mapping[str, Any]) -> Preset | None:
    """Name the release that a transformer's config.json belongs to, or None for any other architecture.

    >>> match_preset(PRESETS["5b"].transformer).name
    '5b'
    """

    def fingerprint(config: Mapping[str, Any]) -> list[Any]:
        return [config.get(key) or None for key in _FINGERPRINT]

    wanted = fingerprint(transformer_config)
    return next((row for row in _ROWS if fingerprint(row.transformer) == wanted), None)
