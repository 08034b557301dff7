"""How much memory a pass of the T5 encoder takes, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["text_encoder_peak"]

_FLOAT = 4  # bytes of a float32


def text_encoder_peak(config: Mapping[str, Any], batch: int, length: int, width: int) -> int:
    """Most bytes alive at once, beside weights, while T5 encodes `batch` texts of `length` tokens with `width` bytes per number.

    Attention is taken to keep its scores, as it does where no kernel takes T5's position bias; with one that does, less is needed.
    """
    hidden = batch * length * config["d_model"] * width
    heads, inner = config["num_heads"], batch * length * config["num_heads"] * config["d_kv"]
    bias = heads * length**2 * width
    scores = batch * heads * length**2 * _FLOAT
    around = 3 * hidden + 3 * inner * width + 2 * bias  # two streams and a norm; q, k, v; the positions' bias, and a copy of it
    wide = inner * _FLOAT
    if width < _FLOAT:  # q, k and v in float32, q and k scaled; then the scores twice; then the result in both precisions
        attention = max(5 * wide + scores, 4 * wide + 2 * scores, 5 * wide + 3 * scores // 2 + inner * width)
    else:
        attention = max(2 * wide + scores, wide + 2 * scores)
    gated = 4 * batch * length * config["d_ff"] * width  # an activation that is computed step by step
    return max(around + attention, 4 * hidden + bias + gated)
