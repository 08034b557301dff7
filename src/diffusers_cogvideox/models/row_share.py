"""One picture on several ranks: each computes the VAE's layers for some of the rows, and knows the rows next to its own.

A layer needs two things of the other ranks: one row on either side, for the 3x3 convolutions, and the statistics of all rows, for the
norms. So the result is that of one rank, up to rounding; nothing is computed twice and nothing is blended.

Shapes: B batch, F frames, h H of own rows and all rows, W width of the feature map, C channels (last), G groups.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .collectives import Group, exchange, gather, require_ranks, shares
from .frames import Frames

__all__ = ["Border", "RowParallelMixin", "RowShare"]


class Border(NamedTuple):
    """The rows (B, F, 1, W, C) right above and below the own ones, None at the edge of the picture."""

    above: Tensor | None = None
    below: Tensor | None = None

    def row_at(self, index: int) -> Tensor | None:
        """The row above for index 0, the one below for -1."""
        return self.above if index == 0 else self.below


class RowShare(NamedTuple):
    """Which rows of the latents, and so of every feature map, this rank computes.

    Args:
        sizes: rows of each rank, at least one.
        group: the ranks, from the top of the picture to its bottom.
    """

    sizes: tuple[int, ...]
    group: Group

    @classmethod
    def of(cls, rows: int, group: Group | None) -> RowShare | None:
        """The share of a picture of so many latent rows; None where there is nothing to share, or not a row for each rank."""
        if group is None or group.size == 1 or rows < group.size:
            return None
        return cls(tuple(shares(rows, group.size)), group)

    @property
    def inner(self) -> tuple[bool, bool]:
        """Whether there are rows above this rank's, and below."""
        return self.group.rank > 0, self.group.rank < self.group.size - 1

    def own(self, x: Tensor) -> Tensor:
        """This rank's rows of (B, C, F, H, W)."""
        return x.split(list(self.sizes), 3)[self.group.rank]

    def whole(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) on every rank, from each one's rows (B, C, F, h, W), which may be finer than the latents'."""
        finer = x.shape[3] // self.sizes[self.group.rank]
        return gather(x, 3, [finer * size for size in self.sizes], self.group)

    def place(self, row: int, height: int) -> tuple[int, int]:
        """Where a row of this rank's map of `height` rows is in the whole map, and how many rows that has."""
        finer = height // self.sizes[self.group.rank]
        return finer * sum(self.sizes[: self.group.rank]) + row, finer * sum(self.sizes)

    def border(self, x: Frames) -> Border:
        """The other ranks' rows next to those of a map (B, F, h, W, C)."""
        height, (above, below) = x.shape[2], self.inner
        wanted = [0] * self.group.size
        edges = []
        if above:
            wanted[self.group.rank - 1] = 1
            edges.append(x.make(0, 1))
        if below:
            wanted[self.group.rank + 1] = 1
            edges.append(x.make(height - 1, height))
        rows = list(exchange(torch.cat(edges, 2), (2, wanted), (2, wanted), self.group).split(1, 2))
        return Border(rows.pop(0) if above else None, rows.pop(0) if below else None)

    def statistics(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (B, G) of all ranks' rows, from those of each one's: joined as in `norms.group_statistics`."""
        means, spread = gather(torch.stack([mean, variance])[None], 0, [1] * self.group.size, self.group).unbind(1)
        share = torch.tensor(self.sizes, dtype=mean.dtype, device=mean.device).div_(sum(self.sizes)).view(-1, 1, 1)
        mean = (share * means).sum(0)
        return mean, (share * (spread + (means - mean).square())).sum(0)


class RowParallelMixin:
    """A VAE that decodes together with other ranks, each of which calls it with the same latents and gets the whole video."""

    row_group: Group | None = None

    def enable_row_parallelism(self, group: Any = None) -> None:
        """Share the rows of every picture that is decoded among the ranks of a process group, by default all ranks.

        The result is that of one rank, to rounding: the norms know the statistics of all rows. Latents with fewer rows than ranks are
        decoded by every rank. When memory runs out on a rank, that is an error: nothing is tried again, because the others go on.

        Raises:
            RuntimeError: without a process group.
        """
        require_ranks()
        self.row_group = Group.of(dist.group.WORLD if group is None else group)

    def disable_row_parallelism(self) -> None:
        """Undo `enable_row_parallelism`."""
        self.row_group = None

    def row_share(self, rows: int) -> RowShare | None:
        """This rank's share of so many latent rows; None where it has all of them."""
        return RowShare.of(rows, self.row_group)
