"""What benchmarks/vae.py measures: our VAE and diffusers' own, their settings, and their inputs."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX as StockVAE
from torch import Tensor, nn

from common import random_model
from diffusers_cogvideox import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.vae_memory import Saving, savings

__all__ = ["DTYPES", "build", "cast", "class_of", "code", "config_of", "draw", "hollow", "input_shape", "saving_of", "setting", "ways"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def config_of(given: argparse.Namespace) -> dict[str, Any]:
    """The released VAE's configuration, with `--widths` in place of its own."""
    widths = tuple(given.widths)
    return {"block_out_channels": widths, "norm_num_groups": 32 if min(widths) % 32 == 0 else 2}


def build(given: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Ours and stock, float32, with the same weights, on the device."""
    torch.manual_seed(0)
    ours, stock = (random_model(cls, config_of(given), torch.float32) for cls in (AutoencoderKLCogVideoX, StockVAE))
    stock.load_state_dict(ours.state_dict())
    return ours.to(given.device), stock.to(given.device)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another precision, without diffusers' warning."""
    return nn.Module.to(model, dtype)


def class_of(way: str) -> type[nn.Module]:
    """Stock's or ours."""
    return StockVAE if "stock" in way else AutoencoderKLCogVideoX


def hollow(way: str, given: argparse.Namespace) -> nn.Module:
    """A bfloat16 model without contents."""
    with torch.device("meta"):
        return cast(class_of(way)(**config_of(given)), torch.bfloat16).eval()


def input_shape(direction: str, frames: int, height: int, width: int) -> tuple[int, ...]:
    """Of what is decoded or encoded for a video of this size."""
    return (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8) if direction == "decode" else (1, 3, frames, height, width)


def draw(direction: str, given: argparse.Namespace, seed: int = 1) -> Tensor:
    """Random latents, or a random video in [-1, 1]."""
    shape = input_shape(direction, given.frames, given.height, given.width)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x if direction == "decode" else x.tanh()).to(given.device)


@torch.no_grad()
def code(model: nn.Module, direction: str, x: Tensor) -> Tensor:
    """The decoded video, or mean and log-variance."""
    return model.decode(x).sample if direction == "decode" else model.encode(x).latent_dist.parameters


def tile(stock: nn.Module, height: int, width: int) -> None:
    """Stock's own tiles, or for a picture that is not larger, tiles of half its size that overlap by whole latent cells."""
    stock.enable_tiling()
    if height <= stock.tile_sample_min_height and width <= stock.tile_sample_min_width:
        cells = [side // 16 for side in (height, width)]
        overlaps = [max(1, round(n / 6)) / n for n in cells]
        stock.enable_tiling(8 * cells[0], 8 * cells[1], *overlaps)


def setting(model: nn.Module, name: str, height: int, width: int) -> nn.Module:
    """Bring a model into the state that `name` says."""
    model.disable_tiling()
    if name == "stock tiled":
        tile(model, height, width)
    elif name == "ours low-memory":
        model.enable_tiling()
    return model


def ways(given: argparse.Namespace, direction: str) -> list[str]:
    """What is compared, in the order of a round."""
    return ["stock", *(["stock tiled"] if given.tiled and direction == "decode" else []), "ours", "ours low-memory"]


def saving_of(vae: Any, way: str, height: int, width: int) -> Saving:
    """What is done on an accelerator, without and with `enable_tiling`."""
    return savings(height, torch.device("cuda"), None if way == "ours" else vae.band_rows(width))[0]
