"""Building blocks of the 3D causal VAE: norms, residual blocks, resampling in time and space, and the two towers.

The blocks say what there is and in which order it runs; how it is computed is the business of the `Arithmetic` that they are handed.
State-dict keys are the released checkpoints' (encoder.down_blocks.0.resnets.0.conv1.conv.weight, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from diffusers.models.activations import get_activation
from torch import Tensor, nn

from .causal_conv import CausalConv3d
from .leaves import Conv2d, Conv3d, GroupNorm

__all__ = ["Arithmetic", "Decoder", "Downsample", "Encoder", "ResnetBlock", "SpatialNorm", "Tower", "Upsample"]

NORM_OUT_EPS = 1e-6  # fixed in the released code, whatever config.norm_eps says


class Arithmetic(Protocol):
    """How the layers are computed, for one chunk of frames; what it passes from layer to layer is its own affair."""

    def enter(self, tower: Tower, x: Tensor) -> Any:
        """conv_in of x (B, C, F, H, W)."""

    def resnet(self, block: ResnetBlock, x: Any) -> Any:
        """norm -> activation -> conv, twice, plus the shortcut."""

    def downsample(self, layer: Downsample, x: Any) -> Any:
        """Frames averaged in pairs where the layer says so, then height and width halved."""

    def upsample(self, layer: Upsample, x: Any) -> Any:
        """Frames doubled where the layer says so, then height and width doubled."""

    def leave(self, tower: Tower, x: Any) -> Tensor:
        """norm_out -> SiLU -> conv_out: (B, C, F, H, W)."""


class SpatialNorm(nn.Module):
    """GroupNorm(x) * Y(z) + B(z): normalisation modulated by the latent z (Movq, arXiv 2209.09002)."""

    def __init__(self, channels: int, latent_channels: int, groups: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(groups, channels, eps=1e-6)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)


class ResnetBlock(nn.Module):
    """norm -> activation -> conv, twice, plus a shortcut (1x1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, eps: float, act_fn: str, latent_channels: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (
            GroupNorm(groups, channels, eps=eps) if latent_channels is None else SpatialNorm(channels, latent_channels, groups)
            for channels in (in_channels, out_channels)
        )
        self.nonlinearity = get_activation(act_fn)
        self.conv1 = CausalConv3d(in_channels, out_channels, kernel_size=3)
        self.conv2 = CausalConv3d(out_channels, out_channels, kernel_size=3)
        self.conv_shortcut = Conv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, x: Any, how: Arithmetic) -> Any:
        """(B, C_in, F, H, W) -> (B, C_out, F, H, W)."""
        return how.resnet(self, x)


class Downsample(nn.Module):
    """Halve height and width; with `compress_time` also average frames in pairs, leaving a single first frame alone."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, kernel_size=3, stride=2)
        self.compress_time = compress_time

    def forward(self, x: Any, how: Arithmetic) -> Any:
        """(B, C, F, H, W) -> (B, C, F or (F+1)//2, H//2, W//2)."""
        return how.downsample(self, x)


class Upsample(nn.Module):
    """Double height and width; with `compress_time` also double the frames, leaving a single first frame alone."""

    def __init__(self, channels: int, compress_time: bool) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, kernel_size=3, padding=1)
        self.compress_time = compress_time

    def forward(self, x: Any, how: Arithmetic) -> Any:
        """(B, C, F, H, W) -> (B, C, F or 2F or 2F-1, 2H, 2W)."""
        return how.upsample(self, x)


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

    def forward(self, x: Any, how: Arithmetic) -> Any:
        """(B, C_in, F, H, W) -> (B, C_out, F', H', W') after the resampler."""
        for resnet in self.resnets:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(resnet, x, how)
            else:
                x = resnet(x, how)
        return getattr(self, self.resampler_name)[0](x, how) if self.resampler_name else x


class Tower(nn.Module):
    """What encoder and decoder share: conv_in, the levels in their order, the closing norm, activation and conv_out."""

    def __init__(self, in_channels: int, out_channels: int, mid: int, first: int, last: int, groups: int, **block: Any) -> None:
        super().__init__()
        latent_channels = block["latent_channels"]
        self.conv_in = CausalConv3d(in_channels, first, kernel_size=3)
        self.mid_block = Level([mid] * 3, groups=groups, **block)
        self.norm_out = GroupNorm(groups, last, eps=NORM_OUT_EPS) if latent_channels is None else SpatialNorm(last, latent_channels, groups)
        self.conv_act = nn.SiLU()
        self.conv_out = CausalConv3d(last, out_channels, kernel_size=3)

    def levels(self) -> list[nn.Module]:
        """In the order in which they run."""
        raise NotImplementedError

    def forward(self, x: Tensor, how: Arithmetic) -> Tensor:
        """(B, C_in, F, H, W) -> (B, C_out, F', H', W'), one chunk of frames at a time."""
        hidden = how.enter(self, x)
        for level in self.levels():
            hidden = level(hidden, how)
        return how.leave(self, hidden)


class Encoder(Tower):
    """(B, 3, F, H, W) in [-1, 1] -> (B, 2 C_z, f, h, w): mean and log-variance of the latent."""

    def __init__(self, in_channels: int, latent_channels: int, widths: Sequence[int], layers: int, time_levels: int, **block: Any) -> None:
        block["latent_channels"] = None  # the encoder's norms are plain GroupNorm
        super().__init__(in_channels, 2 * latent_channels, widths[-1], widths[0], widths[-1], **block)
        self.down_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            down = Downsample(width, compress_time=i < time_levels) if i < len(widths) - 1 else None
            self.down_blocks.append(Level([before] + [width] * layers, "downsamplers", down, **block))

    def levels(self) -> list[nn.Module]:
        """Down, then the middle."""
        return [*self.down_blocks, self.mid_block]


class Decoder(Tower):
    """(B, C_z, f, h, w) -> (B, 3, F, H, W)."""

    def __init__(self, latent_channels: int, out_channels: int, widths: Sequence[int], layers: int, time_levels: int, **block: Any) -> None:
        block["latent_channels"] = latent_channels
        widths = list(reversed(widths))
        super().__init__(latent_channels, out_channels, widths[0], widths[0], widths[-1], **block)
        self.up_blocks = nn.ModuleList()
        for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            up = Upsample(width, compress_time=i < time_levels) if i < len(widths) - 1 else None
            self.up_blocks.append(Level([before] + [width] * (layers + 1), "upsamplers", up, **block))

    def levels(self) -> list[nn.Module]:
        """The middle, then up."""
        return [self.mid_block, *self.up_blocks]
