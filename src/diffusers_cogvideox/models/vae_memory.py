"""What a user can say about the VAE's memory, what it comes to, and what is chosen when nothing is said."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import logging

from ..geometry import chunk_spans
from .accounting import Accounting, next_chunk
from .frames import Bands
from .tiling import TileAxis
from .vae_blocks import Tower

__all__ = ["DIRECTIONS", "Saving", "TilingMixin", "choose_saving", "estimate_chunks", "is_out_of_memory", "savings", "walk_chunks"]

logger = logging.get_logger(__name__)

DIRECTIONS = ("encode", "decode")

# Input of one convolution, in bytes. On a processor, small enough that intermediate results are not handed back to the operating system; on
# an accelerator large enough to keep it busy; in the low-memory mode small beside two feature maps of a large picture.
_CPU_BUDGET, _BUDGET, _LEAN_BUDGET = 16 * 2**20, 256 * 2**20, 32 * 2**20
_SHARE = 0.9  # of the free memory of a device that may be taken


@dataclass(frozen=True)
class Saving:
    """How memory is saved: bands of rows, upsampled rows that are made anew (`lean`), caches that are kept in host memory (`offload`)."""

    bands: Bands = field(default_factory=Bands)
    lean: bool = False
    offload: bool = False


class TilingMixin:
    """`enable_tiling` and its settings, for a model with a `spatial_ratio` (pixels per latent)."""

    spatial_ratio: int

    def init_tiling(self, height: int, width: int) -> None:
        """Start without tiling, with tiles of height x width pixels in case it is enabled."""
        self.use_tiling = False
        self.blended_tiling = False
        self.tiled_directions = frozenset(DIRECTIONS)
        self.tile_sample_min_height, self.tile_sample_min_width = height, width
        self.tile_overlap_factor_height, self.tile_overlap_factor_width = 1 / 6, 1 / 5

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor_height: float | None = None,
        tile_overlap_factor_width: float | None = None,
        directions: Collection[str] = DIRECTIONS,
        blended: bool = False,
    ) -> None:
        """Encode and decode in little memory.

        By default the result is that of the whole picture: layers are computed in bands of rows, and on an accelerator the caches between
        chunks of frames wait in host memory. With `blended`, the picture is cut into overlapping tiles whose results are blended linearly,
        as in diffusers: still less memory, but another function, since group statistics are then those of a tile.

        Args:
            tile_sample_min_height, tile_sample_min_width: size of a tile in pixels. A band has no more pixels than a tile, and at least one
                row. A blended tile covers the whole latent cells (of 8 x 8 pixels) that fit; pictures that are not larger are not cut.
            tile_overlap_factor_height, tile_overlap_factor_width: share of a blended tile, in [0, 1), that is blended with its neighbour;
                rounded to whole latent cells.
            directions: ("encode", "decode"), or the only one of them that saves memory; each call says it anew.
            blended: cut into tiles and blend; each call says it anew.

        Raises:
            ValueError: a tile smaller than one latent cell, a factor outside [0, 1) or without `blended`, an unknown direction.
        """
        if not directions or set(directions) - set(DIRECTIONS):
            raise ValueError(f"directions={directions!r} is not possible: name one or both of {DIRECTIONS}")
        sizes: Mapping[str, float | None] = {
            "tile_sample_min_height": tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width,
        }
        factors: Mapping[str, float | None] = {
            "tile_overlap_factor_height": tile_overlap_factor_height,
            "tile_overlap_factor_width": tile_overlap_factor_width,
        }
        for name, value in sizes.items():
            if value is not None and value < self.spatial_ratio:
                raise ValueError(f"{name}={value} is smaller than one latent cell: choose at least {self.spatial_ratio} pixels")
        for name, value in factors.items():
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} must lie in [0, 1): it is the share of a tile that overlaps its neighbour")
            if value is not None and not blended:
                raise ValueError(
                    f"{name}={value} needs blended=True: otherwise the result is that of the whole picture, and there are no seams to blend"
                )
        for name, value in {**sizes, **factors}.items():
            if value is not None:
                setattr(self, name, value)
        self.tiled_directions = frozenset(directions)
        self.use_tiling, self.blended_tiling = True, blended

    @property
    def tile_latent_min_height(self) -> int:
        """Rows of latent cells of a tile; set `tile_sample_min_height`."""
        return max(1, self.tile_sample_min_height // self.spatial_ratio)

    @property
    def tile_latent_min_width(self) -> int:
        """Columns of latent cells of a tile; set `tile_sample_min_width`."""
        return max(1, self.tile_sample_min_width // self.spatial_ratio)

    def tile_axes(self, latent_height: int, latent_width: int) -> tuple[TileAxis, TileAxis]:
        """Tiles of the current settings over latents of this size; the overlap leaves each tile at least one cell of its own."""

        def axis(length: int, size: int, factor: float) -> TileAxis:
            return TileAxis(length, size, min(round(size * factor), size - 1))

        return (
            axis(latent_height, self.tile_latent_min_height, self.tile_overlap_factor_height),
            axis(latent_width, self.tile_latent_min_width, self.tile_overlap_factor_width),
        )

    def band_rows(self, width: int) -> int:
        """Rows of a picture `width` pixels wide that have as many pixels as one tile."""
        return max(1, self.tile_sample_min_height * self.tile_sample_min_width // width)


def savings(height: int, device: torch.device, most_rows: int | None) -> list[Saving]:
    """Ways to save memory for a picture of `height` rows, the fastest first.

    Args:
        most_rows: rows of a band when little memory was asked for, None when nothing was.
    """
    on_cpu = device.type == "cpu"
    if most_rows is None:
        usual = Saving(Bands(_CPU_BUDGET if on_cpu else _BUDGET))
        return [usual] if on_cpu else [usual, *savings(height, device, height)]
    rows = [most_rows, *(n for n in (64, 16, 4, 1) if n < most_rows)]
    offload = device.type not in ("cpu", "meta")
    return [Saving(Bands(_CPU_BUDGET if on_cpu else _LEAN_BUDGET, n, height), lean=True, offload=offload) for n in rows]


def walk_chunks(
    tower: Tower, shape: tuple[int, ...], chunk: int, dtype: torch.dtype, device: torch.device, saving: Saving
) -> list[Accounting]:
    """What coding a tensor (B, C, F, H, W) takes in its first chunk of `chunk` frames, and in the second; the later ones are like that."""
    batch, channels, frames, height, width = shape
    walked: list[Accounting] = []
    for start, stop in chunk_spans(frames, chunk)[:2]:
        new = Accounting(saving.bands, dtype, device, saving.lean, elsewhere=saving.offload)
        walked.append(next_chunk(walked[0]) if walked else new)
        tower(torch.Size((batch, channels, stop - start, height, width)), walked[-1])
    return walked


def estimate_chunks(walked: Sequence[Accounting], result: int, last: int, slices: int = 1) -> int:
    """Bytes that coding a tensor takes at its peak, beside the weights.

    Args:
        walked: its first chunks.
        result: bytes of the result, which is joined at the end from the pieces that the chunks came to.
        last: bytes of the last of them.
        slices: of the batch, coded one after the other; all of this is about one of them.
    """
    first, later, before = walked[0], walked[-1], (slices - 1) * result
    return max(before + max(first.peak, later.peak + result - last), 2 * slices * result + sum(later.derived.values()))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where it does not say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def choose_saving(ways: list[Saving], estimate: Any, free: int | None) -> list[Saving]:
    """The ways from the first that is estimated to fit into `free` bytes on; the last one in any case."""
    if free is None:
        return ways
    fitting = next((index for index, way in enumerate(ways) if estimate(way) <= _SHARE * free), len(ways) - 1)
    return ways[fitting:]


# How allocators and libraries say it that have no class of errors of their own: the processor's (Linux, Windows), cuDNN and cuBLAS.
_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that PyTorch or NumPy found no memory, on an accelerator or on the processor."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
