"""What diffusers' cache hooks lack: a count of the layers that they spare, and a state of its own for each kind of prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook, StateManager
from torch import nn

__all__ = ["HookedLayers", "first_stateful_layer", "hooks_inside"]


def hooks_inside(model: nn.Module) -> Iterator[tuple[str, ModelHook]]:
    """Names and hooks of all layers of a model, those of the model itself left out."""
    for layer in model.modules():
        registry: HookRegistry | None = getattr(layer, "_diffusers_hook", None)
        if layer is not model and registry is not None:
            yield from registry.hooks.items()


def first_stateful_layer(blocks: nn.ModuleList) -> str | None:
    """Name of the first layer inside the blocks, not a block itself, with a hook that remembers its calls; None without any."""
    for name, layer in blocks.named_modules():
        registry = getattr(layer, "_diffusers_hook", None)
        if "." in name and registry is not None and any(hook._is_stateful for hook in registry.hooks.values()):
            return name
    return None


class HookedLayers:
    """The hooks of one cache: counts their calls and how many of these were computed, and gives each context its own states.

    A hook replaces the forward pass of its layer and may call the original one. PyramidAttentionBroadcast and FasterCache remember one
    state for all calls, so that predictions with and without the prompt, made one after the other, would be taken for each other;
    `enter` exchanges it.

    Args:
        model: the transformer.
        hooks: the cache's hooks on its layers.
    """

    def __init__(self, model: nn.Module, hooks: list[ModelHook]) -> None:
        self.calls = 0
        self.computed = 0
        self._restore: list[tuple[Any, str, Any]] = []
        self._hooks = hooks
        root = HookRegistry.check_if_exists_or_initialize(model).hooks.values()
        self._single = [hook for hook in [*hooks, *root] if hasattr(hook, "state") and not _has_manager(hook)]
        self._states: dict[str, list[Any]] = {}
        for hook in hooks:
            self._count(hook.fn_ref, "pre_forward", "calls")
            if not getattr(hook, "skip_attention_scores", False):  # which computes its layer, without the scores
                self._count(hook.fn_ref, "original_forward", "computed")

    def __len__(self) -> int:
        """Number of hooks."""
        return len(self._hooks)

    @property
    def hits(self) -> int:
        """Calls of layers that were spared, or were made cheaper."""
        return self.calls - self.computed

    def enter(self, context: str) -> None:
        """Let all states be those of the predictions of this name."""
        if not self._single:
            return
        if context not in self._states:
            self._states[context] = [_fresh_state(hook) for hook in self._single]
        for hook, state in zip(self._single, self._states[context], strict=True):
            hook.state = state

    def forget(self) -> None:
        """Drop the states of all predictions."""
        self._states.clear()
        for hook in self._single:
            hook.state = _fresh_state(hook)

    def release(self) -> None:
        """Stop counting; the hooks can be removed then."""
        for owner, name, original in self._restore:
            setattr(owner, name, original)
        self._restore.clear()

    def _count(self, owner: Any, place: str, name: str) -> None:
        """Put a function that counts in the place of one that a hook calls."""
        function: Callable[..., Any] = getattr(owner, place)

        @torch.compiler.disable(recursive=False)
        def count() -> None:
            setattr(self, name, getattr(self, name) + 1)

        def counted(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        self._restore.append((owner, place, function))
        setattr(owner, place, counted)


def _fresh_state(hook: Any) -> Any:
    """A state in which the next call is computed: FasterCache's, at 0, would be looked up in a loop that starts where it may."""
    state = type(hook.state)()
    state.iteration = getattr(hook, "block_skip_range", 0)  # it computes the calls that this divides
    return state


def _has_manager(hook: ModelHook) -> bool:
    return any(isinstance(value, StateManager) for value in vars(hook).values())
