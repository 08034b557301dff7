"""How much memory a pass of the transformer takes: what is alive at each moment of a block, from sizes alone.

All counts are bytes of the results of operations, beside the weights and the inputs. With B samples in a group, S = L + N tokens of
width D, and e bytes per number, u = B S D e is the size of one joint stream of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..geometry import Geometry
from .rope import ROTATED

__all__ = ["Attention", "TransformerPass", "modulation_table_bytes", "rotary_bytes"]

Attention = Literal["fused", "math"]
"""Whether the attention kernel keeps the S x S scores of every head ("math") or not ("fused": flash, efficient, cuDNN, the CPU's own)."""

_FLOAT = 4  # bytes of a float32
_EXPANSION = 4  # width of the feed-forward network in units of D


@dataclass(frozen=True, kw_only=True)
class TransformerPass:
    """One pass over latents (batch, frames, C, latent_height, latent_width) and `text` tokens, and the ways in which it saves memory.

    Args:
        config: of the transformer.
        width: bytes of a number (of weights and activations).
        split_batch: samples go through each block one after the other.
        ff_tokens: tokens that the feed-forward network sees at a time.
        attention: kind of kernel.
        float32_residual: whether the tokens between the layers are float32.
        adapters: whether LoRA layers run beside the projections.
        unpacked: bytes per weight that a layer takes while it works, beside what is stored, where that is quantised.
    """

    config: Mapping[str, Any]
    batch: int
    frames: int
    latent_height: int
    latent_width: int
    text: int
    width: int
    split_batch: bool = False
    ff_tokens: int | None = None
    attention: Attention = "fused"
    float32_residual: bool = False
    adapters: bool = False
    unpacked: int = 0

    @property
    def dim(self) -> int:
        """Width D of the tokens."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def tokens(self) -> int:
        """Video tokens N of one sample."""
        return math.prod(Geometry.from_transformer(self.config).token_grid(self.frames, self.latent_height, self.latent_width))

    @property
    def sequence(self) -> int:
        """All tokens S of one sample."""
        return self.tokens + self.text

    def peak(self) -> int:
        """Most bytes that are alive at once in one pass."""
        return max(self._embedding(), self._outside() + max(self._modulation(), self._attention(), self._feed_forward()), self._head())

    # --- sizes ------------------------------------------------------------------------------------------------------

    @property
    def _group(self) -> int:
        """Samples that a block works on at a time."""
        return 1 if self.split_batch else self.batch

    @property
    def _joint(self) -> int:
        """u: one joint stream of a group, as the linear layers see it."""
        return self._group * self.sequence * self.dim * self.width

    @property
    def _stream(self) -> int:
        """The same between the layers, where it may be wider."""
        return self._group * self.sequence * self.dim * (_FLOAT if self.float32_residual else self.width)

    @property
    def _rotates(self) -> bool:
        return bool(self.config["use_rotary_positional_embeddings"])

    def _tables(self) -> int:
        """Rotary tables with the rows of the text."""
        return 2 * self.sequence * self.config["attention_head_dim"] * _FLOAT if self._rotates else 0

    # --- moments ----------------------------------------------------------------------------------------------------

    def _outside(self) -> int:
        """What lives around a block's work on one group: its inputs; with the batch split, the results of all."""
        whole = self._stream // self._group * self.batch
        return 2 * whole if self.split_batch and self.batch > 1 else whole

    def _modulation(self) -> int:
        """LayerNorm, then the modulated stream."""
        return 2 * self._stream + self._joint

    def _attention(self) -> int:
        """The modulated stream, q, k and v; then what normalising one of them, rotating it or attending adds to them."""
        u, heads = self._joint, self.config["num_attention_heads"]
        statistics = self._group * self.sequence * heads * _FLOAT
        normed = u + 2 * statistics * (2 if self.width < _FLOAT else 1)
        wide = u * _FLOAT // self.width
        # Tables, and the same as complex numbers; half precision a few tokens at a time.
        part = min(ROTATED, self.sequence) * (wide // self.sequence) if self.width < _FLOAT else 0
        rotated = 3 * self._tables() // 2 + part if self._rotates else 0
        scores = self._group * heads * self.sequence**2 * _FLOAT
        attended = u + statistics + (2 * scores + 3 * wide if self.attention == "math" else 0)
        adapted = 2 * u if self.adapters else 0
        unpacked = self.dim**2 * self.unpacked
        return 4 * u + max(normed, rotated, attended, adapted, unpacked)

    def _feed_forward(self) -> int:
        """The stream after attention, and the hidden layer before and after its activation: of all tokens, or of some at a time."""
        unpacked = _EXPANSION * self.dim**2 * self.unpacked
        if self.ff_tokens is not None:
            part = self._group * min(self.ff_tokens, max(self.tokens, self.text)) * self.dim * self.width
            return self._stream + max(2 * _EXPANSION * part, _EXPANSION * part + unpacked) + part
        return self._stream + (1 + _EXPANSION) * self._joint + max(_EXPANSION * self._joint, unpacked)

    def _embedding(self) -> int:
        """Patches before and after they are put in order."""
        return 2 * self.batch * self.sequence * self.dim * self.width

    def _head(self) -> int:
        """The last stream, its norm, and the second norm before and after modulation."""
        whole = self._stream // self._group * self.batch
        return 4 * whole


def modulation_table_bytes(config: Mapping[str, Any], steps: int, width: int) -> int:
    """Bytes of the modulations of a schedule of `steps` timesteps, `width` bytes per number: 12 D per block, 2 D at the end."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    return (steps + 1) * (12 * config["num_layers"] + 2) * dim * width


def rotary_bytes(config: Mapping[str, Any], tokens: int) -> int:
    """Bytes of the rotary tables of the video tokens, which live as long as the loop."""
    return 2 * tokens * config["attention_head_dim"] * _FLOAT if config["use_rotary_positional_embeddings"] else 0
