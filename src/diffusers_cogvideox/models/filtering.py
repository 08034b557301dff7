"""Convolution along time and rows with fewer multiplications: each way of doing it is three small matrices.

A causal convolution with three taps in time turns windows of frames into output frames. Every way to compute it is of the form

    outputs = result @ (taps @ w  *  data @ window)

where w are the three taps (each a 3x3 convolution over the picture), `*` convolves frame with tap, and the products in the middle, of
which there are as many as `data` has rows, cost all the time. Exact up to rounding, whatever the way.

Each product is a convolution over the picture, whose rows are filtered by three taps in turn. So the same can be done to rows, and what
remains in the middle is a convolution along columns.

Shapes: B batch, F frames, H W height and width, C channels; frames lie channels-last, (B, F, H, W, C).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DIRECT",
    "DOUBLED",
    "FIRST",
    "MINIMAL_2",
    "MINIMAL_4",
    "Filtering",
    "Step",
    "as_volume",
    "filter_frames",
    "steps_for",
    "transformed_taps",
]

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Filtering:
    """One way to compute the outputs of a window of frames.

    Args:
        stride: how many frames further the next window starts.
        data: (products, window) combinations of frames.
        taps: (products, 3) combinations of the taps.
        result: (outputs, products) combinations of the products.
        bias: (products,) shares of the bias that each product carries, which add up to one bias in every output.
    """

    stride: int
    data: Matrix
    taps: Matrix
    result: Matrix
    bias: tuple[float, ...]

    @property
    def window(self) -> int:
        """Frames that are read at once."""
        return len(self.data[0])

    @property
    def outputs(self) -> int:
        """Frames that come out of a window."""
        return len(self.result)


FIRST = Filtering(1, ((1,),), ((1, 1, 1),), ((1,),), (1,))
"""The very first frame, which its own copies precede: one convolution with the sum of the taps."""

DIRECT = Filtering(1, ((1, 0, 0), (0, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 0), (0, 0, 1)), ((1, 1, 1),), (1, 0, 0))
"""As it is written: three convolutions per output frame."""

MINIMAL_2 = Filtering(
    2,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
    (0, 1, 0, 0),
)
"""Winograd's F(2, 3): four convolutions for two frames instead of six ("Arithmetic Complexity of Computations", 1980)."""

_R = math.sqrt(2)
MINIMAL_4 = Filtering(
    4,
    (
        (1, 0, -5 / 2, 0, 1, 0),
        (0, 2 * _R / 3, 4 / 3, -_R / 3, -2 / 3, 0),
        (0, -2 * _R / 3, 4 / 3, _R / 3, -2 / 3, 0),
        (0, -_R / 12, -1 / 12, _R / 6, 1 / 6, 0),
        (0, _R / 12, -1 / 12, -_R / 6, 1 / 6, 0),
        (0, 1, 0, -5 / 2, 0, 1),
    ),
    ((1, 0, 0), (1, _R / 2, 1 / 2), (1, -_R / 2, 1 / 2), (1, _R, 2), (1, -_R, 2), (0, 0, 1)),
    ((1, 1, 1, 1, 1, 0), (0, _R / 2, -_R / 2, _R, -_R, 0), (0, 1 / 2, 1 / 2, 2, 2, 0), (0, _R / 4, -_R / 4, 2 * _R, -2 * _R, 1)),
    (2 - 3 / 2 * _R, 2 * _R - 2, 0, 1 - _R / 2, 0, 2 - 3 / 2 * _R),
)
"""Winograd's F(4, 3): six convolutions for four frames instead of twelve. Rounds more than F(2, 3), but with the points 0, +-1/sqrt(2),
+-sqrt(2) half as much as with the usual 0, +-1, +-2 when frames and rows are both filtered so (Barabasz et al., "Error Analysis and
Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2020, on the choice of points)."""

