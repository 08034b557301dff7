"""diffusers' guiders on the denoise loop: they say which predictions of a step are needed, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.guiders import BaseGuidance
from torch import Tensor

__all__ = ["BaseGuidance", "steer"]


Predict = Callable[[Tensor, str], Tensor]
"""(embeddings (B, L, D_text), a name for the prediction) -> velocity (B, F, C, H, W)."""


def steer(guider: Any, transformer: Any, embeds: Tensor, timestep: Tensor, place: dict[str, Any], predict: Predict) -> Tensor:
    """The guided velocity (B, F, C, H, W) of one step.

    Args:
        guider: a guider of diffusers; it is told the step, and may hook the transformer for some of the predictions.
        transformer: what predicts.
        embeds: [unconditional; conditional] (2B, L, D_text).
        timestep: of the step.
        place: where the loop is: "step_index" and "num_inference_steps".
        predict: one pass through the transformer.
    """
    unconditional, conditional = embeds.chunk(2)
    guider.set_state(step=place["step_index"], num_inference_steps=place["num_inference_steps"], timestep=timestep)
    parts = guider.prepare_inputs({"embeds": (conditional, unconditional)})
    for part in parts:
        guider.prepare_models(transformer)
        try:
            part.noise_pred = predict(part.embeds, getattr(part, guider._identifier_key))
        finally:
            guider.cleanup_models(transformer)
    return guider(parts)[0]
