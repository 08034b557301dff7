"""Convolution along time with fewer multiplications: each way of doing it is three small matrices.

A causal convolution with three taps in time turns windows of frames into output frames. Every way to compute it is of the form

    outputs = result @ (taps @ w  *  data @ window)

where w are the three taps (each a 3x3 convolution over the picture), `*` convolves frame with tap, and the products in the middle, of
which there are as many as `data` has rows, cost all the time. Exact up to rounding, whatever the way.

Shapes: B batch, F frames, H W height and width, C channels; frames lie channels-last, (B, F, H, W, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["DIRECT", "DOUBLED", "FIRST", "MINIMAL_2", "MINIMAL_4", "Filtering", "Step", "filter_frames", "steps_for", "transformed_taps"]

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Filtering:
    """One way to compute the outputs of a window of frames.

    Args:
        stride: how many frames further the next window starts.
        data: (products, window) combinations of frames.
        taps: (products, 3) combinations of the taps.
        result: (outputs, products) combinations of the products. One product counts once in all outputs: it carries the bias.
    """

    stride: int
    data: Matrix
    taps: Matrix
    result: Matrix

    @property
    def window(self) -> int:
        """Frames that are read at once."""
        return len(self.data[0])

    @property
    def outputs(self) -> int:
        """Frames that come out of a window."""
        return len(self.result)

    @property
    def biased(self) -> int:
        """The product that carries the bias."""
        return next(i for i in range(len(self.data)) if all(row[i] == 1 for row in self.result))


FIRST = Filtering(1, ((1,),), ((1, 1, 1),), ((1,),))
"""The very first frame, which its own copies precede: one convolution with the sum of the taps."""

DIRECT = Filtering(1, ((1, 0, 0), (0, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 0), (0, 0, 1)), ((1, 1, 1),))
"""As it is written: three convolutions per output frame."""

MINIMAL_2 = Filtering(
    2,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)
"""Winograd's F(2, 3): four convolutions for two frames instead of six ("Arithmetic Complexity of Computations", 1980)."""

MINIMAL_4 = Filtering(
    4,
    (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)
"""Winograd's F(4, 3): six convolutions for four frames instead of twelve. Rounds more than F(2, 3)."""

DOUBLED = Filtering(
    1,
    ((1, 0), (0, 1), (1, -1)),
    ((1, 0, 0), (0, 1, 1), (0, 1, 0)),
    ((1, 1, 1), (1, 1, 0)),
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


def _as_volume(filtering: Filtering, dtype: torch.dtype) -> bool:
    """Whether libraries have a good convolution over time and picture at once: only in half precision."""
    return filtering is DIRECT and dtype != torch.float32


def transformed_taps(weight: Tensor, filtering: Filtering, dtype: torch.dtype) -> Tensor:
    """(products, C_out, C_in, 3, 3) in `dtype` from a weight (C_out, C_in, 3, 3, 3), combined in float32 and rounded once.

    `DIRECT` takes the weight as it is in half precision.
    """
    if _as_volume(filtering, dtype):
        return weight.to(dtype, memory_format=torch.channels_last_3d)
    combined = torch.einsum("pt,oithw->poihw", _matrix(filtering.taps, torch.float32, weight.device), weight.float())
    return combined.to(dtype)


def filter_frames(frames: Tensor, taps: Tensor, bias: Tensor | None, step: Step, out: Tensor, *, add: bool) -> None:
    """Write the outputs of one step to their frames of `out`, or `add` them.

    Args:
        frames: (B, F, H + 2, W, C_in), with a row above and below; columns beyond the picture are zeros.
        taps: see `transformed_taps`.
        bias: (C_out,).
        out: (B, F_out, H, W, C_out); rows, columns and channels of each of its frames lie behind each other.
    """
    filtering, start, count, first_out = step
    if _as_volume(filtering, frames.dtype):
        video = frames[:, start : start + count + 2].movedim(-1, 1)
        product = F.conv3d(video, taps, bias, padding=(0, 0, 1)).movedim(1, -1)
        target = out[:, first_out : first_out + count]
        target.add_(product) if add else target.copy_(product)
        return
    places = [(b, start + k * filtering.stride, first_out + k * filtering.outputs) for b in range(len(frames)) for k in range(count)]
    data, result = (_matrix(m, frames.dtype, frames.device) for m in (filtering.data, filtering.result))
    combined = frames.new_empty(len(data), len(places), *frames.shape[2:])
    for image, (b, at, _) in enumerate(places):
        window = frames[b, at : at + filtering.window]
        torch.mm(data, window.view(len(window), -1), out=combined[:, image].view(len(data), -1))
    products = []
    for index, tap in enumerate(taps):
        images = combined[index].permute(0, 3, 1, 2)
        product = F.conv2d(images, tap, bias if index == filtering.biased else None, padding=(0, 1))
        products.append(product.permute(0, 2, 3, 1))
    together = torch.stack(products)
    for image, (b, _, at) in enumerate(places):
        target = out[b, at : at + filtering.outputs].view(filtering.outputs, -1)
        torch.addmm(target, result, together[:, image].view(len(taps), -1), beta=int(add), out=target)
