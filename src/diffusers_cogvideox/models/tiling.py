"""Overlapping tiles: where they lie, and one walk that maps a function over them and blends the results.

All positions are counted in latent cells, for encoding and decoding alike, so that a tile's input and output always fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TileAxis", "map_tiles"]


@dataclass(frozen=True)
class TileAxis:
    """Tiles along one axis of `length` cells: `size` cells each, `overlap` of them shared with the tile before."""

    length: int
    size: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise ValueError(f"tiles of {self.size} latent cells cannot overlap by {self.overlap}: choose 0 <= overlap < size")

    def spans(self) -> list[tuple[int, int]]:
        """(start, stop) of every tile in cells; together they cover the axis and none lies inside another."""
        stride = self.size - self.overlap
        count = 1 + max(0, -(-(self.length - self.size) // stride))
        return [(i * stride, min(i * stride + self.size, self.length)) for i in range(count)]


def blend(before: Tensor | None, tile: Tensor, dim: int, extent: int) -> Tensor:
    """Cross-fade the first `extent` rows (`dim`=-2) or columns (-1) of `tile` from the end of the neighbour `before`."""
    if before is None or not extent:
        return tile
    ramp = torch.arange(extent, device=tile.device, dtype=tile.dtype) / extent
    ramp = ramp.view(-1, *[1] * (-dim - 1))
    faded = torch.lerp(before.narrow(dim, before.shape[dim] - extent, extent), tile.narrow(dim, 0, extent), ramp)
    return torch.cat([faded, tile.narrow(dim, extent, tile.shape[dim] - extent)], dim=dim)


def map_tiles(
    fn: Callable[[Tensor], Tensor], x: Tensor, rows: TileAxis, columns: TileAxis, *, in_scale: int = 1, out_scale: int = 1
) -> Tensor:
    """Cut x (..., H, W) into tiles, apply `fn` to each, blend neighbours linearly over their overlap, put them together.

    Args:
        in_scale: elements of x per cell (8 when x is pixels).
        out_scale: elements of fn's result per cell (8 when it returns pixels).

    Only one row of finished tiles is kept beside the result.
    """
    above: dict[int, Tensor] = {}
    finished_rows = []
    row_spans, column_spans = rows.spans(), columns.spans()
    for top, bottom in row_spans:
        left: Tensor | None = None
        finished = []
        for start, stop in column_spans:
            tile = fn(x[..., top * in_scale : bottom * in_scale, start * in_scale : stop * in_scale])
            tile = blend(above.get(start), tile, -2, rows.overlap * out_scale)
            tile = above[start] = left = blend(left, tile, -1, columns.overlap * out_scale)
            keep_rows = tile.shape[-2] if bottom == rows.length else (rows.size - rows.overlap) * out_scale
            keep_columns = tile.shape[-1] if stop == columns.length else (columns.size - columns.overlap) * out_scale
            finished.append(tile[..., :keep_rows, :keep_columns])
        finished_rows.append(torch.cat(finished, dim=-1))
    return torch.cat(finished_rows, dim=-2)
