"""Convolution that is causal in time, and the cache that carries it from one chunk of frames to the next.

Shapes: B batch, C channels, F frames, H W height and width of the feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .leaves import Conv3d

__all__ = ["CausalConv3d", "ConvCache", "Past"]


class ConvCache:
    """The last input frames of every causal convolution that has a temporal kernel, for one chunk.

    A chunk reads what the chunk before it left (`previous`) and writes its own (`current`), once. The two are kept apart so
    that a recomputed forward (gradient checkpointing) reads what the first one read; it writes nothing, because a tensor kept
    here would keep the recomputed activations alive.
    """

    def __init__(self, previous: dict[nn.Module, Tensor] | None = None) -> None:
        self.previous = previous or {}
        self.current: dict[nn.Module, Tensor] = {}

    def take(self, conv: nn.Module) -> Tensor | None:
        """What the chunk before left for a convolution, which is not kept here any longer; None in the first chunk."""
        return self.previous.pop(conv, None)

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        """Leave the last frames of this chunk to the next one."""
        self.current[conv] = frames

    def advance(self) -> ConvCache:
        """The cache to hand to the next chunk; what this chunk read is released."""
        return ConvCache(self.current)


class CausalConv3d(nn.Module):
    """Stride-1 convolution over (B, C, F, H, W): zeros around the picture, earlier frames in front (CogVideoX paper, section 2.1).

    The first chunk is preceded by copies of its own first frame, a later chunk by the frames kept from the chunk before.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.history = kernel_size - 1
        padding = kernel_size // 2
        self.conv = Conv3d(in_channels, out_channels, kernel_size, padding=(0, padding, padding))

    def forward(self, x: Tensor, cache: ConvCache) -> Tensor:
        """(B, C_in, F, H, W) -> (B, C_out, F, H, W); frame f sees frames <= f only."""
        if self.history:
            past = cache.previous.get(self)
            if past is None:
                past = x[:, :, :1].expand(-1, -1, self.history, -1, -1)
            x = torch.cat([past, x], dim=2)
            if self not in cache.current:  # else recomputed for its gradient: the next chunk has read the first result already
                # A copy, not a view: a view would keep the whole chunk alive until the next one is done.
                cache.keep(self, x[:, :, -self.history :].clone())
        return self.conv(x)


class Past:
    """The frames in front of a chunk, for one convolution that is computed in bands of rows, channels last.

    What the chunk before left is exchanged band by band for what this one leaves, in the same memory.

    Args:
        doubled: every frame stands for two equal ones: then one frame is the history of two.
        single: the very first frame of all stands for itself: then nothing precedes it.
        inner: whether the map goes on above its first row and below its last: then the row there is kept, too.
    """

    def __init__(
        self, cache: ConvCache, conv: CausalConv3d, *, doubled: bool, single: bool, inner: tuple[bool, bool] = (False, False)
    ) -> None:
        self.inner = inner
        self.cache, self.conv = cache, conv
        self.kept = cache.take(conv)  # (B, 1 or 2, H, W, C)
        self.first = self.kept is None
        self.keeps = 1 if doubled else conv.history
        self.length = (0 if single else 1) if self.first else self.keeps
        if self.kept is not None and self.kept.shape[1] > self.keeps:
            self.kept = self.kept[:, -self.keeps :].clone()
        self.edge: Tensor | None = None  # the row above the next band, as it was

    def exchange(self, frames: Tensor, start: int, stop: int, height: int) -> None:
        """Write the past to the first `length` frames, and keep the last ones of the band itself.

        Args:
            frames: (B, length + F, rows, W, C), rows of the band start .. stop and one more on either side where the map of `height` rows
                has one; the last F frames are there.
        """
        above, below = int(start > 0 or self.inner[0]), int(stop < height or self.inner[1])
        # Rows that no other band has for its own, first and last in frames, and where row 0 is in what is kept.
        top, bottom = above - int(start > 0), below - int(stop < height)
        offset = int(self.inner[0])
        past = frames[:, : self.length]
        last = frames[:, -self.keeps :, above - top : above + stop - start + bottom]
        if self.first:
            past.copy_(frames[:, self.length : self.length + 1].expand_as(past))
            if self.kept is None:
                self.kept = frames.new_empty(len(frames), self.keeps, height + sum(self.inner), *frames.shape[3:])
        elif self.kept is not None:
            past.copy_(self.kept[:, :, offset + start - above : offset + stop + below])
            if self.edge is not None:
                past[:, :, 0] = self.edge
            self.edge = self.kept[:, :, offset + stop - 1].clone() if stop < height else None
        if self.kept is not None:
            self.kept[:, :, offset + start - top : offset + stop + bottom] = last

    def keep(self) -> None:
        """Leave the last frames to the next chunk."""
        if self.kept is not None:
            self.cache.keep(self.conv, self.kept)
