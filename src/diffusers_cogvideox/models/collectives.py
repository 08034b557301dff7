"""What ranks send each other: differentiable collectives for parts of unequal size, in terms that every backend has.

They know all sizes beforehand, so that nothing has to be asked for on the way, and may stand inside a compiled graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    import torch.distributed._functional_collectives as functional

    _gather_equal = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor  # the name before PyTorch 2.13

__all__ = ["Group", "add_up", "arrived", "exchange", "gather", "require_ranks", "sent_ahead", "shares", "spread_gradient"]


class Group(NamedTuple):
    """Some ranks as one of them sees them: the name of the process group, the own place in it, and how many there are."""

    name: Any  # a str; torch has a type of its own for it
    rank: int
    size: int

    @classmethod
    def of(cls, group: Any) -> Group:
        """The value for a process group of torch.distributed."""
        return cls(group.group_name, dist.get_rank(group), dist.get_world_size(group))


def require_ranks() -> None:
    """Raise RuntimeError, with the remedy, unless there is a process group."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("Parallelism needs ranks: start with torchrun, and call torch.distributed.init_process_group() first.")


def shares(total: int, parts: int) -> list[int]:
    """`total` in `parts` whole numbers that differ by one at most, the larger ones first.

    >>> shares(30, 4)
    [8, 8, 7, 7]
    """
    return [total // parts + (index < total % parts) for index in range(parts)]


def exchange(x: Tensor, split: tuple[int, Sequence[int]], join: tuple[int, Sequence[int]], group: Group) -> Tensor:
    """Every rank cuts its tensor into one part for each rank and joins the parts that are meant for it.

    Args:
        x: any tensor; axis split[0] has length sum(split[1]), axis join[0] has length join[1][rank].
        split: axis to cut along, and the length of each rank's part.
        join: axis to join along, and the length there of each rank's tensor.
        group: the ranks.

    Returns:
        x with split[1][rank] along the first axis and sum(join[1]) along the second.
    """
    return _Exchange.apply(x, split, join, group)


def gather(x: Tensor, dim: int, sizes: Sequence[int], group: Group, *, shared: bool = False) -> Tensor:
    """The tensors of all ranks, joined along `dim`; rank i's has length sizes[i] there.

    Args:
        x: this rank's part.
        dim: axis to join along.
        sizes: length of every rank's part.
        group: the ranks.
        shared: whether all ranks do the same with the result, so that its gradient is known already. Otherwise what they do with a
            rank's part is added up for it.
    """
    return _Gather.apply(x, dim, sizes, group, shared)


def sent_ahead(x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """The first half of `gather`: send x on its way, and do not wait for what the others send. `arrived` does that.

    Between the two there is time to compute. Hand the result to nothing else, and let all ranks send in the same order. Gradients come
    back in the same way: they are on their way while autograd goes on with what was computed in between.

    Args:
        x, dim, sizes, group: as of `gather`, without `shared`.

    Returns:
        room for what arrives, group.size times x with length max(sizes) along `dim`.
    """
    return _SentAhead.apply(x, dim, sizes, group)


def arrived(room: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """The second half of `gather`: wait for what `sent_ahead` has sent, with the same `dim`, `sizes` and `group`."""
    return _Arrived.apply(room, dim, sizes, group)


def add_up(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' x, on every rank. The gradient of the sum, which all ranks know, is that of each x."""
    return _Sum.apply(x, group)


def spread_gradient(x: Tensor, group: Group) -> Tensor:
    """x itself, which is the same on all ranks; its gradient is the sum of what they do with it."""
    return _Spread.apply(x, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: tuple[int, Sequence[int]], join: tuple[int, Sequence[int]], group: Group) -> Tensor:
        """See `exchange`."""
        ctx.split, ctx.join, ctx.group = split, join, group
        return _exchanged(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """What was joined is cut, and the reverse."""
        return _exchanged(gradients[0], ctx.join, ctx.split, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], group: Group, shared: bool) -> Tensor:
        """See `gather`."""
        ctx.dim, ctx.sizes, ctx.group, ctx.shared = dim, sizes, group, shared
        return _gathered(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """This rank's part of the gradient, or the sum of what all ranks have for it."""
        dim, sizes, group = ctx.dim, ctx.sizes, ctx.group
        if ctx.shared:
            own = gradients[0].split(list(sizes), dim)[group.rank].contiguous()
        else:
            wanted = (dim, [sizes[group.rank]] * group.size)
            own = _exchanged(gradients[0], (dim, sizes), wanted, group).unflatten(dim, (group.size, -1)).sum(dim)
        return own, None, None, None, None


class _SentAhead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
        """See `sent_ahead`."""
        ctx.dim, ctx.own = dim, sizes[group.rank]
        return _sent(x, dim, sizes, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The sum of what all ranks have for this one's part; it has been on its way since `_Arrived.backward`."""
        return functional.wait_tensor(gradients[0]).sum(0).narrow(ctx.dim, 0, ctx.own), None, None, None


class _Arrived(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, room: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
        """See `arrived`."""
        ctx.dim, ctx.sizes, ctx.group = dim, sizes, group
        return _joined(room, dim, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """Send every rank the gradient of its part."""
        parts = gradients[0].split(list(ctx.sizes), ctx.dim)
        padded = torch.stack([_padded(part, ctx.dim, max(ctx.sizes)) for part in parts])
        ones = [1] * ctx.group.size
        return functional.all_to_all_single(padded, ones, ones, ctx.group.name), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        """See `add_up`."""
        del ctx
        return _sum(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Each rank's x is a summand."""
        del ctx
        return gradients[0], None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        """See `spread_gradient`."""
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Every rank has a summand."""
        return _sum(gradients[0], ctx.group), None


def _sum(x: Tensor, group: Group) -> Tensor:
    return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", group.name))


def _exchanged(x: Tensor, split: tuple[int, Sequence[int]], join: tuple[int, Sequence[int]], group: Group) -> Tensor:
    parts = x.split(list(split[1]), split[0])
    shape = list(parts[group.rank].shape)
    flat = torch.cat([part.reshape(-1) for part in parts])
    shape[join[0]] = 1
    sizes = [math.prod(shape) * length for length in join[1]]
    received = functional.wait_tensor(functional.all_to_all_single(flat, sizes, [part.numel() for part in parts], group.name))
    shapes = ([*shape[: join[0]], length, *shape[join[0] + 1 :]] for length in join[1])
    return torch.cat([part.view(form) for part, form in zip(received.split(sizes), shapes, strict=True)], dim=join[0])


def _gathered(x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    return _joined(_sent(x, dim, sizes, group), dim, sizes)


def _sent(x: Tensor, dim: int, sizes: Sequence[int], group: Group) -> Tensor:
    """All parts are padded to the longest, because that is the form in which every backend gathers at full speed."""
    return _gather_equal(_padded(x, dim, max(sizes)).contiguous()[None], 0, group.name)


def _joined(room: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    received = functional.wait_tensor(room)
    return torch.cat([part.narrow(dim, 0, length) for part, length in zip(received.unbind(0), sizes, strict=True)], dim)


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    missing = list(x.shape)
    missing[dim] = length - x.shape[dim]
    return torch.cat([x, x.new_zeros(missing)], dim) if missing[dim] else x
