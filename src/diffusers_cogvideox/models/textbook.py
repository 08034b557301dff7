"""The VAE's layers as they are written down: whole tensors, differentiable. What training uses, and the oracle of `rowwise`.

Shapes: B batch, C channels, F frames, H W of the feature map; z is the latent that the decoder's norms are conditioned on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv import ConvCache
from .vae_blocks import Downsample, ResnetBlock, SpatialNorm, Tower, Upsample

__all__ = ["Textbook"]


def per_frame(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `fn` on pictures (B*F, C, H, W) to every frame of x (B, C, F, H, W)."""
    frames = fn(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def apart_from_first(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply `fn` along time to x (B, C, F, H, W); an odd number of frames starts with a single one that `fn` does not see.

    The causal VAE compresses 4k+1 frames to k+1: the first frame stands alone, the others go in pairs.
    """
    single = x.shape[2] % 2
    if x.shape[2] == 1:
        return x
    if not single:
        return fn(x)
    return torch.cat([x[:, :, :1], fn(x[:, :, 1:])], dim=2)


def resize_to(z: Tensor, x: Tensor) -> Tensor:
    """z (B, C, f, h, w) to the frames, height and width of x by nearest neighbour; a single first frame stays single."""
    size = x.shape[2:]
    if z.shape[2:] == size:
        return z
    if size[0] % 2 == 0 or size[0] == 1:
        return F.interpolate(z, size=size)
    first = F.interpolate(z[:, :, :1], size=(1, *size[1:]))
    rest = F.interpolate(z[:, :, 1:], size=(size[0] - 1, *size[1:]))
    return torch.cat([first, rest], dim=2)


class Textbook:
    """Computes one chunk of frames (`vae_blocks.Arithmetic`) with the cache that the chunk before left.

    z is (B, C_z, f, h, w) for the decoder, None for the encoder. The 1x1x1 convolutions of the decoder's norms commute with nearest
    resizing, so they run on the latent grid and only their results are resized: exact, and up to 256 times less work.
    """

    def __init__(self, cache: ConvCache, z: Tensor | None) -> None:
        self.cache, self.z = cache, z

    def enter(self, tower: Tower, x: Tensor) -> Tensor:
        """(B, C_in, F, H, W) -> (B, C, F, H, W)."""
        return tower.conv_in(x, self.cache)

    def resnet(self, block: ResnetBlock, x: Tensor) -> Tensor:
        """(B, C_in, F, H, W) -> (B, C_out, F, H, W)."""
        hidden = x
        for norm, conv in ((block.norm1, block.conv1), (block.norm2, block.conv2)):
            hidden = conv(block.nonlinearity(self._norm(norm, hidden)), self.cache)
        return hidden + (x if block.conv_shortcut is None else block.conv_shortcut(x))

    def downsample(self, layer: Downsample, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C, F or (F+1)//2, H//2, W//2)."""
        if layer.compress_time:
            x = apart_from_first(lambda pairs: pairs.unflatten(2, (-1, 2)).mean(3), x)
        return per_frame(lambda frames: layer.conv(F.pad(frames, (0, 1, 0, 1))), x)

    def upsample(self, layer: Upsample, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C, F or 2F or 2F-1, 2H, 2W)."""
        if layer.compress_time:
            x = apart_from_first(lambda frames: frames.repeat_interleave(2, dim=2), x)
        return per_frame(lambda frames: layer.conv(F.interpolate(frames, scale_factor=2.0)), x)

    def leave(self, tower: Tower, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C_out, F, H, W)."""
        return tower.conv_out(tower.conv_act(self._norm(tower.norm_out, x)), self.cache)

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        if not isinstance(norm, SpatialNorm):
            return norm(x)
        scale, shift = (resize_to(conv.conv(self.z), x) for conv in (norm.conv_y, norm.conv_b))
        return torch.addcmul(shift, norm.norm_layer(x), scale)
