"""A chunk of frames, channels last, and how it is walked over in bands of rows.

Shapes: B batch, F frames, H W of the feature map, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Bands", "Frames", "double_frames"]


@dataclass(frozen=True)
class Bands:
    """How many rows of a feature map are worked on at once.

    Args:
        budget: bytes that the input of one convolution may take; None for no limit.
        rows: rows of the whole picture that a band may have; None for no limit.
        picture: rows of the whole picture.
    """

    budget: int | None = None
    rows: int | None = None
    picture: int = 1

    def over(self, height: int, row_bytes: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of the bands of a map of `height` rows whose rows take `row_bytes` each; at least one row each."""
        most = height
        if self.budget is not None:
            most = min(most, self.budget // row_bytes)
        if self.rows is not None:
            most = min(most, self.rows * height // self.picture)
        step = max(1, most)
        return ((start, min(start + step, height)) for start in range(0, height, step))


def _released(start: int, stop: int) -> Tensor:
    raise RuntimeError(f"rows {start} to {stop} were asked of frames that are released")


@dataclass
class Frames:
    """(B, F, H, W, C), or rows that are made whenever they are asked for.

    Args:
        shape: (B, F, H, W, C).
        make: rows(start, stop) -> (B, F, stop - start, W, C), channels contiguous.
        whole: the tensor behind it, where there is one.
        doubled: every frame stands for two equal ones ...
        single: ... but the first, which stands for itself.
    """

    shape: tuple[int, int, int, int, int]
    make: Callable[[int, int], Tensor]
    whole: Tensor | None = None
    doubled: bool = False
    single: bool = False

    @classmethod
    def of(cls, x: Tensor) -> Frames:
        """Of a tensor (B, F, H, W, C)."""
        batch, frames, height, width, channels = x.shape
        return cls((batch, frames, height, width, channels), lambda start, stop: x[:, :, start:stop], x)

    def release(self) -> None:
        """Give the memory back, whoever still holds these frames; they cannot be used any more."""
        self.whole = None
        self.make = _released

    @property
    def count(self) -> int:
        """Frames that they stand for."""
        frames = self.shape[1]
        return 2 * frames - self.single if self.doubled else frames

    @property
    def weights(self) -> list[int]:
        """How many frames each one stands for, (F,)."""
        return [2 if self.doubled and not (self.single and index == 0) else 1 for index in range(self.shape[1])]

    def row_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one row of all frames and batch elements."""
        batch, frames, _, width, channels = self.shape
        return batch * frames * width * channels * dtype.itemsize


def double_frames(x: Tensor, single: bool, out: Tensor) -> None:
    """Write every frame of x (B, F, H, W, C) twice to `out`, but the first once where it is `single`."""
    first = int(single)
    out[:, :first] = x[:, :first]
    out[:, first::2] = x[:, first:]
    out[:, first + 1 :: 2] = x[:, first:]
