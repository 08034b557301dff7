"""Every rank computes with some heads of each attention and some channels of each feed-forward network, and holds only their weights.

As in Megatron-LM (arXiv 1909.08053): the first linear layers of a pair are cut by their outputs, the last one by its inputs, and what the
ranks get is added up, twice per block. Heads need not be divisible by the ranks: with 30 heads on 4 ranks, two have 8 and two have 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .attention import PROJECTIONS
from .block import CogVideoXBlock
from .collectives import Group, add_up, shares, spread_gradient

__all__ = ["TENSOR_PLAN", "keep_share"]

# The same in diffusers' terms, with which it loads only a rank's share of the weights, where everything is divisible.
TENSOR_PLAN: dict[str, str] = {
    **{f"transformer_blocks.*.attn1.{name}": "colwise" for name in PROJECTIONS},
    "transformer_blocks.*.attn1.to_out.0": "rowwise",
    "transformer_blocks.*.ff.net.0.proj": "colwise",
    "transformer_blocks.*.ff.net.2": "rowwise",
}


class OutputShare(nn.Linear):
    """Some outputs of a linear layer; the gradients of all ranks' outputs add up in its input."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, share of D')."""
        return super().forward(spread_gradient(x, self.group))


class InputShare(nn.Linear):
    """A linear layer of which each rank has some inputs."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, share of D') -> (B, S, D)."""
        total = add_up(nn.functional.linear(x, self.weight), self.group)
        return total if self.bias is None else total + self.bias


class SharedNorm(nn.LayerNorm):
    """The LayerNorm of the queries or keys of some heads; the gradients of all heads add up in its weights."""

    group: Group

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, h, d) -> (B, S, h, d)."""
        weight, bias = (spread_gradient(parameter, self.group) for parameter in (self.weight, self.bias))
        return nn.functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


@torch.no_grad()
def keep_share(blocks: Iterable[Any], group: Group) -> None:
    """Keep this rank's heads and channels of expert blocks, in place.

    Raises:
        ValueError: for more ranks than heads, fused projections, and a feed-forward network whose channels do not stand alone (GEGLU).
    """
    blocks = list(blocks)
    for block in blocks:
        _check(block, group)
    for block in blocks:
        attention, (first, _, last) = block.attn1, block.ff.net[:3]
        heads = shares(attention.heads, group.size)
        attention.heads = heads[group.rank]
        inside = [count * attention.head_dim for count in heads]
        for name in PROJECTIONS:
            setattr(attention, name, _share(OutputShare, getattr(attention, name), 0, inside, group))
        attention.norm_q, attention.norm_k = (_shared(norm, group) for norm in (attention.norm_q, attention.norm_k))
        attention.to_out[0] = _share(InputShare, attention.to_out[0], 1, inside, group)
        channels = shares(last.in_features, group.size)
        first.proj = _share(OutputShare, first.proj, 0, channels, group)
        block.ff.net[2] = _share(InputShare, last, 1, channels, group)


def _check(block: CogVideoXBlock, group: Group) -> None:
    attention, net = block.attn1, block.ff.net
    if attention.heads < group.size:
        raise ValueError(
            f"{group.size} ranks cannot share {attention.heads} attention heads: each needs at least one. Use fewer ranks, or "
            "ContextParallelConfig, which shares tokens."
        )
    if attention.fused_projections:
        raise ValueError("Fused projections cannot be shared by heads: call unfuse_qkv_projections() first; they may be fused afterwards.")
    if net[0].proj.out_features != net[2].in_features:  # type: ignore[union-attr]
        raise ValueError("A gated feed-forward network cannot be shared by its channels: use ContextParallelConfig.")


def _shared(norm: nn.LayerNorm, group: Group) -> SharedNorm:
    made = SharedNorm(norm.normalized_shape, eps=norm.eps, device="meta")
    made.weight, made.bias, made.group = norm.weight, norm.bias, group
    return made


def _share(kind: type[OutputShare | InputShare], layer: nn.Linear, dim: int, sizes: list[int], group: Group) -> nn.Linear:
    """This rank's part of a linear layer cut along axis `dim` of its weight (out, in)."""

    def own(parameter: Tensor, cut: bool) -> nn.Parameter:
        part = parameter.split(sizes, dim)[group.rank].clone() if cut else parameter
        return nn.Parameter(part, requires_grad=parameter.requires_grad)

    weight = own(layer.weight, cut=True)
    made = kind(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    made.weight, made.group = weight, group
    if layer.bias is not None:
        made.bias = own(layer.bias, cut=dim == 0)
    return made.train(layer.training)
