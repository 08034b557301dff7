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

from typing import Any, NamedTuple

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from .attention import CogVideoXAttention

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
    """LayerNorm with `parts` modulation vectors that depend linearly on SiLU(temb)."""

    def __init__(self, condition_dim: int, dim: int, parts: int, affine: bool, eps: float) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(condition_dim, parts * dim)
        self.norm = TokenNorm(dim, eps=eps, elementwise_affine=affine)

    def vectors(self, temb: Tensor) -> tuple[Tensor, ...]:
        """temb (1 or B, E) -> `parts` tensors (1 or B, 1, D)."""
        return self.linear(nn.functional.silu(temb)).unsqueeze(1).chunk(self.parts, dim=-1)

    def modulate(self, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """LN(tokens) (1 + scale) + shift for tokens (B, S, D), in the dtype of shift and scale."""
        return torch.addcmul(shift, self.norm(tokens), 1 + scale).to(shift.dtype)


class ExpertLayerNorm(AdaLayerNorm):
    """The adaptive LayerNorm of a block: shared norm, one modulation for video and one for text."""

    def __init__(self, condition_dim: int, dim: int, affine: bool, eps: float) -> None:
        super().__init__(condition_dim, dim, 6, affine, eps)

    def forward(self, video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Video (B, N, D), text (B, L, D), temb (1 or B, E) -> both modulated, then the two gates (1 or B, 1, D)."""
        vectors = self.vectors(temb)
        for_video, for_text = Modulation(*vectors[:3]), Modulation(*vectors[3:])
        video = self.modulate(video, for_video.shift, for_video.scale)
        text = self.modulate(text, for_text.shift, for_text.scale)
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
        """Video tokens (B, N, D), text tokens (B, L, D), temb (1 or B, E), rotary tables (N, head_dim) -> new video and text tokens."""
        video, text = hidden_states, encoder_hidden_states
        video_in, text_in, video_gate, text_gate = self.norm1(video, text, temb)
        video_out, text_out = self.attn1(
            hidden_states=video_in, encoder_hidden_states=text_in, image_rotary_emb=image_rotary_emb, **(attention_kwargs or {})
        )
        video, text = torch.addcmul(video, video_gate, video_out), torch.addcmul(text, text_gate, text_out)

        video_in, text_in, video_gate, text_gate = self.norm2(video, text, temb)
        joint = self.ff(torch.cat([text_in, video_in], dim=1))
        text_out, video_out = joint.split([text.shape[1], video.shape[1]], dim=1)
        return torch.addcmul(video, video_gate, video_out), torch.addcmul(text, text_gate, text_out)
