"""The expert block: one set of weights for text and video tokens, with separate ("expert") adaptive LayerNorms for the two.

CogVideoX paper, section 2.2; the scheme is adaLN-Zero of DiT (Peebles & Xie 2023). With v video tokens, x text tokens and e the embedding
of the timestep,
    (shift, scale, gate, shift', scale', gate') = Linear(SiLU(e))
    a, a' = Attention(LN(v) (1 + scale) + shift, LN(x) (1 + scale') + shift')
    v <- v + gate a,   x <- x + gate' a'
and the same once more with the feed-forward network in place of the attention.

The two token streams may be wider (float32) than the linear layers (float16): LayerNorm, modulation, gate and sum compute in the dtype
of the tokens, and what goes into attention and feed-forward network is rounded to that of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from .attention import CogVideoXAttention
from .joint import in_place, joined, room_for_both

__all__ = ["AdaLayerNorm", "CogVideoXBlock", "ExpertLayerNorm", "FinalLayerNorm", "Modulation", "TokenNorm"]


class TokenNorm(nn.LayerNorm):
    """LayerNorm over the channels of tokens (B, S, D) that may be wider than its weights; narrower ones (autocast) round no weight."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, S, D) -> (B, S, D)."""
        parts = (self.weight, self.bias)
        weight, bias = (None if part is None else part.to(torch.promote_types(part.dtype, tokens.dtype)) for part in parts)
        return nn.functional.layer_norm(tokens, self.normalized_shape, weight, bias, self.eps)


class Modulation(NamedTuple):
    """What one expert does to its tokens, each (1 or B, 1, D): LN(tokens) (1 + scale) + shift going in, gate coming out."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class AdaLayerNorm(nn.Module):
    """LayerNorm with `parts` modulation vectors that depend linearly on SiLU(temb), or are looked up in `table` (T, parts * D)."""

    table: Tensor | None = None  # see modulation.py

    def __init__(self, condition_dim: int, dim: int, parts: int, affine: bool, eps: float) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition_dim, parts * dim)
        self.norm = TokenNorm(dim, eps=eps, elementwise_affine=affine)

    def vectors(self, temb: Tensor) -> tuple[Tensor, ...]:
        """temb (1 or B, E), or rows (1 or B,) of the table -> `parts` tensors (1 or B, 1, D)."""
        if self.table is not None and not temb.is_floating_point():
            return self.table[temb].unsqueeze(1).chunk(self.parts, dim=-1)
        return self.linear(nn.functional.silu(temb)).unsqueeze(1).chunk(self.parts, dim=-1)

    def modulate(self, tokens: Tensor, shift: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """LN(tokens) (1 + scale) + shift for tokens (B, S, D), in the dtype of shift and scale; written to `out` where that is given."""
        if out is not None:
            return torch.addcmul(shift, self.norm(tokens), 1 + scale, out=out)
        return torch.addcmul(shift, self.norm(tokens), 1 + scale).to(shift.dtype)


class ExpertLayerNorm(AdaLayerNorm):
    """The adaptive LayerNorm of a block: shared norm, one modulation for video and one for text."""

    def __init__(self, condition_dim: int, dim: int, affine: bool, eps: float) -> None:
        super().__init__(condition_dim, dim, 6, affine, eps)

    def forward(self, video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video (B, N, D), text (B, L, D), temb (1 or B, E) -> both modulated, then the two gates (1 or B, 1, D).

        Without gradients the modulated streams lie one after the other in memory, for `joined`.
        """
        vectors = self.vectors(temb)
        for_video, for_text = Modulation(*vectors[:3]), Modulation(*vectors[3:])
        of_text, of_video = room_for_both(text, video, for_video.shift.dtype) if in_place() else (None, None)
        video = self.modulate(video, for_video.shift, for_video.scale, of_video)
        text = self.modulate(text, for_text.shift, for_text.scale, of_text)
        return video, text, for_video.gate, for_text.gate


class FinalLayerNorm(AdaLayerNorm):
    """The adaptive LayerNorm before the output projection: shift and scale, video only."""

    def __init__(self, condition_dim: int, dim: int, affine: bool, eps: float) -> None:
        super().__init__(condition_dim, dim, 2, affine, eps)

    def forward(self, video: Tensor, temb: Tensor) -> Tensor:
        """Video (B, N, D), temb (1 or B, E) -> (B, N, D)."""
        return self.modulate(video, *self.vectors(temb))


