"""Building blocks of the 3D causal VAE: norms, residual blocks, resampling in time and space, and the two towers.

Shapes: B batch, C channels, F frames, H W of the feature map; z is the latent that the decoder's norms are conditioned on.
State-dict keys are the released checkpoints' (encoder.down_blocks.0.resnets.0.conv1.conv.weight, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation
from torch import Tensor, nn

from .causal_conv import CausalConv3d, ConvCache

__all__ = ["Decoder", "Encoder"]

NORM_OUT_EPS = 1e-6  # fixed in the released code, whatever config.norm_eps says


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


class SpatialNorm(nn.Module):
    """GroupNorm(x) * Y(z) + B(z): normalisation modulated by the latent (Movq, arXiv 2209.09002).

    Y and B are 1x1x1 convolutions. They commute with nearest resizing, so they run on the latent grid and only their
    results are resized to x: exact, and up to 256 times less work than convolving the resized latent.
    """

    def __init__(self, channels: int, latent_channels: int, groups: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def forward(self, x: Tensor, z: Tensor, cache: ConvCache) -> Tensor:
        """x (B, C, F, H, W), z (B, C_z, f, h, w) -> (B, C, F, H, W)."""
        scale, shift = (resize_to(conv(z, cache), x) for conv in (self.conv_y, self.conv_b))
        return torch.addcmul(shift, self.norm_layer(x), scale)


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


class ResnetBlock(nn.Module):
    """norm -> activation -> conv, twice, plus a shortcut (1x1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, act_fn: str, latent_channels: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            nn.GroupNorm(groups, channels, eps=eps) if latent_channels is None else SpatialNorm(channels, latent_channels, groups)
            for channels in (in_channels, out_channels)
        )
        self.nonlinearity = get_activation(act_fn)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel_size=3)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel_size=3)
        self.conv_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, x: Tensor, z: Tensor | None, cache: ConvCache) -> Tensor:
        """x (B, C_in, F, H, W), z the latent for the decoder, None for the encoder -> (B, C_out, F, H, W)."""
        hidden = x
        for norm, conv in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            hidden = norm(hidden) if z is None else norm(hidden, z, cache)
            hidden = conv(self.nonlinearity(hidden), cache)
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve height and width; with `compress_time` also average frames in pairs, leaving a single first frame alone."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)
        self.compress_time = compress_time

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C, F or (F+1)//2, H//2, W//2)."""
        if self.compress_time:
            x = apart_from_first(lambda pairs: pairs.unflatten(2, (-1, 2)).mean(3), x)
        return per_frame(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)


class Upsample(nn.Module):
    """Double height and width; with `compress_time` also double the frames, leaving a single first frame alone."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.compress_time = compress_time

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, H, W) -> (B, C, F or 2F or 2F-1, 2H, 2W)."""
        if self.compress_time:
            x = apart_from_first(lambda frames: frames.repeat_interleave(2, dim=2), x)
        return per_frame(lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)), x)


class Level(nn.Module):
    """Residual blocks of one resolution, then a resampler in the list that the checkpoints call `downsamplers` or `upsamplers`."""

    _gradient_checkpointing_func: Any  # set, with gradient_checkpointing, by diffusers' ModelMixin

    def __init__(self, widths: Sequence[int], resamplers: str = "", resampler: nn.Module | None = None, **block: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, **block) for a, b in pairwise(widths))
        self.resampler_name = resamplers if resampler is not None else None
        if resampler is not None:
            setattr(self, resamplers, nn.ModuleList([resampler]))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, z: Tensor | None, cache: ConvCache) -> Tensor:
        """(B, C_in, F, H, W) -> (B, C_out, F', H', W') after the resampler."""
        for resnet in self.resnets:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(resnet, x, z, cache)
            else:
                x = resnet(x, z, cache)
        return getattr(self, self.resampler_name)[0](x) if self.resampler_name else x


class _Tower(nn.Module):
    """What encoder and decoder share: conv_in, a middle level, the closing norm, activation and conv_out."""

    def __init__(self, in_channels: int, out_channels: int, mid: int, first: int, last: int, groups: int, **block: Any) -> None:
        super().__init__()
        latent_channels = block["latent_channels"]
        self.conv_in = CausalConv3d(in_channels, first, kernel_size=3)
        self.mid_block = Level([mid] * 3, groups=groups, **block)
        self.norm_out = (
            nn.GroupNorm(groups, last, eps=NORM_OUT_EPS) if latent_channels is None else SpatialNorm(last, latent_channels, groups)
        )
        self.conv_act = nn.SiLU()
        self.conv_out = CausalConv3d(last, out_channels, kernel_size=3)

    def close(self, x: Tensor, z: Tensor | None, cache: ConvCache) -> Tensor:
        """norm -> SiLU -> conv_out."""
        x = self.norm_out(x) if z is None else self.norm_out(x, z, cache)
        return self.conv_out(self.conv_act(x), cache)


class Encoder(_Tower):
    """(B, 3, F, H, W) -> (B, 2 C_z, f, h, w): mean and log-variance of the latent, one chunk of frames at a time."""

    def __init__(self, in_channels: int, latent_channels: int, widths: Sequence[int], layers: int, time_levels: int, **block: Any) -> None:
        block["latent_channels"] = None  # the encoder's norms are plain GroupNorm
        super().__init__(in_channels, 2 * latent_channels, widths[-1], widths[0], widths[-1], **block)
        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            down = Downsample(width, compress_time=i < time_levels) if i < len(widths) - 1 else None
            self.down_blocks.append(Level([before] + [width] * layers, "downsamplers", down, **block))

    def forward(self, x: Tensor, cache: ConvCache) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> (B, 2 C_z, f, h, w)."""
        x = self.conv_in(x, cache)
        for level in [*self.down_blocks, self.mid_block]:
            x = level(x, None, cache)
        return self.close(x, None, cache)


class Decoder(_Tower):
    """(B, C_z, f, h, w) -> (B, 3, F, H, W), one chunk of latent frames at a time."""

    def __init__(self, latent_channels: int, out_channels: int, widths: Sequence[int], layers: int, time_levels: int, **block: Any) -> None:
        block["latent_channels"] = latent_channels
        widths = list(reversed(widths))
        super().__init__(latent_channels, out_channels, widths[0], widths[0], widths[-1], **block)
        self.up_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            up = Upsample(width, compress_time=i < time_levels) if i < len(widths) - 1 else None
            self.up_blocks.append(Level([before] + [width] * (layers + 1), "upsamplers", up, **block))

    def forward(self, z: Tensor, cache: ConvCache) -> Tensor:
        """(B, C_z, f, h, w) -> (B, 3, F, H, W)."""
        x = self.conv_in(z, cache)
        for level in [self.mid_block, *self.up_blocks]:
            x = level(x, z, cache)
        return self.close(x, z, cache)