DOUBLED = Filtering(
    1,
    ((1, 0), (0, 1), (1, -1)),
    ((1, 0, 0), (0, 1, 1), (0, 1, 0)),
    ((1, 1, 1), (1, 1, 0)),
    (1, 0, 0),
)
"""Frames that each stand for two equal ones, x' before x: out = (w0 + w1) x' + w2 x, then w0 x' + (w1 + w2) x; three convolutions
for two frames instead of six."""


class Step(NamedTuple):
    """So many windows, the first at frame `start` of the input, whose outputs begin at frame `out`."""

    filtering: Filtering
    start: int
    windows: int
    out: int


def steps_for(frames: int, *, first: bool, doubled: bool, single: bool, largest: int) -> Iterator[Step]:
    """How to compute the outputs of `frames` input frames behind their history.

    Args:
        first: the history is a copy of the first frame; else it is the last frames of the chunk before, one where `doubled`, else two.
        doubled: every frame stands for two equal ones, but the first where it is `single`.
        largest: frames that may be computed together, 1, 2 or 4: more need fewer multiplications and round more.
    """
    if doubled:
        if first and single:
            yield Step(FIRST, 0, 1, 0)
            yield Step(DOUBLED, 0, frames - 1, 1)
        else:
            yield Step(DOUBLED, 0, frames, 0)
        return
    done = 0
    if first:
        yield Step(FIRST, 0, 1, 0)
        done = 1
    for filtering in (MINIMAL_4, MINIMAL_2, DIRECT):
        count = (frames - done) // filtering.outputs
        if filtering.outputs <= largest and count:
            # Behind a history of two frames, output f reads the input frames f, f + 1, f + 2; a first one has a history of one.
            yield Step(filtering, done - first, count, done)
            done += count * filtering.outputs


