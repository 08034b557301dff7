"""One LoRA for the tiny transformers, written out by hand under the names of every layout: nothing here comes from the package's tables."""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SPELLINGS", "Factors", "delta", "factors", "spelled"]

Factors = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""(block, target) -> A (r, D), B (D, r)."""

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_SAT = {"to_q": ("query_key_value", 0), "to_k": ("query_key_value", 1), "to_v": ("query_key_value", 2), "to_out.0": ("dense", 0)}


def _sat(block: int, target: str, letter: str) -> str:
    linear, part = _SAT[target]
    return f"transformer.layers.{block}.attention.{linear}.matrix_{letter}.{part}"


def _side(letter: str) -> str:
    return {"A": "down", "B": "up"}[letter]


# Layout as the package names it, and the name of factor A or B of one layer.
SPELLINGS: dict[str, tuple[str, Callable[[int, str, str], str]]] = {
    "diffusers": ("diffusers", lambda b, t, x: f"transformer.transformer_blocks.{b}.attn1.{t}.lora_{x}.weight"),
    "diffusers, old": ("diffusers", lambda b, t, x: f"transformer.transformer_blocks.{b}.attn1.{t}.lora.{_side(x)}.weight"),
    "comfyui": ("comfyui", lambda b, t, x: f"diffusion_model.transformer_blocks.{b}.attn1.{t}.lora_{x}.weight"),
    "comfyui, kohya's sides": ("comfyui", lambda b, t, x: f"diffusion_model.transformer_blocks.{b}.attn1.{t}.lora_{_side(x)}.weight"),
    "peft": ("peft", lambda b, t, x: f"base_model.model.transformer_blocks.{b}.attn1.{t}.lora_{x}.weight"),
    "bare": ("bare", lambda b, t, x: f"transformer_blocks.{b}.attn1.{t}.lora_{x}.weight"),
    "bare, with an adapter's name": ("bare", lambda b, t, x: f"transformer_blocks.{b}.attn1.{t}.lora_{x}.default.weight"),
    "fun": ("kohya", lambda b, t, x: f"lora_unet__transformer_blocks_{b}_attn1_{t.replace('.', '_')}.lora_{_side(x)}.weight"),
    "kohya": ("kohya", lambda b, t, x: f"lora_unet_transformer_blocks_{b}_attn1_{t.replace('.', '_')}.lora_{_side(x)}.weight"),
    "sat": ("sat", lambda b, t, x: f"model.diffusion_model.{_sat(b, t, x)}"),
    "sat, bare": ("sat", _sat),
}


def factors(rank: int = 4, width: int = 64, blocks: int = 2, seed: int = 0) -> Factors:
    """Random factors for the four projections of every attention."""
    random = torch.Generator().manual_seed(seed)
    return {
        (block, target): (torch.randn(rank, width, generator=random) / width**0.5, torch.randn(width, rank, generator=random))
        for block in range(blocks)
        for target in TARGETS
    }


def spelled(lora: Factors, spelling: str, alpha: float | None = None) -> dict[str, Tensor]:
    """The tensors as that layout names them; with `.alpha` beside each pair if `alpha` is given."""
    name = SPELLINGS[spelling][1]
    tensors = {name(*layer, letter): factor for layer, pair in lora.items() for letter, factor in zip("AB", pair, strict=True)}
    if alpha is not None:
        tensors |= {name(*layer, "A").partition(".lora")[0] + ".alpha": torch.tensor(alpha) for layer in lora}
    return tensors


def delta(lora: Factors, block: int, target: str, alpha: float) -> Tensor:
    """alpha / r * B A, (D, D)."""
    down, up = lora[block, target]
    return alpha / len(down) * up @ down
