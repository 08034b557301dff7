"""Triton kernels for `norms`: group statistics in one pass, and normalisation, modulation and activation in another.

A program has one row of a frame, or a piece of it. Arithmetic is in float32, addresses are 64 bits wide, nothing depends on the order in
which programs run. `norms.fused` decides when they are used.

Shapes: B batch, F frames, W width of the feature map, C channels, G groups, f h w of the latent grid; everything channels-last. The rows of
a frame lie one after the other; frames and batch elements may lie anywhere.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["frame_statistics", "modulate_silu"]

TILE = 4096  # elements that a program works on at once
tl: Any = None  # triton.language, from the first use on


@cache
def _kernels() -> tuple[Any, Any]:
    """Both kernels for Triton to compile. It is imported here: it is not everywhere, and takes its time."""
    global tl
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
    # Triton compiles anew for integers that are 1 or multiples of 16: for the row that a band begins at that would not pay.
    return triton.jit(_row_statistics), triton.jit(_modulate_row, do_not_specialize=["top"])


def _options(channels: int) -> dict[str, int]:
    """Pixels and channels, both powers of two, that a program works on at once."""
    wide = 1 << (channels - 1).bit_length()
    return {"PIXELS": max(1, TILE // wide), "CHANNELS": wide, "enable_fp_fusion": True}


def frame_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (F, B, G), float32, of each frame of x (B, F, rows, W, C) and each group of channels.

    First those of each row and channel, by the kernel; then these are joined, all of the same size, by Chan, Golub and LeVeque's formula.
    """
    batch, frames, rows, width, channels = x.shape
    found = torch.empty(2, batch, frames, rows, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _kernels()[0][(rows, frames, batch)](x, found, x.stride()[:2], (width, channels), **_options(channels))
    means, variances = found.transpose(1, 2).unflatten(-1, (groups, -1))  # (F, B, rows, G, C / G) each
    mean = means.mean((2, 4), keepdim=True)
    variance = (variances + (means - mean).square()).mean((2, 4))
    return mean[:, :, 0, :, 0], variance


def _row_statistics(
    x: tl.tensor,
    found: tl.tensor,
    strides: tl.tuple,
    sizes: tl.tuple,
    PIXELS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
) -> None:
    """Mean and biased variance of every channel of one row, to found (2, B, F, rows, C).

    Each pixel of the tile follows those of its own column of tiles by Welford's recurrence, so the loop exchanges nothing; the columns are
    joined at the end.
    """
    row, frame, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, frames, batches = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    batch_stride, frame_stride = strides
    width, channels = sizes
    pixel, channel = tl.arange(0, PIXELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    x += batch * batch_stride + frame * frame_stride + row.to(tl.int64) * width * channels
    mean = tl.zeros((PIXELS, CHANNELS), tl.float32)
    squares = tl.zeros((PIXELS, CHANNELS), tl.float32)
    for start in range(0, width, PIXELS):
        inside = (start + pixel < width) & (channel < channels)
        value = tl.load(x + (start + pixel) * channels + channel, mask=inside, other=0.0).to(tl.float32)
        step = tl.where(inside, value - mean, 0.0)
        mean += step * (1.0 / (start // PIXELS + 1))
        squares += step * (value - mean)
    count = tl.maximum(width - pixel + PIXELS - 1, 0) // PIXELS  # of values behind each pixel of the tile
    of_row = tl.sum(mean * count, 0) / width
    squares += count * (mean - of_row[None, :]) * (mean - of_row[None, :])
    channel = tl.arange(0, CHANNELS)
    found += ((batch * frames + frame) * rows + row) * channels + channel
    tl.store(found, of_row, mask=channel < channels)
    tl.store(found + batches.to(tl.int64) * frames * rows * channels, tl.sum(squares, 0) / width, mask=channel < channels)


def modulate_silu(x: Tensor, top: int, height: int, affine: tuple[Tensor, Tensor], spans: list[tuple[int, int]], out: Tensor) -> None:
    """silu(scale * x + shift) for rows x (B, F, rows, W, C), the first of which is row `top` of `height`, written to `out`.

    Args:
        affine: scale and shift, (B, f, h, w, C), float32.
        spans: of frames that each latent frame belongs to, all equally long but perhaps the first.
    """
    batch, frames, rows, width, channels = x.shape
    scale, shift = (value.contiguous() for value in affine)
    _, latents, high, wide, _ = scale.shape
    each = spans[-1][1] - spans[-1][0]
    missing = each - spans[0][1]  # frames in the first span
    options = _options(channels)
    tiles = -(-width // options["PIXELS"])
    strides = (*x.stride()[:2], *out.stride()[:2])
    cells = (latents, high, wide, missing, each, height // high, width // wide)
    with torch.cuda.device_of(x):
        _kernels()[1][(tiles * rows, frames, batch)](x, out, scale, shift, strides, (width, channels), cells, top, **options)


def _modulate_row(
    x: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    strides: tl.tuple,
    sizes: tl.tuple,
    cells: tl.tuple,
    top: tl.tensor,
    PIXELS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
) -> None:
    """Some pixels of one row: each takes scale and shift of the latent cell that it lies in."""
    frame, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    x_batch, x_frame, out_batch, out_frame = strides
    width, channels = sizes
    latents, high, wide, missing, each, cell_height, cell_width = cells
    tiles = tl.cdiv(width, PIXELS)
    row = tl.program_id(0) // tiles
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    inside = (pixel < width) & (channel < channels)
    cell = ((batch * latents + (frame + missing) // each) * high + (top + row) // cell_height) * wide + pixel // cell_width
    factor = tl.load(scale + cell * channels + channel, mask=inside, other=0.0)
    offset = tl.load(shift + cell * channels + channel, mask=inside, other=0.0)
    place = (row.to(tl.int64) * width + pixel) * channels + channel
    value = tl.load(x + batch * x_batch + frame * x_frame + place, mask=inside, other=0.0).to(tl.float32)
    value = value * factor + offset
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + batch * out_batch + frame * out_frame + place, value.to(out.dtype.element_ty), mask=inside)
