"""Checkpoints of the original code for the tests of conversion, spelled by hand: nothing here comes from the package's tables."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_cogvideox.conversion.convert import convert
from diffusers_cogvideox.conversion.options import ConvertOptions
from parity import TINY_TRANSFORMERS, TINY_VAE, StockTransformer, StockVAE, randomize
from transformer_cases import stock_rope

__all__ = ["SAT_VAE", "converted", "sat_transformer", "sat_vae", "tiny_transformer", "tiny_vae", "write_release", "write_sat"]

SAT_VAE: dict[str, Any] = TINY_VAE | {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
"""A VAE that the original code could have: its norms have 32 groups."""

_NAMES = (
    (r"transformer_blocks\.(\d+)\.attn1\.norm_q\.", r"mixins.adaln_layer.query_layernorm_list.\1."),
    (r"transformer_blocks\.(\d+)\.attn1\.norm_k\.", r"mixins.adaln_layer.key_layernorm_list.\1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"transformer.layers.\1.attention.dense."),
    (r"transformer_blocks\.(\d+)\.norm1\.norm\.", r"transformer.layers.\1.input_layernorm."),
    (r"transformer_blocks\.(\d+)\.norm2\.norm\.", r"transformer.layers.\1.post_attention_layernorm."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"transformer.layers.\1.mlp.dense_h_to_4h."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"transformer.layers.\1.mlp.dense_4h_to_h."),
    (r"^patch_embed\.pos_embedding$", "mixins.pos_embed.pos_embedding"),
    (r"^patch_embed\.", "mixins.patch_embed."),
    (r"^norm_out\.norm\.", "mixins.final_layer.norm_final."),
    (r"^norm_out\.linear\.", "mixins.final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "mixins.final_layer.linear."),
    (r"^norm_final\.", "transformer.final_layernorm."),
    (r"^(time|ofs)_embedding\.linear_1\.", r"\1_embed.0."),
    (r"^(time|ofs)_embedding\.linear_2\.", r"\1_embed.2."),
)


def tiny_transformer(variant: str, **changes: Any) -> nn.Module:
    """Diffusers' tiny transformer with random weights."""
    return randomize(StockTransformer(**TINY_TRANSFORMERS[variant] | changes)).float().eval()  # its position table is float64


def tiny_vae() -> nn.Module:
    """Diffusers' tiny VAE with random weights."""
    return randomize(StockVAE(**SAT_VAE)).eval()


def computed_positions(model: nn.Module) -> dict[str, Tensor]:
    """What the original code stores beside the weights, as diffusers computes it."""
    config, prefix = model.config, "model.diffusion_model.mixins.pos_embed."
    if not config.use_rotary_positional_embeddings:
        return {f"{prefix}pos_embedding": model.patch_embed.pos_embedding}
    unused = {"model.diffusion_model.transformer.position_embeddings.weight": torch.zeros(64, 64)}
    if config.patch_size_t:
        return unused
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    cos, sin = stock_rope(config, frames, config.sample_height, config.sample_width)
    return {f"{prefix}freqs_sin": sin, f"{prefix}freqs_cos": cos} | unused


def sat_transformer(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a transformer as the original code names and joins them."""
    state, found = model.state_dict(), {}
    for name, tensor in state.items():
        if re.search(r"\.to_[qkv]\.|\.norm[12]\.linear\.", name):
            continue
        for pattern, new in _NAMES:
            renamed, count = re.subn(pattern, new, name)
            if count:
                found[f"model.diffusion_model.{renamed}"] = tensor
                break
    for layer in range(model.config.num_layers):
        for kind in ("weight", "bias"):
            block = f"transformer_blocks.{layer}"
            fused = [state[f"{block}.attn1.to_{letter}.{kind}"] for letter in "qkv"]
            found[f"model.diffusion_model.transformer.layers.{layer}.attention.query_key_value.{kind}"] = torch.cat(fused)
            first, second = (state[f"{block}.{norm}.linear.{kind}"].chunk(2) for norm in ("norm1", "norm2"))
            modulations = torch.cat([first[0], second[0], first[1], second[1]])
            found[f"model.diffusion_model.mixins.adaln_layer.adaLN_modulations.{layer}.1.{kind}"] = modulations
    return found | {name: tensor.to(state["proj_out.weight"].dtype) for name, tensor in computed_positions(model).items()}


def sat_vae(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a VAE as the original code names them, with what it has beside them in training."""
    levels = len(model.config.block_out_channels)
    found = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        for new, old in ((".down.", ".down_blocks."), (".block.", ".resnets."), (".downsample.", ".downsamplers.0.")):
            name = name.replace(old, new)
        found[name.replace(".upsamplers.0.", ".upsample.").replace(".conv_shortcut.", ".nin_shortcut.")] = tensor
    return found | {"loss.logvar": torch.zeros(()), "loss.discriminator.weight": torch.ones(2)}


def write_sat(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder of the original code with `latest`."""
    (folder / "1000").mkdir(parents=True)
    (folder / "latest").write_text("1000\n")
    torch.save({"module": tensors, "iteration": 1000}, folder / "1000" / "mp_rank_00_model_states.pt")
    return folder


def write_release(folder: Path, variant: str) -> Path:
    """A release folder of the original code: a transformer and a VAE."""
    write_sat(folder / "transformer", sat_transformer(tiny_transformer(variant)))
    (folder / "vae").mkdir()
    torch.save({"state_dict": sat_vae(tiny_vae())}, folder / "vae" / "3d-vae.pt")
    return folder


def converted(source: Path, target: Path, **options: Any) -> Path:
    """The result of `cogvideox convert`."""
    convert(ConvertOptions(str(source), str(target), **options))
    return target
