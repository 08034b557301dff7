"""The VAE's layers computed exactly, fast and in little memory: fewer multiplications, bands of rows, no copies of whole feature maps.

The same function as `textbook`, up to rounding, without gradients:

* convolutions along time, and on a processor along rows, by `filtering`,
* frames that the decoder doubles are kept, normalised and convolved once,
* nearest upsampling and the 3x3 convolution behind it as one 2x2 convolution per output phase: 4/9 of the work,
* normalisation, modulation by the latent and activation of a band just before it is convolved, in one buffer that also holds the frames of
  the chunk before: nothing is concatenated, and a feature map is read once and written once,
* residual sums in place.

GroupNorm needs the statistics of the whole chunk first; below that, rows may be cut as one likes.

Shapes: B batch, F frames, H W of the feature map, C channels, channels last; z (B, C_z, f, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal_conv import CausalConv3d, ConvCache, Past
from .filtering import FIRST, MINIMAL_4, Filtering, filter_frames, steps_for, transformed_taps
from .frames import Bands, Frames, double_frames
from .leaves import Conv2d, Conv3d, GroupNorm
from .norms import group_statistics, norm_affine, normalise
from .row_share import Border, RowShare
from .vae_blocks import Downsample, ResnetBlock, SpatialNorm, Tower, Upsample

__all__ = ["Rowwise", "joint_frames", "row_filtering"]

# Writes what is convolved, from rows (B, F, rows, W, C) that begin at a row of the map, to a buffer of the same shape.
Prepare = Callable[[Tensor, int, Tensor], None]
# Is shown each band of the input (B, F, rows, W, C), and where it begins.
Beside = Callable[[Tensor, int], None]


def joint_frames(conv: CausalConv3d, dtype: torch.dtype, device: torch.device) -> int:
    """How many output frames of a convolution to compute together: 4 in float32, in half precision 2, or 1 on a processor.

    Four would round more than diffusers' VAE does in half precision; two round 3 to 7 % less, one 7 to 12 % (both on a processor). A
    processor's matrix units are so fast there that saved multiplications do not pay for the passes over memory that save them. Neither do
    the few that a picture of three channels takes: the products would be many times as large as it.
    """
    if dtype == torch.float32:
        return 4
    return 1 if device.type == "cpu" or conv.conv.in_channels < _PICTURE else 2


_PICTURE = 8  # channels below which convolutions in half precision are left as they are
_FILTERED = 64  # channels from which on saved multiplications outweigh the passes over memory that save them


def row_filtering(conv: CausalConv3d, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Filtering | None:
    """How the rows of maps of `size` (H, W) are filtered in a convolution; None where the library's own way is as good.

    It pays on a processor in float32, where multiplications are what takes the time, unless the map has few channels, or so few pixels that
    reading the taps, four times as many numbers as the weight has, takes longer than convolving with them.
    """
    widths = (conv.conv.in_channels, conv.conv.out_channels)
    pays = min(widths) >= _FILTERED and size[0] * size[1] >= max(widths)
    return MINIMAL_4 if pays and dtype == torch.float32 and device.type == "cpu" else None


@dataclass
class Rowwise:
    """Computes one chunk of frames (`vae_blocks.Arithmetic`) with the cache that the chunk before left, which it updates in place.

    Args:
        cache: frames of the chunk before.
        z: (B, C_z, f, h, w) for the decoder, None for the encoder.
        bands: how many rows at once.
        dtype, device: of the arithmetic.
        lean: make upsampled rows anew wherever they are needed, three times, and never keep all of them, nor weights in another form.
        share: which rows of the picture these are, where other ranks have the rest.
    """

    cache: ConvCache
    z: Tensor | None
    bands: Bands
    dtype: torch.dtype
    device: torch.device
    lean: bool = False
    share: RowShare | None = None

    def enter(self, tower: Tower, x: Tensor) -> Frames:
        """(B, C_in, F, H, W) -> (B, F, H, W, C)."""

        def copy(rows: Tensor, _: int, out: Tensor) -> None:
            out.copy_(rows)

        return self._convolve(tower.conv_in, Frames.of(x.movedim(1, -1).to(self.dtype).contiguous()), copy)

    def resnet(self, block: ResnetBlock, x: Frames) -> Frames:
        """(B, F, H, W, C_in) -> (B, F', H, W, C_out) with all the frames that x stands for."""
        first, again = self._prepare(block.norm1, block.nonlinearity, x), x.whole is None
        residual, fill = (None, None) if again else self._residual(block, x)
        hidden = self._convolve(block.conv1, x, first, beside=fill)
        if again:  # rows are made anew, so that the residual sum, as large as the result, is not there any sooner
            residual, fill = self._residual(block, x)
            assert fill is not None
            for start, stop in self.bands.over(x.shape[2], x.row_bytes(self.dtype)):
                fill(x.make(start, stop), start)
        if residual is not x.whole:
            x.release()
        return self._convolve(block.conv2, hidden, self._prepare(block.norm2, block.nonlinearity, hidden), onto=residual)

    def downsample(self, layer: Downsample, x: Frames) -> Frames:
        """(B, F, H, W, C) -> (B, F or (F+1)//2, H//2, W//2, C)."""
        batch, frames, height, width, channels = x.shape
        pairs = frames // 2 if layer.compress_time else 0
        alone = frames - 2 * pairs
        weight, bias = layer.conv(self._weights)
        out = self._empty(batch, alone + pairs, height // 2, width // 2, channels)
        for start, stop in self.bands.over(height // 2, 2 * x.row_bytes(self.dtype)):
            rows = x.make(2 * start, min(2 * stop + 1, height))
            # One row and one column of zeros behind the picture.
            means = rows.new_zeros(batch, alone + pairs, 2 * (stop - start) + 1, width + 1, channels)
            inside = means[:, :, : rows.shape[2], :width]
            inside[:, :alone] = rows[:, :alone]
            if pairs:
                torch.add(rows[:, alone::2], rows[:, alone + 1 :: 2], out=inside[:, alone:]).mul_(0.5)
            pictures = F.conv2d(means.flatten(0, 1).permute(0, 3, 1, 2), weight, bias, stride=2)
            out[:, :, start:stop] = pictures.permute(0, 2, 3, 1).unflatten(0, (batch, -1))
        x.release()
        return Frames.of(out)

    def upsample(self, layer: Upsample, x: Frames) -> Frames:
        """(B, F, H, W, C) -> (B, F, 2H, 2W, C); frames that are to be doubled are only marked so."""
        batch, frames, height, width, _ = x.shape
        phases, bias = layer.conv(lambda conv: (self._phases(conv), self._bias(conv)))

        source, border = replace(x), self._border(x)  # x itself may be released by whoever made it

        def make(start: int, stop: int, which: slice = slice(None)) -> Tensor:
            first, last = start // 2, (stop + 1) // 2
            rows = source.make(max(first - 1, 0), min(last + 1, height))[:, which]
            around = F.pad(rows, (0, 0, 1, 1, int(first == 0), int(last == height)))
            for edge, index in ((first == 0, 0), (last == height, -1)):
                row = border.row_at(index)
                if edge and row is not None:
                    around[:, :, index, 1:-1] = row[:, which, 0]
            made = enlarge(around.flatten(0, 1), phases, bias).unflatten(0, (batch, -1))
            return made[:, :, start - 2 * first : stop - 2 * first]

        doubled = layer.compress_time and frames > 1
        enlarged = Frames(
            shape=(batch, frames, 2 * height, 2 * width, layer.conv.out_channels),
            make=make,
            doubled=doubled,
            single=doubled and frames % 2 == 1,
        )
        if self.lean:
            return enlarged
        whole = self._empty(*enlarged.shape)
        for frame in range(frames):  # each by itself: bands of one frame are high, and few rows are needed twice
            for start, stop in self.bands.over(2 * height, 2 * enlarged.row_bytes(self.dtype) // frames):
                whole[:, frame : frame + 1, start:stop] = make(start, stop, slice(frame, frame + 1))
        x.release()
        return replace(Frames.of(whole), doubled=enlarged.doubled, single=enlarged.single)

    def leave(self, tower: Tower, x: Frames) -> Tensor:
        """(B, F, H, W, C) -> (B, C_out, F, H, W)."""
        out = self._convolve(tower.conv_out, x, self._prepare(tower.norm_out, tower.conv_act, x))
        return out.make(0, out.shape[2]).movedim(-1, 1).contiguous()

    # --- what a layer consists of ---------------------------------------------------------------------------------------

    def _residual(self, block: ResnetBlock, x: Frames) -> tuple[Tensor | None, Beside | None]:
        """What the output is added to, (B, F, H, W, C_out): x itself where that will do, else what is filled while x is walked over."""
        if block.conv_shortcut is None and x.whole is not None and not x.doubled:
            return x.whole, None
        weight, bias = (None, None) if block.conv_shortcut is None else block.conv_shortcut(self._weights)
        batch, _, height, width, channels = x.shape
        residual = self._empty(batch, x.count, height, width, channels if weight is None else len(weight))

        def fill(rows: Tensor, start: int) -> None:
            if weight is not None:
                rows = F.linear(rows, weight.flatten(1), bias)
            target = residual[:, :, start : start + rows.shape[2]]
            if x.doubled:
                double_frames(rows, x.single, target)
            else:
                target.copy_(rows)

        return residual, fill

    def _prepare(self, norm: nn.Module, activation: nn.Module, x: Frames) -> Prepare:
        """Normalisation and activation of rows of x; walks over x for the statistics."""
        statistics = group_statistics(x, groups_of(norm), self.bands, self.dtype)
        affine = norm_affine(norm, statistics if self.share is None else self.share.statistics(*statistics), self.z)

        def prepare(rows: Tensor, start: int, out: Tensor) -> None:
            top, height = (start, x.shape[2]) if self.share is None else self.share.place(start, x.shape[2])
            normalise(rows, (top, top + rows.shape[2]), height, affine, activation, out)

        return prepare

    def _convolve(
        self, conv: CausalConv3d, x: Frames, prepare: Prepare, *, onto: Tensor | None = None, beside: Beside | None = None
    ) -> Frames:
        """The causal convolution of what `prepare` makes of x: (B, F', H, W, C_out), added to `onto` where that is given."""
        batch, frames, height, width, channels = x.shape
        border, inner = self._border(x), self.share.inner if self.share else (False, False)
        past = Past(self.cache, conv, doubled=x.doubled, single=x.single, inner=inner)
        largest = joint_frames(conv, self.dtype, self.device)
        steps = list(steps_for(frames, first=past.first, doubled=x.doubled, single=x.single, largest=largest))
        by_rows = row_filtering(conv, (height, width), self.dtype, self.device)
        taps, bias = conv.conv(lambda layer: ([self._taps(layer, step.filtering, by_rows) for step in steps], self._bias(layer)))
        out = onto if onto is not None else self._empty(batch, x.count, height, width, conv.conv.out_channels)
        for start, stop in self.bands.over(height, x.row_bytes(self.dtype)):
            above, below = int(start > 0), int(stop < height)
            rows = x.make(start - above, stop + below)
            work = rows.new_empty(batch, past.length + frames, stop - start + 2, width, channels)
            prepare(rows, start - above, work[:, past.length :, 1 - above : work.shape[2] - 1 + below])
            for edge, index, place in ((not above, 0, -1), (not below, -1, height)):
                row = border.row_at(index) if edge else None
                if row is not None:
                    prepare(row, place, work[:, past.length :, index:][:, :, :1])
                elif edge:
                    work[:, :, index] = 0
            inside = work[:, :, int(not (above or inner[0])) : work.shape[2] - int(not (below or inner[1]))]
            past.exchange(inside, start, stop, height)
            for step, step_taps in zip(steps, taps, strict=True):
                filter_frames(work, step_taps, bias, step, out[:, :, start:stop], add=onto is not None, rows=by_rows)
            if beside is not None:
                beside(rows[:, :, above : above + stop - start], start)
            del rows, work, inside  # before the next band's are made
        past.keep()
        return Frames.of(out)

    def _border(self, x: Frames) -> Border:
        """The rows around those of x, where other ranks have them."""
        return Border() if self.share is None else self.share.border(x)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    # --- weights --------------------------------------------------------------------------------------------------------

    def _weights(self, layer: Conv2d | Conv3d) -> tuple[Tensor, Tensor | None]:
        return layer.weight.detach().to(self.dtype), self._bias(layer)

    def _bias(self, layer: Conv2d | Conv3d) -> Tensor | None:
        return None if layer.bias is None else layer.bias.detach().to(self.dtype)

    def _taps(self, layer: Conv3d, filtering: Filtering, rows: Filtering | None) -> Tensor:
        def make(weight: Tensor) -> Tensor:
            return transformed_taps(weight, filtering, self.dtype, rows)

        # What the first frame takes, the first chunk alone needs.
        return self._derived(layer, (filtering, rows, self.dtype), make, keep=filtering is not FIRST)

    def _phases(self, layer: Conv2d) -> Tensor:
        return self._derived(layer, ("phases", self.dtype), lambda weight: upsampling_phases(weight).to(self.dtype))

    def _derived(self, layer: Conv2d | Conv3d, name: Hashable, make: Callable[[Tensor], Tensor], keep: bool = True) -> Tensor:
        """What `make` makes of the layer's weight, kept for the next chunk unless memory is short."""
        return layer.derived(name, make) if keep and not self.lean else make(layer.weight.detach())


def groups_of(norm: nn.Module) -> int:
    """Number of groups of a `GroupNorm` or `SpatialNorm`."""
    layer = norm.norm_layer if isinstance(norm, SpatialNorm) else norm
    assert isinstance(layer, GroupNorm)
    return layer.num_groups


# A 3-tap filter on pixels that stand twice, seen from the first and the second of such a pair: two taps on the pixels themselves.
_PHASES = (((1, 0, 0), (0, 1, 1)), ((1, 1, 0), (0, 0, 1)))


def upsampling_phases(weight: Tensor) -> Tensor:
    """(4 C_out, C_in, 2, 2), float32, from a weight (C_out, C_in, 3, 3): one 2x2 filter per row and column phase of twofold upsampling."""
    phases = torch.tensor(_PHASES, dtype=torch.float32, device=weight.device)  # (phase, tap, old tap)
    return torch.einsum("pah,qbw,oihw->pqoiab", phases, phases, weight.float()).flatten(0, 2)


def enlarge(x: Tensor, phases: Tensor, bias: Tensor | None) -> Tensor:
    """Nearest upsampling by two and a 3x3 convolution: (N, H + 2, W + 2, C_in) with a border -> (N, 2H, 2W, C_out)."""
    channels = len(phases) // len(_PHASES) ** 2
    every = None if bias is None else bias.repeat(len(_PHASES) ** 2)
    y = F.conv2d(x.permute(0, 3, 1, 2), phases, every).permute(0, 2, 3, 1)  # (N, H + 1, W + 1, 4 C_out)
    height, width = y.shape[1] - 1, y.shape[2] - 1
    out = y.new_empty(len(y), height, 2, width, 2, channels)
    for phase in range(4):
        row, column = divmod(phase, 2)
        out[:, :, row, :, column] = y[:, row : row + height, column : column + width, phase * channels : (phase + 1) * channels]
    return out.view(len(y), 2 * height, 2 * width, channels)