class CogVideoXBlock(nn.Module):
    """One expert block. The two streams are joined only inside attention and feed-forward, because diffusers' cache and skip hooks need
    `block(hidden_states, encoder_hidden_states, ...) -> (hidden_states, encoder_hidden_states)`.

    Args:
        dim: width D.
        num_attention_heads, attention_head_dim: heads and channels of a head.
        time_embed_dim: width E of the time embedding.
        dropout, activation_fn: of the feed-forward network.
        attention_bias: bias of q, k, v.
        norm_elementwise_affine, norm_eps: of the two LayerNorms.
    """

    one_by_one = False  # the samples of a batch
    ff_tokens: int | None = None  # that the feed-forward network sees at a time

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        time_embed_dim: int,
        dropout: float = 0.0,
        activation_fn: str = "gelu-approximate",
        attention_bias: bool = True,
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = ExpertLayerNorm(time_embed_dim, dim, norm_elementwise_affine, norm_eps)
        self.attn1 = CogVideoXAttention(dim, num_attention_heads, attention_head_dim, bias=attention_bias)
        self.norm2 = ExpertLayerNorm(time_embed_dim, dim, norm_elementwise_affine, norm_eps)
        self.ff = FeedForward(dim, dropout=dropout, activation_fn=activation_fn, final_dropout=True)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Video tokens (B, N, D), text tokens (B, L, D), temb (1 or B, E), rotary tables (N, head_dim) -> new video and text tokens.

        In place of temb, rows (1 or B,) of the norms' tables.
        """
        options = attention_kwargs or {}
        if not self.one_by_one or len(hidden_states) == 1:
            return self._update(hidden_states, encoder_hidden_states, temb, image_rotary_emb, options)

        def sample(i: int) -> tuple[Tensor, Tensor]:
            own = _of_sample(options, i)
            return self._update(hidden_states[i, None], encoder_hidden_states[i, None], temb[i % len(temb), None], image_rotary_emb, own)

        return _one_by_one(sample, len(hidden_states))

    def _update(
        self, video: Tensor, text: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor] | None, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        video_in, text_in, video_gate, text_gate = self.norm1(video, text, temb)
        video_out, text_out = self.attn1(hidden_states=video_in, encoder_hidden_states=text_in, image_rotary_emb=rotary, **options)
        del video_in, text_in  # the feed-forward network needs the memory
        video, text = torch.addcmul(video, video_gate, video_out), torch.addcmul(text, text_gate, text_out)
        del video_out, text_out
        if self.ff_tokens is not None:
            return self._feed_forward_in_chunks(video, text, temb, self.ff_tokens)

        video_in, text_in, video_gate, text_gate = self.norm2(video, text, temb)
        joint = self.ff(joined(text_in, video_in))
        text_out, video_out = joint.split([text.shape[1], video.shape[1]], dim=1)
        return torch.addcmul(video, video_gate, video_out), torch.addcmul(text, text_gate, text_out)

    def _feed_forward_in_chunks(self, video: Tensor, text: Tensor, temb: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The second half of a block, `size` tokens at a time; without gradients in place, in arguments that nobody else holds."""
        vectors = self.norm2.vectors(temb)

        def updated(tokens: Tensor, of: Modulation) -> Tensor:
            ours = not torch.is_grad_enabled() and torch.promote_types(tokens.dtype, of.gate.dtype) == tokens.dtype
            add = Tensor.addcmul_ if ours else torch.addcmul
            parts = [add(part, of.gate, self.ff(self.norm2.modulate(part, of.shift, of.scale))) for part in tokens.split(size, dim=1)]
            return tokens if ours else torch.cat(parts, dim=1)

        return updated(video, Modulation(*vectors[:3])), updated(text, Modulation(*vectors[3:]))


def _of_sample(options: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The attention processor's options for sample i of a batch: a mask may be of one sample, everything else is of all."""
    mask = options.get("attention_mask")
    return {**options} if mask is None or len(mask) == 1 else {**options, "attention_mask": mask[i, None]}


def _one_by_one(sample: Callable[[int], tuple[Tensor, Tensor]], batch: int) -> tuple[Tensor, Tensor]:
    """The results (1, N, D) and (1, L, D) of all samples as a batch; without gradients each goes to its place at once."""
    if torch.is_grad_enabled():
        videos, texts = zip(*map(sample, range(batch)), strict=True)
        return torch.cat(videos), torch.cat(texts)
    for i in range(batch):
        one_video, one_text = sample(i)
        if i == 0:
            video, text = (one.new_empty(batch, *one.shape[1:]) for one in (one_video, one_text))
        video[i], text[i] = one_video[0], one_text[0]
        del one_video, one_text  # the next sample needs the memory
    return video, text
