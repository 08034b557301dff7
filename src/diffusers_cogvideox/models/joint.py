"""Text and video tokens as one sequence, [text; video], without a copy where they lie one after the other in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["in_place", "joined", "room_for_both"]


def in_place() -> bool:
    """Whether results may be written where there is room for them: not with gradients, and not for a compiler, which plans that itself.

    Nor for derivatives forwards and the transforms of `torch.func`, which know no operations that are told where to write.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return forward_ad._current_level < 0 and torch._C._functorch.peek_interpreter_stack() is None


def room_for_both(text: Tensor, video: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Uninitialised tensors like text (B, L, D) and video (B, N, D), which `joined` makes one of without a copy."""
    lengths = [text.shape[1], video.shape[1]]
    room = video.new_empty((len(video), sum(lengths), video.shape[2]), dtype=dtype)
    of_text, of_video = room.split(lengths, dim=1)
    return of_text, of_video


def joined(text: Tensor, video: Tensor) -> Tensor:
    """[text; video] (B, L + N, D) of text (B, L, D) and video (B, N, D): a view of tensors from `room_for_both`, else a copy."""
    if in_place() and _follows(text, video):
        shape = (len(text), text.shape[1] + video.shape[1], text.shape[2])
        return text.as_strided(shape, text.stride(), text.storage_offset())
    return torch.cat([text, video], dim=1)


def _follows(first: Tensor, second: Tensor) -> bool:
    """Whether tokens of the second tensor begin where those of the first end, sample by sample."""
    if type(first) is not Tensor or type(second) is not Tensor or first.dtype != second.dtype or first.stride() != second.stride():
        return False
    if first.shape[::2] != second.shape[::2] or first.untyped_storage()._cdata != second.untyped_storage()._cdata:
        return False
    return second.storage_offset() == first.storage_offset() + first.shape[1] * first.stride(1)
