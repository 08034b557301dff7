"""TeaCache: the residual of all blocks is used again while the embedding of the timestep has moved little. diffusers has no such cache.

"Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (arXiv 2411.19108), in the form for CogVideoX, whose indicator is
the embedding of the timestep itself:
    d_i = |e_i - e_(i-1)|_1 / |e_(i-1)|_1,    D <- D + p(d_i);    a step is computed, and D set to 0, when D reaches the threshold
The polynomial p turns the distance of embeddings into that of the model's outputs. It belongs to a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

__all__ = ["TEA_CACHE_HOOK", "TeaCacheConfig", "apply_tea_cache", "timestep_embedding"]

TEA_CACHE_HOOK = "cogvideox_tea_cache"


@dataclass
class TeaCacheConfig:
    """Settings of TeaCache, for `transformer.enable_cache`.

    Args:
        threshold: the estimated change of the output, relative and summed over the steps left out, at which a step is computed.
        coefficients: of p, the highest power first; `Calibration.coefficients` fits them to a checkpoint.
        computed_first, computed_last: steps at the beginning and the end that are always computed.
    """

    threshold: float = 0.1
    coefficients: Sequence[float] = (1.0, 0.0)
    computed_first: int = 1
    computed_last: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for settings that are not possible."""
        if not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold={self.threshold} is not possible: it must be at least 0, and finite.")
        if not len(self.coefficients):
            raise ValueError("coefficients=() is not possible: name at least one, such as (1.0, 0.0) for p(d) = d.")
        if min(self.computed_first, self.computed_last) < 0:
            raise ValueError("computed_first and computed_last count steps: neither can be negative.")


class _State(BaseState):
    """Of one kind of prediction."""

    def __init__(self) -> None:
        self.embedding: Tensor | None = None
        self.distance = 0.0
        self.residual: Tensor | None = None  # (B, N, D)
        self.tokens: Tensor | None = None  # (B, N, D), what goes into the first block
        self.skipping = False

    def reset(self) -> None:
        """As before the first step."""
        self.__init__()  # type: ignore[misc]


class _BlockHook(ModelHook):
    """On every block: the first one decides, all are left out together, the last one notes what they did."""

    _is_stateful = True

    def __init__(self, config: TeaCacheConfig, states: StateManager, model: Any, place: int, count: int) -> None:
        super().__init__()
        self.config, self.states, self.model = config, states, model
        self.is_first, self.is_last = place == 0, place == count - 1

    def new_forward(self, _block: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """In place of the block's: video and text tokens (B, N, D), (B, L, D)."""
        state: _State = self.states.get_state()
        video, text = (kwargs.get(name, value) for name, value in zip(_STREAMS, [*args[:2], None, None], strict=False))
        if self.is_first:
            state.skipping, state.tokens = self._is_skipped(state, video), video
        if state.skipping:
            return (video + state.residual if self.is_last else video), text
        output: tuple[Tensor, Tensor] = self.fn_ref.original_forward(*args, **kwargs)  # type: ignore[misc]
        if self.is_last:
            state.residual = output[0] - state.tokens  # type: ignore[operator]
        return output

    @torch.compiler.disable
    def _is_skipped(self, state: _State, like: Tensor) -> bool:
        place, config = self.states.context, self.config
        if place.step_index is None or place.num_inference_steps is None or place.timestep is None:
            raise ValueError(
                "TeaCache needs to know where the loop is: cache_context(name, step_index=..., num_inference_steps=..., timestep=...)."
            )
        timestep = torch.as_tensor(place.timestep, device=like.device).reshape(-1)[:1]
        embedding, before = timestep_embedding(self.model, timestep), state.embedding
        state.embedding = embedding
        if before is not None:
            distance = float((embedding - before).abs().mean() / before.abs().mean())
            state.distance += _polynomial(config.coefficients, distance)
        inside = config.computed_first <= place.step_index < place.num_inference_steps - config.computed_last
        if inside and state.residual is not None and state.distance < config.threshold:
            return True
        state.distance = 0.0
        return False

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget all predictions."""
        self.states.reset()
        return module


def timestep_embedding(model: Any, timestep: Tensor) -> Tensor:
    """Embedding e (1, E) in float32 of a timestep (1,), without that of `ofs`, which is constant."""
    dtype = next(model.time_embedding.parameters()).dtype
    return model.time_embedding(model.time_proj(timestep).to(dtype)).float()


_STREAMS = ("hidden_states", "encoder_hidden_states")


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for coefficient in coefficients:
        value = value * x + float(coefficient)
    return max(0.0, value)  # fitted to few points, it may dip below


def apply_tea_cache(model: Any, config: TeaCacheConfig) -> None:
    """Put the hooks of TeaCache on the blocks of a transformer."""
    states = StateManager(_State)  # type: ignore[arg-type]
    blocks = list(model.transformer_blocks)
    for place, block in enumerate(blocks):
        hook = _BlockHook(config, states, model, place, len(blocks))
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, TEA_CACHE_HOOK)
