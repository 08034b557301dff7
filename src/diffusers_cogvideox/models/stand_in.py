"""What stands in the place of weights that are elsewhere: a tensor of their shape that has no storage of its own."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_stand_in", "stand_in"]


def stand_in(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """A tensor of the shape and dtype of `tensor`, of any shape, whose elements are all one element of memory.

    Whoever computes with it gets NaN (the largest number for integers), whoever writes to it an error of PyTorch's.
    """
    ones = torch.full((tensor.element_size(),), 0xFF, dtype=torch.uint8, device=tensor.device if device is None else device)
    return ones.view(tensor.dtype).reshape(()).expand(tensor.shape)


def is_stand_in(tensor: Tensor) -> bool:
    """Whether a tensor, of any shape, is one element shown many times."""
    return tensor.numel() > 1 and not any(tensor.stride())
