"""Positions in the original code's checkpoints: which size they were made for, whether they are what is computed, and making them anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.lazy import LazyTensor
from ..checkpoints.sat import POSITIONS, ROPE_COS, ROPE_SIN, UNUSED_POSITIONS
from ..geometry import Geometry
from ..models.embeddings import sincos_table
from ..models.rope import rotary_embedding

__all__ = ["generated", "read_sizes"]

Grid = tuple[int, int, int]  # tokens in time, rows, columns

_UNUSED_ROWS = 64  # of an embedding that SAT's rotary models carry and nothing reads


def _period(rows: Tensor) -> int:
    """After how many rows of (N, c) the first one comes again; N if it does not."""
    again = (rows[1:] == rows[0]).all(dim=1).nonzero()
    return int(again[0]) + 1 if len(again) else len(rows)


def _grid(table: Tensor, axis: int) -> Grid:
    """The grid of a table (N, c) with tokens in (t, h, w) order, of which `c` channels are [time: c/4][axis: 3c/8][other: 3c/8].

    Args:
        table: of positions, in any code in which no two positions are equal.
        axis: which of the two spatial parts holds the columns, 0 or 1.
    """
    if table.shape[1] % 16:
        raise ValueError(f"its positions have {table.shape[1]} channels, which is no multiple of 16")
    time, *space = table.split([table.shape[1] // 16 * size for size in (4, 6, 6)], dim=1)
    columns = _period(space[axis])
    rows = _period(space[1 - axis][::columns])
    return len(time) // (rows * columns), rows, columns


def _rotary(grid: Grid, head: int) -> tuple[Tensor, Tensor]:
    """Rotary tables (N, head) of CogVideoX 1.0 at its native size: cosines and sines."""
    t, h, w = map(torch.arange, grid)
    return rotary_embedding(t, h, w, head)


def _sincos(grid: Grid, config: Mapping[str, Any], text: int) -> Tensor:
    """Sin-cos table (1, L + N, D) with zeros for the text."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    scales = config["spatial_interpolation_scale"], config["temporal_interpolation_scale"]
    table = sincos_table(grid, width, *scales, like=torch.empty(0, dtype=torch.float64))
    return torch.cat([table.new_zeros(text, width), table])[None].float()


def read_sizes(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of the config that the positions in a SAT checkpoint tell: native size, frames, text length.

    Args:
        tensors: of the transformer, by SAT's names: `pos_embedding` (1, L + N, D) and `freqs_*` (N, d) where it has them.
        config: of the transformer, as far as it is known.

    Raises:
        ValueError: tables that are dropped, because they are computed, but hold other values than are computed.
    """
    if ROPE_COS in tensors:
        cos, sin = (tensors[name].make().float() for name in (ROPE_COS, ROPE_SIN))
        grid = _grid(cos + sin, axis=1)
        _check(((cos, sin), _rotary(grid, config["attention_head_dim"])), tensors[ROPE_COS].dtype, "rotary angles", grid)
        text = tensors[POSITIONS].shape[1] - len(cos) if POSITIONS in tensors else None
    elif POSITIONS in tensors:
        table = tensors[POSITIONS].make()[0].float()
        text = int((table == 0).all(dim=1).sum())
        grid = _grid(table[text:], axis=0)
        _check(((table[None],), (_sincos(grid, config, text),)), tensors[POSITIONS].dtype, "sin-cos positions", grid)
    else:
        return {}
    geometry, patch = Geometry.from_transformer(config), config["patch_size"]
    sizes = {"sample_frames": geometry.frames(grid[0]), "sample_height": grid[1] * patch, "sample_width": grid[2] * patch}
    return sizes if text is None else sizes | {"max_text_seq_length": text}


def _check(pair: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], dtype: torch.dtype, what: str, grid: Grid) -> None:
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    for stored, computed in zip(*pair, strict=True):
        if stored.shape != computed.shape or (stored - computed).abs().max() > tolerance:
            raise ValueError(
                f"its {what} ({', '.join(map(str, stored.shape))}) are not those that are computed for {'x'.join(map(str, grid))} tokens, "
                "so they cannot be left out without changing the model"
            )


def generated(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, LazyTensor]:
    """What a SAT checkpoint holds beside the weights: positions at the native size, and an embedding that nothing reads.

    Args:
        config: of the transformer.
        dtype: of the checkpoint.

    Returns:
        by SAT's names: 2B `pos_embedding` (1, L + N, D); 5B `freqs_sin` and `freqs_cos` (N, d); all rotary ones `position_embeddings`.
    """
    geometry = Geometry.from_transformer(config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    unused = LazyTensor.of(torch.zeros(_UNUSED_ROWS, width, dtype=dtype))
    if config.get("patch_size_t"):
        return {UNUSED_POSITIONS: unused}
    grid = geometry.token_grid(geometry.latent_frames(config["sample_frames"]), config["sample_height"], config["sample_width"])
    if not config["use_rotary_positional_embeddings"]:
        return {POSITIONS: LazyTensor.of(_sincos(grid, config, config["max_text_seq_length"]).to(dtype))}
    cos, sin = _rotary(grid, config["attention_head_dim"])
    return {ROPE_SIN: LazyTensor.of(sin.to(dtype)), ROPE_COS: LazyTensor.of(cos.to(dtype)), UNUSED_POSITIONS: unused}
