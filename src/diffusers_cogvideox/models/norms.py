"""GroupNorm as a scale and a shift: statistics gathered piece by piece, and what the decoder's latents make of them.

Shapes: B batch, F frames, H W of the feature map, C channels, G groups, f h w of the latent grid; everything channels-last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor, nn

from . import fused_norms
from .frames import Bands, Frames
from .leaves import Conv3d, GroupNorm
from .vae_blocks import SpatialNorm

__all__ = ["Affine", "fused", "group_statistics", "latent_spans", "norm_affine", "normalise", "piece_rows"]

logger = logging.get_logger(__name__)

SWITCH = "COGVIDEOX_TRITON"  # environment variable: 0 keeps to the torch form
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_AT_ONCE = 1 << 18  # numbers of which a processor's cache holds a copy or two in float32
_SUMMED = 512  # pixels whose float32 sums a processor may take one after the other

# scale and shift: (B, f, h, w, C), or (B, 1, 1, 1, C).
Affine = tuple[Tensor, Tensor]


def group_statistics(frames: Frames, groups: int, bands: Bands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (B, G), float32, over all frames, rows, columns and the channels of a group.

    Those of pieces of one frame and some rows are joined as in Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979): no large sums of squares, whatever the size of the picture.
    """
    pieces: list[tuple[Tensor, Tensor]] = []
    sizes: list[float] = []
    for start, stop in bands.over(frames.shape[2], frames.row_bytes(dtype)):
        rows = frames.make(start, stop)
        statistics = fused_norms.frame_statistics if fused(rows) else frame_statistics
        for part in rows.split(max(1, _SUMMED // rows.shape[3]) if rows.device.type == "cpu" else stop - start, dim=2):
            pieces.append(statistics(part, groups))
            sizes += [float(weight * part.shape[2]) for weight in frames.weights]
    of_pieces, spread = map(torch.cat, zip(*pieces, strict=True))  # (pieces, B, G)
    share = torch.tensor(sizes, dtype=torch.float32, device=of_pieces.device).div_(sum(sizes)).view(-1, 1, 1)
    mean = (share * of_pieces).sum(0)
    return mean, (share * (spread + (of_pieces - mean).square())).sum(0)


def frame_statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (F, B, G), float32, of each frame of x (B, F, rows, W, C) and each group of channels.

    First those of each channel; then these are joined, all of the same size, by the same formula.
    """
    of_channels = torch.stack([_channel_statistics(picture) for frame in x.unbind(1) for picture in frame])
    means, variances = of_channels.view(x.shape[1], len(x), 2, groups, -1).unbind(2)
    mean = means.mean(-1, keepdim=True)
    return mean[..., 0], (variances + (means - mean).square()).mean(-1)


def _channel_statistics(x: Tensor) -> Tensor:
    """Mean and biased variance (2, C), float32, of x (H, W, C), the variance from differences to the mean."""
    return (_by_batch_norm if x.device.type == "cpu" else _by_variance)(x)


def _by_batch_norm(x: Tensor) -> Tensor:
    """The fastest that the library has for pixels one after the other on a processor."""
    running = torch.zeros(2, x.shape[-1], dtype=torch.float32, device=x.device)  # float32, so that the results are; not used
    return torch.stack(torch.batch_norm_update_stats(x[None].permute(0, 3, 1, 2), running[0], running[1], 0))


def _by_variance(x: Tensor) -> Tensor:
    """On any device."""
    variance, mean = torch.var_mean(x.float(), dim=(0, 1), correction=0)
    return torch.stack([mean, variance])


def norm_affine(norm: nn.Module, statistics: tuple[Tensor, Tensor], z: Tensor | None) -> Affine:
    """The norm of x as scale * x + shift, float32.

    Args:
        norm: `GroupNorm`, or `SpatialNorm` with the latent z (B, C_z, f, h, w), on whose grid scale and shift then are: its 1x1x1
            convolutions commute with nearest resizing.
        statistics: of x, see `group_statistics`.
    """
    if not isinstance(norm, SpatialNorm) or z is None:
        return norm(lambda layer: _plain_affine(layer, statistics))
    scale, shift = norm.norm_layer(lambda layer: _plain_affine(layer, statistics))
    grid = z.movedim(1, -1).float()
    factor, offset = (conv.conv(lambda layer: _on_grid(layer, grid)) for conv in (norm.conv_y, norm.conv_b))
    return scale * factor, torch.addcmul(offset, shift, factor)


def _on_grid(layer: Conv3d, grid: Tensor) -> Tensor:
    """A 1x1x1 convolution of the latent grid (B, f, h, w, C_z): (B, f, h, w, C)."""
    return F.linear(grid, layer.weight.flatten(1).float(), None if layer.bias is None else layer.bias.float())


def _plain_affine(layer: GroupNorm, statistics: tuple[Tensor, Tensor]) -> Affine:
    mean, variance = (value.repeat_interleave(layer.num_channels // layer.num_groups, dim=1) for value in statistics)
    scale = layer.weight.float() * torch.rsqrt(variance + layer.eps)
    shift = layer.bias.float() - mean * scale
    return scale[:, None, None, None], shift[:, None, None, None]


def latent_spans(frames: int, latents: int) -> list[tuple[int, int]]:
    """The span of `frames` frames that each of `latents` latent frames belongs to, by nearest neighbour; a single first one apart.

    >>> latent_spans(9, 3), latent_spans(8, 2)
    ([(0, 1), (1, 5), (5, 9)], [(0, 4), (4, 8)])
    """
    first = frames % 2 if frames > 1 and latents > 1 else 0
    each = (frames - first) // (latents - first)
    return [(0, 1)] * first + [(first + i * each, first + (i + 1) * each) for i in range(latents - first)]


def normalise(x: Tensor, rows: tuple[int, int], height: int, affine: Affine, activation: nn.Module, out: Tensor) -> None:
    """activation(scale * x + shift) for the rows x (B, F, rows, W, C) of a map of `height` rows, written to `out` of the same shape.

    The arithmetic is float32 in every dtype: half precision rounds once, at the end, where diffusers' VAE rounds after each of up to four
    operations.
    """
    spans = latent_spans(x.shape[1], affine[0].shape[1])
    if isinstance(activation, nn.SiLU) and fused(x, out):
        fused_norms.modulate_silu(x, rows[0], height, affine, spans, out)
    else:
        modulate(x, rows[0], height, affine, spans, out, activation)


def modulate(x: Tensor, top: int, height: int, affine: Affine, spans: list[tuple[int, int]], out: Tensor, activation: nn.Module) -> None:
    """activation(scale * x + shift) for the rows x (B, F, rows, W, C), the first of which is row `top` of `height`, written to `out`.

    Half precision goes through all of it in pieces of a few rows of a frame, one after the other: a processor finds them in its cache.

    Args:
        spans: of frames that each latent frame belongs to.
    """
    exact = x.dtype == torch.float32
    high, wide = affine[0].shape[2:4]
    columns = (wide, x.shape[3] // wide)
    step = x.shape[2] if exact else piece_rows(x.shape, x.device)
    every = None if exact else torch.empty((len(x), 1, step, *columns, x.shape[4]), dtype=torch.float32, device=x.device)
    for first in range(0, x.shape[2], step):
        last = min(first + step, x.shape[2])
        places = torch.arange(top + first, top + last, device=x.device) // (height // high)
        scale, shift = (value[:, :, places] if high > 1 else value for value in affine)
        for index, frames in _at_once(spans, whole=exact):
            part, target = (value[:, frames, first:last].unflatten(3, columns) for value in (x, out))
            factor, offset = (value[:, index : index + 1, :, :, None] for value in (scale, shift))  # (B, 1, rows, w, 1, C)
            values = target if every is None else every[:, :, : last - first].copy_(part)
            torch.addcmul(offset, part if exact else values, factor, out=values)
            values = F.silu(values, inplace=True) if isinstance(activation, nn.SiLU) else activation(values)
            if values is not target:
                target.copy_(values)


def _at_once(spans: list[tuple[int, int]], *, whole: bool) -> Iterator[tuple[int, slice]]:
    """Each span with the index of its latent frame, or each of its frames."""
    for index, (start, stop) in enumerate(spans):
        step = stop - start if whole else 1
        yield from ((index, slice(frame, frame + step)) for frame in range(start, stop, step))


def piece_rows(shape: Sequence[int], device: torch.device) -> int:
    """How many rows of a frame of (B, F, rows, W, C) are normalised at once in half precision."""
    batch, _, rows, width, channels = shape
    numbers = _AT_ONCE if device.type == "cpu" else 8 * _AT_ONCE
    return max(1, min(rows, numbers // (batch * width * channels)))


def fused(*tensors: Tensor) -> bool:
    """Whether the Triton kernels of `fused_norms` compute with tensors (B, F, rows, W, C) of one device and dtype, not the torch form.

    They do on a CUDA device where Triton is installed, unless the environment variable COGVIDEOX_TRITON is 0, the rows of a frame do not
    lie one after the other, or the kernels have failed there before.

    Raises:
        ValueError: COGVIDEOX_TRITON is something else than 0 or 1.
    """
    first = tensors[0]
    if not (_on_gpu(first) and first.dtype in _DTYPES and all(x[0, 0].is_contiguous() for x in tensors)):
        return False
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1"):
        raise ValueError(f"{SWITCH}={wanted!r} is not possible: 1, the default, uses Triton kernels on a GPU, 0 does not")
    return wanted == "1" and find_spec("triton") is not None and _kernels_work(first.device, first.dtype)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@cache
def _kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute what the torch form does in float32, tried once on a small input; warns where they do not."""
    noise = torch.randn(3, 2, 3, 4, 6, 32, generator=torch.Generator().manual_seed(0))
    x = noise[0].to(device, dtype)
    affine: Affine = tuple(value[:, :2, :2, :3].to(device) for value in noise[1:])  # type: ignore[assignment]
    spans, out, expected = latent_spans(3, 2), torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
    try:
        fused_norms.modulate_silu(x, 2, 8, affine, spans, out)
        found = (*fused_norms.frame_statistics(x, 4), out)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:
        reason = f"fail ({type(error).__name__}: {error})"
    else:
        modulate(x.float(), 2, 8, affine, spans, expected, nn.SiLU())
        pairs = zip(found, (*frame_statistics(x.float(), 4), expected), strict=True)
        tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
        if all(torch.allclose(ours.float(), theirs, rtol=tolerance, atol=tolerance) for ours, theirs in pairs):
            return True
        reason = "compute something else than torch"
    logger.warning(f"The VAE's Triton kernels {reason} on {device} in {dtype}. Its norms are computed by torch, more slowly.")
    return False
