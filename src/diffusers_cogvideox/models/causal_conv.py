"""Convolution that is causal in time, and the cache that carries it from one chunk of frames to the next.

Shapes: B batch, C channels, F frames, H W height and width of the feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CausalConv3d", "ConvCache"]


class ConvCache:
    """The last `k_t - 1` input frames of every causal convolution that has a temporal kernel, for one chunk.

    A chunk reads what the chunk before it left (`previous`) and writes its own (`current`), once. The two are kept apart so
    that a recomputed forward (gradient checkpointing) reads what the first one read; it writes nothing, because a tensor kept
    here would keep the recomputed activations alive.
    """

    def __init__(self, previous: dict[nn.Module, Tensor] | None = None) -> None:
        self.previous = previous or {}
        self.current: dict[nn.Module, Tensor] = {}

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
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size, padding=(0, padding, padding))

    def forward(self, x: Tensor, cache: ConvCache) -> Tensor:
        """(B, C_in, F, H, W) -> (B, C_out, F, H, W); frame f sees frames <= f only."""
        if self.history:
            past = cache.previous.get(self)
            if past is None:
                past = x[:, :, :1].expand(-1, -1, self.history, -1, -1)
            x = torch.cat([past, x], dim=2)
            if self not in cache.current:  # else recomputed for its gradient: the next chunk has read the first result already
                # A copy, not a view: a view would keep the whole chunk alive until the next one is done.
                cache.current[self] = x[:, :, -self.history :].clone()
        return self.conv(x)