@cache
def _matrix(values: Matrix, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def as_volume(filtering: Filtering, dtype: torch.dtype) -> bool:
    """Whether a step is left to the library's convolution over time and picture at once, which is good in half precision only.

    The sum of the taps would have to be rounded there, so the very first frame takes its copies as they are.
    """
    return filtering in (FIRST, DIRECT) and dtype in (torch.bfloat16, torch.float16)


def transformed_taps(weight: Tensor, filtering: Filtering, dtype: torch.dtype, rows: Filtering | None = None) -> Tensor:
    """(products, C_out, C_in, 3, 3) in `dtype` from a weight (C_out, C_in, 3, 3, 3), combined in float32 and rounded once.

    With `rows` filtered too, (products, products of rows, 3, C_in, C_out), matrices. `DIRECT` takes the weight as it is in half precision.
    The channels of what comes in lie behind each other, as those of the frames do.
    """
    if as_volume(filtering, dtype):
        return weight.to(dtype, memory_format=torch.channels_last_3d)
    as_they_are = torch.eye(3, dtype=torch.float32, device=weight.device)
    in_time, in_rows = (as_they_are if f is None else _matrix(f.taps, torch.float32, weight.device) for f in (filtering, rows))
    combinations = torch.einsum("pt,qh,kw->pqkthw", in_time, in_rows, as_they_are)
    combined = combinations.flatten(3).flatten(0, 2) @ weight.float().reshape(-1, 27).T
    combined = combined.view(*combinations.shape[:3], *weight.shape[:2]).to(dtype)
    if rows is None:
        return combined.movedim(3, 1).contiguous().movedim(-1, 2)
    return combined.mT


def filter_frames(
    frames: Tensor, taps: Tensor, bias: Tensor | None, step: Step, out: Tensor, *, add: bool, rows: Filtering | None = None
) -> None:
    """Write the outputs of one step to their frames of `out`, or `add` them.

    Args:
        frames: (B, F, H + 2, W, C_in), with a row above and below; columns beyond the picture are zeros.
        taps: see `transformed_taps`.
        bias: (C_out,).
        out: (B, F_out, H, W, C_out); rows, columns and channels of each of its frames lie behind each other.
        rows: how rows are filtered, if not by the convolution itself; the taps must have been made for it.
    """
    filtering, start, count, first_out = step
    if as_volume(filtering, frames.dtype):
        window = frames[:, :1].expand(-1, 3, -1, -1, -1) if filtering is FIRST else frames[:, start : start + count + 2]
        video = window.movedim(-1, 1)
        product = F.conv3d(video, taps, bias, padding=(0, 0, 1)).movedim(1, -1)
        target = out[:, first_out : first_out + count]
        target.add_(product) if add else target.copy_(product)
        return
    places = [(b, start + k * filtering.stride, first_out + k * filtering.outputs) for b in range(len(frames)) for k in range(count)]
    data, result = (_matrix(m, frames.dtype, frames.device) for m in (filtering.data, filtering.result))
    (around, width), height = frames.shape[2:4], out.shape[2]
    made = height if rows is None else -(-height // rows.outputs) * rows.outputs  # by whole windows of rows
    combined = frames.new_empty(len(data), len(places), made + 2, *frames.shape[3:])
    combined[:, :, around:] = 0
    for image, (b, at, _) in enumerate(places):
        window = frames[b, at : at + filtering.window]
        torch.mm(data, window.view(len(window), -1), out=combined[:, image, :around].view(len(data), -1))
    together = frames.new_empty(len(data), len(places), made, width, out.shape[-1])
    for images, tap, share, product in zip(combined, taps, filtering.bias, together, strict=True):
        carried = None if bias is None or not share else share * bias
        if rows is None:
            product.copy_(F.conv2d(images.permute(0, 3, 1, 2), tap, carried, padding=(0, 1)).permute(0, 2, 3, 1))
        else:
            _filter_rows(images, tap, carried, rows, product)
    for image, (b, _, at) in enumerate(places):
        target = out[b, at : at + filtering.outputs].view(filtering.outputs, -1)
        torch.addmm(target, result, together[:, image, :height].view(len(taps), -1), beta=int(add), out=target)


def _filter_rows(images: Tensor, taps: Tensor, bias: Tensor | None, rows: Filtering, out: Tensor) -> None:
    """The convolution of (N, H + 2, W, C_in) with the taps (products of rows, 3, C_in, C_out), to `out` (N, H, W, C_out).

    What remains along columns is a product of matrices for each tap, of all pixels and those one and two further on: with a column of zeros
    on either side, no row sees the next one. What comes out behind the end of a row is not used.
    """
    number, height, width = out.shape[:3]
    windows = height // rows.outputs
    data, result = (_matrix(m, images.dtype, images.device) for m in (rows.data, rows.result))
    combined = images.new_empty(len(data), number, windows, width + 2, images.shape[-1])
    combined[..., :: width + 1, :] = 0
    for image, into in zip(images, combined[..., 1:-1, :].unbind(1), strict=True):
        overlapping = image.flatten(1).unfold(0, rows.window, rows.stride).transpose(1, 2)  # (windows, window, W * C_in)
        torch.bmm(data.expand(windows, -1, -1), overlapping, out=into.flatten(2).transpose(0, 1))
    pixels = combined.flatten(1, 3)
    together = images.new_empty(*pixels.shape[:2], out.shape[-1])
    last = pixels.shape[1] - 2
    products = together[:, :last]
    torch.bmm(pixels[:, :last], taps[:, 0], out=products)
    for further in (1, 2):
        products.baddbmm_(pixels[:, further : further + last], taps[:, further])
    if bias is not None:
        for product, share in zip(products, rows.bias, strict=True):
            if share:
                product += share * bias
    every = number * windows
    inside = together.view(len(data), every, width + 2, -1)[:, :, :width].flatten(2)
    torch.bmm(result.expand(every, -1, -1), inside.transpose(0, 1), out=out.view(every, rows.outputs, -1))
