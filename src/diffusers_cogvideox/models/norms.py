"""GroupNorm as a scale and a shift: statistics gathered piece by piece, and what the decoder's latents make of them.

Shapes: B batch, F frames, H W of the feature map, C channels, G groups, f h w of the latent grid; everything channels-last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frames import Bands, Frames
from .leaves import Conv3d, GroupNorm
from .vae_blocks import SpatialNorm

__all__ = ["Affine", "group_statistics", "latent_spans", "norm_affine", "normalise"]

# scale and shift: (B, f, h, w, C), or (B, 1, 1, 1, C).
Affine = tuple[Tensor, Tensor]


def group_statistics(frames: Frames, groups: int, bands: Bands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (B, G), float32, over all frames, rows, columns and the channels of a group.

    Those of pieces of one frame and some rows are joined as in Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979): no large sums of squares, whatever the size of the picture.
    """
    batch, _, height, *_ = frames.shape
    means: list[Tensor] = []
    variances: list[Tensor] = []
    sizes: list[float] = []
    weights = frames.weights
    for start, stop in bands.over(height, frames.row_bytes(dtype)):
        rows = frames.make(start, stop)
        for index, weight in enumerate(weights):
            pair = zip(*(_piece(rows[element, index], groups) for element in range(batch)), strict=True)
            for values, found in zip((means, variances), pair, strict=True):
                values.append(torch.cat(found))
            sizes.append(float(weight * (stop - start)))
    of_pieces, spread = torch.stack(means), torch.stack(variances)  # (pieces, B, G)
    share = torch.tensor(sizes, device=of_pieces.device).div_(sum(sizes)).view(-1, 1, 1)
    mean = (share * of_pieces).sum(0)
    return mean, (share * (spread + (of_pieces - mean).square())).sum(0)


def _piece(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance (1, G) of x (H, W, C), by the library's own kernel, whose third result is 1 / sqrt(variance + eps).

    The kernel subtracts the square of the mean from the mean of the squares. So that nothing is lost where all values are nearly equal, as
    in a picture of one colour, it is shown differences from what stands in the middle.
    """
    height, width, channels = x.shape
    pixel = x[height // 2, width // 2].unflatten(0, (groups, -1)).mean(1)
    one = torch.ones(channels, device=x.device)  # float32: keeps the statistics of half precision in float32
    near = (x - pixel.repeat_interleave(channels // groups))[None].permute(0, 3, 1, 2)
    _, mean, inverse = torch.native_group_norm(near, one, one, 1, channels, height * width, groups, torch.finfo(torch.float32).tiny)
    return mean + pixel.float(), inverse.square().reciprocal()


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
    """activation(scale * x + shift) for the rows x (B, F, rows, W, C) of a map of `height` rows, written to `out` of the same shape."""
    _, frames, _, width, _ = x.shape
    scale, shift = (value.to(x.dtype) for value in affine)
    _, latents, cells_high, cells_wide, _ = scale.shape
    if cells_high > 1:
        places = torch.arange(*rows, device=x.device) // (height // cells_high)
        scale, shift = scale[:, :, places], shift[:, :, places]
    columns = (cells_wide, width // cells_wide)
    for index, (start, stop) in enumerate(latent_spans(frames, latents)):
        part, target = (value[:, start:stop].unflatten(3, columns) for value in (x, out))
        factor, offset = (value[:, index : index + 1, :, :, None] for value in (scale, shift))  # (B, 1, rows, w, 1, C)
        torch.addcmul(offset, part, factor, out=target)
    if isinstance(activation, nn.SiLU):
        F.silu(out, inplace=True)
    else:
        out.copy_(activation(out))
