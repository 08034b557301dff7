"""How much memory and how many operations the VAE takes in each of its ways, from the layers of a model without weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...geometry import DECODE_CHUNK, ENCODE_CHUNK, chunk_spans
from ...models.autoencoder import AutoencoderKLCogVideoX
from ...models.vae_memory import Saving, savings, walk_chunks

__all__ = ["Coding", "codings"]

_PIECES = 4  # copies of a piece of the video: the one that is shown, in the making of its pictures, and the one before it
_FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Coding:
    """Encoding or decoding in one way: bytes on the device beside the weights, bytes in host memory, operations.

    `thrift` counts the ways from the fastest one on.
    """

    saving: Saving
    thrift: int
    device: int
    host: int
    operations: float


@lru_cache(maxsize=256)
def codings(
    vae: AutoencoderKLCogVideoX, direction: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[Coding, ...]:
    """The ways to code a video, the fastest first.

    Args:
        vae: a model on the meta device.
        direction: "encode" or "decode".
        shape: (B, 3, F, H, W) to encode, (B, C, f, h, w) to decode piece by piece.
        dtype: of the weights.
        device: kind of device: "cuda", "cpu", ...
    """
    place = torch.device(device)
    height = shape[3] * (1 if direction == "encode" else vae.spatial_ratio)
    ways = savings(height, place, None)
    if len(ways) == 1:  # on a processor, where less is only taken on request
        ways += savings(height, place, height)
    return tuple(_coding(vae, direction, shape, dtype, place, way, thrift) for thrift, way in enumerate(ways))


def _coding(
    vae: AutoencoderKLCogVideoX,
    direction: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    way: Saving,
    thrift: int,
) -> Coding:
    encodes = direction == "encode"
    tower, chunk = (vae.encoder, ENCODE_CHUNK) if encodes else (vae.decoder, DECODE_CHUNK)
    first, *others = walk_chunks(tower, shape, chunk, dtype, device, way)
    later = others[0] if others else first
    spans = chunk_spans(shape[2], chunk)
    batch, channels, frames, height, width = shape
    if encodes:  # beside the pixels, as they came and in the model's precision; the result is small
        peak = max(first.peak, later.peak) + batch * channels * frames * height * width * (_FLOAT + dtype.itemsize)
    else:
        ratio, latents = int(vae.config["temporal_compression_ratio"]), spans[0][1]
        pixels = batch * vae.config["out_channels"] * height * width * vae.spatial_ratio**2
        piece = pixels * (ratio * latents - latents % 2 * (ratio - 1)) * dtype.itemsize
        peak = max(first.peak, later.peak + (piece if others else 0), _PIECES * piece)
    share = frames / spans[min(1, len(spans) - 1)][1]  # of what was walked
    return Coding(way, thrift, peak, sum(later.kept.values()) if way.offload else 0, later.products * share)
