"""How much memory the VAE will take: `rowwise` without the arithmetic.

Every layer adds up the bytes of what is alive while it runs; nothing is computed or allocated.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .causal_conv import CausalConv3d
from .filtering import FIRST, Filtering, as_volume, steps_for
from .frames import Bands, Frames
from .norms import piece_rows
from .rowwise import joint_frames, row_filtering
from .vae_blocks import Downsample, ResnetBlock, SpatialNorm, Tower, Upsample

__all__ = ["Accounting", "next_chunk"]


def _nothing(start: int, stop: int) -> Tensor:
    raise RuntimeError(f"rows {start} to {stop} were asked of an estimate, which has sizes only")


def _frames(shape: tuple[int, int, int, int, int], *, doubled: bool = False, single: bool = False) -> Frames:
    return Frames(shape, _nothing, doubled=doubled, single=single)


@dataclass
class Accounting:
    """Walks one chunk (`vae_blocks.Arithmetic`) and takes note of the `peak` in bytes.

    Args:
        bands, lean: as the `Rowwise` that it stands for.
        dtype, device: of the arithmetic.
        first: whether it is the first chunk of a video.
        kept: bytes of all caches, by convolution; those of an earlier chunk may be passed on.
        derived: bytes of the weights in the form in which they are used.
        elsewhere: the caches are kept in other memory, but for those in use.
        products: multiplications and additions of the convolutions as they are written down, which fewer may do.
    """

    bands: Bands
    dtype: torch.dtype
    device: torch.device
    lean: bool = False
    first: bool = True
    kept: dict[nn.Module, int] = field(default_factory=dict)
    derived: dict[Hashable, int] = field(default_factory=dict)
    elsewhere: bool = False
    peak: int = 0
    products: int = 0

    def enter(self, tower: Tower, x: torch.Size) -> Frames:
        """x is (B, C_in, F, H, W)."""
        batch, channels, frames, height, width = x
        self._cells = batch * frames * height * width
        source = _frames((batch, frames, height, width, channels))
        return self._convolve(tower.conv_in, source, self._bytes(source), normalises=False)

    def resnet(self, block: ResnetBlock, x: Frames) -> Frames:
        """x is (B, F, H, W, C_in)."""
        in_place = block.conv_shortcut is None and not x.doubled and not self._is_lazy(x)
        out = self._out(x, block.conv2.conv.out_channels)
        residual = 0 if in_place else self._bytes(out)
        again = self._is_lazy(x)
        first, second = self._affine(block.norm1), self._affine(block.norm2)
        hidden = self._convolve(block.conv1, x, first + self._held(x) + (0 if again else residual))
        if again:
            made = self._made(x, self._rows(x.shape[2], x.row_bytes(self.dtype)))
            self._note(first, self._held(x), self._bytes(hidden), residual, made)
        self._convolve(block.conv2, hidden, first + second + self._bytes(hidden) + (residual or self._bytes(x)), adds=True)
        return out

    def downsample(self, layer: Downsample, x: Frames) -> Frames:
        """x is (B, F, H, W, C)."""
        batch, frames, height, width, channels = x.shape
        frames -= frames // 2 if layer.compress_time else 0
        out = _frames((batch, frames, height // 2, width // 2, channels))
        self._multiply(layer.conv.weight, out)
        rows = self._rows(height // 2, 2 * x.row_bytes(self.dtype))
        self._note(self._held(x), self._bytes(out), batch * frames * self.dtype.itemsize * channels * (2 * rows + 1) * (width + 1))
        return out

    def upsample(self, layer: Upsample, x: Frames) -> Frames:
        """x is (B, F, H, W, C)."""
        batch, frames, height, width, _ = x.shape
        doubled = layer.compress_time and frames > 1
        self._forget_derived()
        self.derived[layer] = layer.conv.weight.numel() * 16 // 9 * self.dtype.itemsize
        shape = (batch, frames, 2 * height, 2 * width, layer.conv.out_channels)
        out = _frames(shape, doubled=doubled, single=doubled and frames % 2 == 1)
        self._multiply(layer.conv.weight, out)
        if self.lean:
            self._lazy = (out, self._bytes(x))
            return out
        one = _frames((batch, 1, *shape[2:]))  # frame by frame
        self._note(self._held(x), self._bytes(out), self._made(one, self._rows(2 * height, 2 * one.row_bytes(self.dtype))))
        return out

    def leave(self, tower: Tower, x: Frames) -> int:
        """Returns the peak."""
        out = self._convolve(tower.conv_out, x, self._affine(tower.norm_out) + self._held(x))
        self._note(2 * self._bytes(out))
        return self.peak

    _lazy: tuple[Frames | None, int] = (None, 0)
    _cells: int = 0  # of the grid of the latents, where those are the input

    def _forget_derived(self, but: type | tuple[()] = ()) -> None:
        """In lean arithmetic, weights in another form last for one layer; those that enlarged rows are made with, as long as the rows."""
        if self.lean:
            self.derived = {key: size for key, size in self.derived.items() if isinstance(key, but)}

    def _is_lazy(self, x: Frames) -> bool:
        return self._lazy[0] is x

    def _bytes(self, x: Frames) -> int:
        return x.row_bytes(self.dtype) * x.shape[2]

    def _held(self, x: Frames) -> int:
        """Bytes that x keeps alive: its own, or those of what its rows are made of."""
        return self._lazy[1] if self._is_lazy(x) else self._bytes(x)

    def _out(self, x: Frames, channels: int) -> Frames:
        batch, _, height, width, _ = x.shape
        return _frames((batch, x.count, height, width, channels))

    def _rows(self, height: int, row_bytes: int) -> int:
        start, stop = next(self.bands.over(height, row_bytes))
        return stop - start

    def _made(self, x: Frames, rows: int) -> int:
        """Bytes that making rows of an enlarged map takes: the product of its convolution and the rows themselves."""
        return 2 * (min(rows, x.shape[2]) + 4) * x.row_bytes(self.dtype)

    def _convolve(self, conv: CausalConv3d, x: Frames, held: int, adds: bool = False, normalises: bool = True) -> Frames:
        """A convolution while `held` bytes are alive beside its result and its own."""
        batch, frames, height, width, channels = x.shape
        out = self._out(x, conv.conv.out_channels)
        self._multiply(conv.conv.weight, out)
        rows = self._rows(height, x.row_bytes(self.dtype))
        around = rows + 2 if rows < height else height + 2
        keeps = 1 if x.doubled else 2
        length = (0 if x.single else 1) if self.first else keeps
        in_row, out_row = (batch * width * c * self.dtype.itemsize for c in (channels, conv.conv.out_channels))
        steps = steps_for(frames, first=self.first, doubled=x.doubled, single=x.single, largest=joint_frames(conv, self.dtype, self.device))
        by_rows = row_filtering(conv, (height, width), self.dtype, self.device)
        most = summed = 0
        self._forget_derived(but=Upsample if self._is_lazy(x) else ())
        for filtering, _, count, _ in steps:
            taps = self._taps(conv, filtering, by_rows)
            if (conv, filtering) not in self.derived:
                self._note(held, self._combining(conv, taps, filtering))
            if filtering is FIRST:
                summed = taps * self.dtype.itemsize
            else:
                self.derived[conv, filtering] = taps * self.dtype.itemsize
            if as_volume(filtering, self.dtype):
                most = max(most, count * rows * out_row)
            else:
                most = max(most, count * _products(filtering, by_rows, rows, in_row, out_row))
        # Results that are added already have their place.
        held += 0 if adds else self._bytes(out)
        work = summed + (length + frames) * around * in_row
        cache = keeps * height * in_row
        if rows < height:  # else a first chunk keeps nothing before all rows are normalised
            self.kept[conv] = cache
        before = self.kept.get(conv, 0) if self.elsewhere else 0
        made = self._made(x, rows + 2) if self._is_lazy(x) else 0
        self._note(held, work, before, made // 2, self._normalising((batch, frames, rows, width, channels)) if normalises else 0)
        self.kept[conv] = cache
        work += most
        work = max(made, made // 2 + work)  # made first, convolved then
        self._note(held, work, self.kept[conv] if self.elsewhere else 0)
        return out

    def _affine(self, norm: nn.Module) -> int:
        """Bytes of the scale and the shift of a norm, which the decoder has for each latent; a few numbers in the encoder."""
        return 2 * torch.float32.itemsize * self._cells * norm.norm_layer.num_channels if isinstance(norm, SpatialNorm) else 0

    def _normalising(self, shape: tuple[int, int, int, int, int]) -> int:
        """Bytes beside the result that normalising a band takes in half precision: a piece of it in float32."""
        if self.dtype == torch.float32:
            return 0
        return torch.float32.itemsize * shape[0] * piece_rows(shape, self.device) * shape[3] * shape[4]

    def _multiply(self, weight: Tensor, out: Frames) -> None:
        batch, _, height, width, _ = out.shape
        self.products += 2 * weight.numel() * batch * out.count * height * width

    def _taps(self, conv: CausalConv3d, filtering: Filtering, by_rows: Filtering | None) -> int:
        """How many numbers `transformed_taps` makes."""
        weight = conv.conv.weight.numel()
        if as_volume(filtering, self.dtype):
            return weight
        return weight * len(filtering.data) // 3 * (3 if by_rows is None else len(by_rows.data)) // 3

    def _combining(self, conv: CausalConv3d, taps: int, filtering: Filtering) -> int:
        """Bytes that making `taps` numbers takes: the weight in float32, twice where it is kept in half precision, and each combination."""
        if as_volume(filtering, self.dtype):
            return taps * self.dtype.itemsize
        weight = conv.conv.weight
        copies = 1 if weight.dtype == torch.float32 else 2
        return torch.float32.itemsize * (copies * weight.numel() + taps) + taps * self.dtype.itemsize

    def _note(self, *alive: int) -> None:
        caches = 0 if self.elsewhere else sum(self.kept.values())
        self.peak = max(self.peak, caches + sum(alive) + sum(self.derived.values()))


def _products(filtering: Filtering, by_rows: Filtering | None, rows: int, in_row: int, out_row: int) -> int:
    """Bytes that `filter_frames` takes for one window of frames: their combinations, all products, and what making one of them takes."""
    if by_rows is None:
        return len(filtering.data) * ((rows + 2) * in_row + rows * out_row) + rows * out_row
    windows = -(-rows // by_rows.outputs)
    made = windows * by_rows.outputs
    return len(filtering.data) * ((made + 2) * in_row + made * out_row) + len(by_rows.data) * windows * (in_row + out_row)


def next_chunk(before: Accounting) -> Accounting:
    """For the chunk behind another one, whose caches it finds; it has a peak of its own."""
    return replace(before, first=False, peak=0)
