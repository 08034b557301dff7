"""One video on several ranks: each holds some of the text tokens and some of the video tokens, and attention brings them together.

Two ways, and their product, as in diffusers' `ContextParallelConfig`:

* Ulysses (arXiv 2309.14509): before attention the ranks exchange, so that each has all tokens of some heads; afterwards back.
* ring: queries stay, and the keys and values of all ranks come to each, some heads at a time: those of the next heads are on their way
  while the ones that are there are attended to. Cut by heads and not by ranks, the pieces need not be merged, so that any attention
  kernel will do, and what is gathered is never there as a whole. diffusers gathers all of it first, then attends piece by piece.

Neither tokens nor heads need to be divisible by the ranks. Tokens are spread over ranks (ring index, Ulysses index), rank by rank.

Shapes: B batch, L text tokens, N video tokens, S = L + N, l n s of one rank, H heads, h of one rank, d channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .collectives import Group, arrived, exchange, gather, sent_ahead, shares
from .rope import Rotary

__all__ = ["BatchShare", "Ranks", "Spread", "attend_together"]

Attend = Callable[..., Tensor]

_PIECES = 4  # of the heads in ring attention: a quarter of the communication is waited for, and kernels still have work for a whole GPU


class Ranks(NamedTuple):
    """The ranks that share one video, as one of them sees them.

    Args:
        everyone: all of them.
        ring, ulysses: those that gather keys and values, and those that exchange heads.
    """

    everyone: Group
    ring: Group
    ulysses: Group

    @classmethod
    def of(cls, context: Any) -> Ranks:
        """Those of diffusers' `ContextParallelConfig`, once it is set up."""
        meshes = (context._flattened_mesh, context._ring_mesh, context._ulysses_mesh)
        return cls(*(Group.of(mesh.get_group()) for mesh in meshes))

    @property
    def neighbours(self) -> list[list[int]]:
        """The ranks that exchange heads with each other, for each place in the ring."""
        ranks = list(range(self.everyone.size))
        return [ranks[start : start + self.ulysses.size] for start in range(0, len(ranks), self.ulysses.size)]

    def spread(self, text: int, video: int) -> Spread:
        """How `text` and `video` tokens lie over the ranks: those with one text token more are the last to have one video token more."""
        size = self.everyone.size
        return Spread(tuple(reversed(shares(text, size))), tuple(shares(video, size)), self)


class Spread(NamedTuple):
    """How the tokens of one forward pass lie over the ranks.

    Args:
        text, video: tokens of each rank.
        ranks: the ranks.
    """

    text: tuple[int, ...]
    video: tuple[int, ...]
    ranks: Ranks

    def own(self, text: Tensor, video: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Rotary | None]:
        """This rank's part of text (B, L, D), video (B, N, D) and rotary tables (N, d): (B, l, D), (B, n, D), (n, d)."""
        rank = self.ranks.everyone.rank
        mine = None
        if rotary is not None:
            cos, sin = (table.split(list(self.video), 0)[rank] for table in rotary)
            mine = (cos, sin)
        # Contiguous as what blocks return: compiled, the first block is then like all others.
        return text.split(list(self.text), 1)[rank].contiguous(), video.split(list(self.video), 1)[rank].contiguous(), mine

    def whole(self, video: Tensor) -> Tensor:
        """The video tokens (B, N, D) of all ranks, on each of them, from this rank's (B, n, D)."""
        return gather(video, 1, self.video, self.ranks.everyone, shared=True)

    def tokens(self, ranks: Sequence[int]) -> int:
        """Tokens that these ranks hold together."""
        return sum(self.text[rank] + self.video[rank] for rank in ranks)

    def places(self, ranks: Sequence[int], device: torch.device) -> Tensor:
        """Where the tokens of these ranks, in the order that they come together in, stand in the joint sequence [text; video]."""
        length = sum(self.text)
        pieces = []
        for rank in ranks:
            for start, sizes in ((0, self.text), (length, self.video)):
                first = start + sum(sizes[:rank])
                pieces.append(torch.arange(first, first + sizes[rank], device=device))
        return torch.cat(pieces)


