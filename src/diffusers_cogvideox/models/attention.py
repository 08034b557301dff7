"""Joint attention over text and video tokens, as a diffusers attention module with a replaceable processor.

The processor goes through diffusers' attention dispatcher, so that `set_attention_backend` and the `attention_backend` context reach it;
with context parallelism, between the ranks' exchanges.
`hidden_states` is always the video stream and `encoder_hidden_states` the text stream, as everywhere in diffusers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from .context_parallel import Spread, attend_together
from .joint import in_place, joined
from .rope import apply_rotary, as_complex, rotate_, with_text

__all__ = ["PROJECTIONS", "CogVideoXAttention", "CogVideoXAttnProcessor", "with_separate_projections"]

QK_NORM_EPS = 1e-6
PROJECTIONS = ("to_q", "to_k", "to_v")


class CogVideoXAttnProcessor:
    """softmax(q k^T / sqrt(d)) v over the sequence [text; video], with normalised q and k, rotated where the tokens are video."""

    _attention_backend: Any = None  # set by diffusers' set_attention_backend

    def __call__(
        self,
        attn: CogVideoXAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        spread: Spread | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            attn: the module that owns the weights.
            hidden_states: video tokens (B, N, D).
            encoder_hidden_states: text tokens (B, L, D).
            attention_mask: boolean (True attends) or additive, (B, 1 or L+N, L+N), or 4-dimensional with heads in the second place.
            image_rotary_emb: (cos, sin) of the video tokens, each (N, head_dim).
            spread: how the tokens of the whole video lie over several ranks, of which all of the above are this one's, but the mask
                over all tokens.

        Returns:
            new video tokens (B, N, D) and text tokens (B, L, D).
        """
        lengths = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        projected = attn.project(joined(encoder_hidden_states, hidden_states))
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in projected)  # B x S x heads x d
        del projected  # each part is let go when its normalised form is there
        query = attn.norm_q(query)
        key = attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = _rotated(attn, query, key, with_text(image_rotary_emb, lengths[0]))
        if attention_mask is not None and attention_mask.ndim == 3:
            attention_mask = attention_mask.unsqueeze(1)
        attend = functools.partial(dispatch_attention_fn, backend=self._attention_backend)
        if spread is None:
            joint = attend(query, key, value, attn_mask=attention_mask).flatten(2)
        else:
            joint = attend_together(attend, query, key, value, attention_mask, spread).flatten(2)
        del query, key, value
        for layer in attn.to_out:
            joint = layer(joint)
        text, video = joint.split(lengths, dim=1)
        return video, text


def _rotated(attn: CogVideoXAttention, query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Normalised queries and keys (B, S, heads, d) rotated by tables of all tokens; in place where nobody else can hold them."""
    if not in_place() or not (_gives_its_own(attn.norm_q) and _gives_its_own(attn.norm_k)):
        return apply_rotary(query, rotary), apply_rotary(key, rotary)
    turns = as_complex(rotary)
    return rotate_(query, turns), rotate_(key, turns)


def _gives_its_own(norm: nn.Module) -> bool:
    """Whether what a layer gives is a tensor that nothing else knows: neither its input, nor something that hooks may have kept."""
    return type(norm) is nn.LayerNorm and not (norm._forward_hooks or nn.modules.module._global_forward_hooks)


class CogVideoXAttention(AttentionModuleMixin, nn.Module):
    """Weights of one joint attention: q, k, v (D -> D), per-head LayerNorm on q and k, output projection.

    Args:
        dim: width D of the tokens.
        heads: number of heads.
        head_dim: channels d of a head; heads * d is the width inside.
        bias: whether q, k and v have a bias (the output projection always has).
    """

    _default_processor_cls = CogVideoXAttnProcessor  # type: ignore[assignment]
    _available_processors: ClassVar[list[type]] = [CogVideoXAttnProcessor]  # type: ignore[misc]
    processor: Any
    is_cross_attention = False

    def __init__(self, dim: int, heads: int, head_dim: int, bias: bool = True) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.use_bias = bias
        self.norm_q, self.norm_k = (nn.LayerNorm(head_dim, eps=QK_NORM_EPS) for _ in range(2))
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in PROJECTIONS)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(0.0)])
        self.processor = CogVideoXAttnProcessor()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand video (B, N, D) and text (B, L, D) tokens to the processor; see `CogVideoXAttnProcessor.__call__`."""
        return self.processor(self, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)

    def project(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of the tokens (B, S, D), each (B, S, heads * d)."""
        if self.fused_projections:
            return self.to_qkv(tokens).chunk(3, dim=-1)
        return tuple(getattr(self, name)(tokens) for name in PROJECTIONS)

    @torch.no_grad()
    def fuse_projections(self) -> None:
        """Replace q, k and v by one linear `to_qkv` of the same parameters; the three are gone until `unfuse_projections`.

        Raises:
            ValueError: a projection is not a plain linear layer (LoRA, quantisation) or carries an offload or casting hook.
        """
        if self.fused_projections:
            return
        parts = [getattr(self, name) for name in PROJECTIONS]
        for name, part in zip(PROJECTIONS, parts, strict=True):
            _require_plain_linear(part, name, "fused")
        bias = torch.cat([part.bias for part in parts]) if self.use_bias else None
        self.to_qkv = _linear(torch.cat([part.weight for part in parts]), bias, like=self.to_q)
        for name in PROJECTIONS:
            delattr(self, name)
        self.fused_projections = True

    @torch.no_grad()
    def unfuse_projections(self) -> None:
        """Undo `fuse_projections`: the separate q, k and v come back with the current values of `to_qkv`.

        Raises:
            ValueError: `to_qkv` carries an adapter or a hook that would be lost.
        """
        if not self.fused_projections:
            return
        _require_plain_linear(self.to_qkv, "to_qkv", "split")
        weights = self.to_qkv.weight.chunk(3)
        biases = self.to_qkv.bias.chunk(3) if self.use_bias else (None,) * 3
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            setattr(self, name, _linear(weight.clone(), None if bias is None else bias.clone(), like=self.to_qkv))
        del self.to_qkv
        self.fused_projections = False


def _require_plain_linear(layer: nn.Module, name: str, verb: str) -> None:
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, and only plain linear projections can be {verb}. "
            "Unload LoRA adapters (fuse them into the weights first to keep their effect) and do this before quantising."
        )
    if hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook"):
        raise ValueError(f"{name} carries an offload or casting hook that would be lost if it were {verb}: do this before adding hooks.")


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    """A linear layer around existing tensors, trainable and in training mode as `like` is."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=like.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=like.weight.requires_grad)
    return layer.train(like.training)


def with_separate_projections(method: Callable[..., Any]) -> Callable[..., Any]:
    """An inherited method that speaks of to_q, to_k and to_v, made to refuse while `fuse_qkv_projections` has replaced them."""

    @functools.wraps(method)
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(module, CogVideoXAttention) and module.fused_projections for module in self.modules()):
            raise ValueError(
                f"{method.__name__} needs the separate to_q, to_k and to_v, but the projections are fused: "
                "call unfuse_qkv_projections() first."
            )
        return method(self, *args, **kwargs)

    return checked
