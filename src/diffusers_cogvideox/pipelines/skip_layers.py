"""Skip-layer guidance: steps also predict without some of the transformer's layers, and move away from that worse prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.hooks import HookRegistry, LayerSkipConfig
from diffusers.hooks.layer_skip import _apply_layer_skip_hook

from ..models.feature_cache import check_scores_can_be_skipped
from .guidance import Interval, check_interval

__all__ = ["PARTS", "SkipLayers"]

_HOOK = "cogvideox_skip_layer_guidance"

PARTS: dict[str, dict[str, bool]] = {
    "block": {"skip_attention": True, "skip_ff": True},
    "attention": {"skip_attention": True, "skip_ff": False},
    "scores": {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True},
}
"""What of a layer can be left out, in the words of diffusers' LayerSkip."""


@dataclass(frozen=True)
class SkipLayers:
    """v = p + s (c - c_skipped): p is the guided prediction, c the one with the prompt, c_skipped the same without `layers`.

    Spatio-temporal skip guidance (arXiv 2411.18664) leaves out whole blocks or their attention; perturbed-attention guidance
    (arXiv 2403.17377) replaces the attention scores by the identity. Each step that does so takes one pass more.

    Args:
        layers: indices of the transformer's blocks; the middle ones are a usual choice.
        scale: s.
        part: "block", "attention", or "scores".
        interval: (start, stop) of the part of the loop where it is done, in fractions of the steps.
    """

    layers: Sequence[int]
    scale: float = 1.0
    part: str = "block"
    interval: Interval = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Raise ValueError for values that are not possible, or have no effect."""
        check_interval(self.interval, "interval")
        if self.part not in PARTS:
            raise ValueError(f"part={self.part!r} is unknown: use one of {', '.join(PARTS)}.")
        if not self.scale:
            raise ValueError("scale=0 has no effect: pass another scale, such as 1.0, or skip no layers.")

    def check(self, transformer: Any) -> None:
        """Raise ValueError for no layer, one that the transformer does not have, or attention whose scores cannot be replaced."""
        count = len(transformer.transformer_blocks)
        if not self.layers or not all(0 <= index < count for index in self.layers):
            raise ValueError(
                f"layers={list(self.layers)} is not possible: name some of the transformer's {count} blocks, 0 to {count - 1}."
            )
        if self.part == "scores":
            check_scores_can_be_skipped(transformer)

    @contextmanager
    def left_out(self, transformer: Any) -> Iterator[None]:
        """Leave the layers out inside the `with` block. Hooks that were there before stay; these go, also after an error."""
        config = LayerSkipConfig(list(self.layers), fqn="transformer_blocks", **PARTS[self.part])
        try:
            _apply_layer_skip_hook(transformer, config, name=_HOOK)
            yield
        finally:
            HookRegistry.check_if_exists_or_initialize(transformer).remove_hook(_HOOK, recurse=True)