class BatchShare(NamedTuple):
    """The samples of a batch that this rank computes, such as the half with or the half without the prompt.

    Args:
        sizes: samples of each rank.
        group: the ranks.
    """

    sizes: tuple[int, ...]
    group: Group

    @classmethod
    def of(cls, batch: int, group: Group | None) -> BatchShare | None:
        """The share of so many samples; None where there is nothing to share, or not a sample for each rank."""
        if group is None or group.size == 1 or batch < group.size:
            return None
        return cls(tuple(shares(batch, group.size)), group)

    def own(self, value: Any) -> Any:
        """This rank's samples of a tensor (B, ...); anything that all samples have in common stays as it is."""
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != sum(self.sizes):
            return value
        return value.split(list(self.sizes))[self.group.rank]

    def whole(self, x: Tensor) -> Tensor:
        """All samples (B, ...), on every rank, from this one's."""
        return gather(x, 0, self.sizes, self.group, shared=True)


def attend_together(attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spread: Spread) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the tokens of all ranks.

    Args:
        attend: the attention of tensors (B, S, h, d) on one rank, with `attn_mask=`.
        query, key, value: (B, s, H, d) of this rank's tokens, text first.
        mask: over the whole joint sequence, (B, 1 or H, 1 or S, S), or None.
        spread: how the tokens lie over the ranks.

    Returns:
        (B, s, H, d).
    """
    ranks = spread.ranks
    near = ranks.neighbours[ranks.ring.rank]
    tokens, heads = [spread.tokens([rank]) for rank in near], shares(query.shape[2], ranks.ulysses.size)
    if len(near) > 1:
        joint = torch.stack([query, key, value])  # 3 x B x s x H x d
        query, key, value = exchange(joint, (3, heads), (2, tokens), ranks.ulysses).unbind(0)
    if mask is not None:
        mask = _mask_of(mask, spread, near, heads[ranks.ulysses.rank], sum(heads[: ranks.ulysses.rank]))
    attend = _where_there_is_work(attend)
    if ranks.ring.size > 1:
        sizes = [spread.tokens(part) for part in ranks.neighbours]
        out = _attend_around(attend, query, key, value, mask, sizes, ranks.ring)
    else:
        out = attend(query, key, value, attn_mask=mask)
    return exchange(out, (1, tokens), (2, heads), ranks.ulysses) if len(near) > 1 else out


def _attend_around(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sizes: Sequence[int], ring: Group
) -> Tensor:
    """Attention to the keys and values of all ranks of a ring, each piece of which was asked for before the one ahead of it is computed.

    Args:
        attend: as of `attend_together`.
        query, key, value: (B, s, h, d) of this rank.
        mask: (B, 1 or h, 1 or s, S), with keys rank by rank, or None.
        sizes: tokens of each rank.
        ring: the ranks.

    Returns:
        (B, s, h, d).
    """
    heads = [count for count in shares(query.shape[2], _PIECES) if count]
    if not heads:
        return query
    queries, keys, values = (x.split(heads, 2) for x in (query, key, value))
    masks = mask.split(heads, 1) if mask is not None and mask.shape[1] > 1 else [mask] * len(heads)

    def send(piece: int) -> Tensor:
        return sent_ahead(torch.stack([keys[piece], values[piece]]), 2, sizes, ring)

    outputs, coming = [], send(0)
    for piece, (part, own) in enumerate(zip(queries, masks, strict=True)):
        here = coming
        if piece + 1 < len(heads):
            coming = send(piece + 1)
        all_keys, all_values = arrived(here, 2, sizes, ring).unbind(0)
        outputs.append(attend(part, all_keys, all_values, attn_mask=own))
    return torch.cat(outputs, 2)


def _where_there_is_work(attend: Attend) -> Attend:
    """Where there are fewer heads or tokens than ranks, one may have nothing to do, which kernels refuse."""
    return lambda query, key, value, attn_mask: attend(query, key, value, attn_mask=attn_mask) if query.numel() else query


def _mask_of(mask: Tensor, spread: Spread, near: Sequence[int], heads: int, first: int) -> Tensor:
    """What this rank needs of a mask (B, 1 or H, 1 or S, S): queries of the ranks `near`, all keys as they come together, its heads."""
    mask = mask[..., spread.places(range(spread.ranks.everyone.size), mask.device)]
    if mask.shape[-2] > 1:
        mask = mask[:, :, spread.places(near, mask.device)]
    return mask[:, first : first + heads] if mask.shape[1] > 1 else mask
