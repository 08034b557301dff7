"""Tensors that are made when they are written: their shape and dtype are known at once, their values cost memory one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["LazyTensor", "combine", "lazily"]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of any shape in waiting.

    Args:
        meta: its shape and dtype, as a tensor on the meta device.
        make: computes its values; called once for each use.
    """

    meta: Tensor
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One whose values are there already, in memory or mapped from a file."""
        return cls(tensor.to("meta"), lambda: tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.meta.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.meta.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return self.meta.nbytes

    def to(self, dtype: torch.dtype) -> LazyTensor:
        """The same values rounded to `dtype`, whatever the shape."""
        return self if dtype == self.dtype else combine(lambda tensor: tensor.to(dtype), [self])


AnyTensor = TypeVar("AnyTensor", Tensor, LazyTensor)


def combine(function: Callable[..., Tensor], tensors: Sequence[AnyTensor]) -> AnyTensor:
    """`function` of tensors of any shape: at once where they are tensors, later where they are lazy.

    `function` must work on the meta device. What it raises about shapes, it raises here.
    """
    if isinstance(tensors[0], Tensor):
        return function(*tensors)
    parts: list[LazyTensor] = list(tensors)  # type: ignore[arg-type]
    return LazyTensor(function(*(part.meta for part in parts)), lambda: function(*(part.make() for part in parts)))  # type: ignore[return-value]


def lazily(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors by name, as lazy ones."""
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}
