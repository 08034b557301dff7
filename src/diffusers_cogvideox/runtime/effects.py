"""No optimisation that is on does nothing: every toggle of a pipeline is counted while it works, and one that did nothing raises.

A toggle is an `Effect`: whether it is on, and what to count. `watch` counts in the first step of a loop, where a mistake costs little; what
needs several steps, a feature cache, is counted to the end. What is inside a compiled region is not counted, which would compile it anew.

A new toggle is registered in one line, next to the code that it belongs to or here:

    register(Effect("streamed weights", is_on=lambda pipe: ..., parts=lambda pipe: modules_that_must_run, remedy="..."))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

__all__ = ["Effect", "Finding", "NoEffectError", "Watch", "calls_of", "register", "summary", "watch"]

Count = Callable[[], int | None]
"""What was counted until now; None where that is not possible."""


class NoEffectError(ValueError):
    """An optimisation that is on did nothing. `latents` (B, F, C, H, W), where the loop is finished: nothing of it is lost."""

    latents: Tensor | None = None


@dataclass(frozen=True)
class Effect:
    """One toggle.

    Args:
        name: what messages call it.
        is_on: whether it is on in a pipeline.
        count: counts what it does while its block runs; see `calls_of`.
        remedy: what to do when it does nothing.
        whole_loop: whether to count to the end of the loop instead of in the first step.
        conditional: whether it may have nothing to do, such as tiles for a small picture; then it is reported, and never raises.
    """

    name: str
    is_on: Callable[[Any], bool]
    count: Callable[[Any], AbstractContextManager[Count]]
    remedy: str
    whole_loop: bool = False
    conditional: bool = False


@dataclass(frozen=True)
class Finding:
    """A toggle that is on, and how often it acted in the last call: None where that is not known, or before the first call."""

    name: str
    hits: int | None = None


_effects: dict[str, Effect] = {}


def register(effect: Effect) -> None:
    """Have every loop watch a toggle. A later one of the same name takes its place."""
    _effects[effect.name] = effect


def summary(pipe: Any) -> list[Finding]:
    """The toggles that are on in a pipeline, with what they did in its last call."""
    known = {finding.name: finding for finding in getattr(pipe, "_findings", ())}
    return [known.get(effect.name, Finding(effect.name)) for effect in _effects.values() if effect.is_on(pipe)]


class Watch:
    """The counts of one loop. See `watch`."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._running: list[tuple[Effect, Count]] = []
        self._first_step, self._loop = ExitStack(), ExitStack()
        pipe._findings = []
        for effect in _effects.values():
            if effect.is_on(pipe):
                stack = self._loop if effect.whole_loop else self._first_step
                self._running.append((effect, stack.enter_context(effect.count(pipe))))

    def after_step(self) -> None:
        """Stop counting what the first step must show. Raises NoEffectError for a toggle that it does not show."""
        self._conclude(whole_loop=False)
        self._first_step.close()

    def finish(self, latents: Tensor) -> None:
        """Raise NoEffectError, which carries the result (B, F, C, H, W) of the loop, for a toggle that did nothing until its end."""
        self._conclude(whole_loop=True, latents=latents)

    def close(self) -> None:
        """Stop counting."""
        self._first_step.close()
        self._loop.close()

    def _conclude(self, whole_loop: bool, latents: Tensor | None = None) -> None:
        due = [(effect, count()) for effect, count in self._running if effect.whole_loop is whole_loop]
        self._running = [(effect, count) for effect, count in self._running if effect.whole_loop is not whole_loop]
        self._pipe._findings += [Finding(effect.name, hits) for effect, hits in due]
        for effect, hits in due:
            if hits == 0 and not effect.conditional:
                when = "in the whole loop" if whole_loop else "in the first step"
                kept = "" if latents is None else " The result is in the error's `latents`: pipe.decode_frames(error.latents)."
                error = NoEffectError(f"{effect.name} is on and did nothing {when}: {effect.remedy}.{kept}")
                error.latents = latents
                raise error


@contextmanager
def watch(pipe: Any) -> Iterator[Watch]:
    """Count what the toggles of a pipeline do while its loop runs; tell it of steps with `after_step` and `finish`."""
    watching = Watch(pipe)
    try:
        yield watching
    finally:
        watching.close()


# --- how to count -------------------------------------------------------------------------------------------------------


@contextmanager
def calls_of(parts: Callable[[Any], Iterable[nn.Module]], pipe: Any) -> Iterator[Count]:
    """Count the forward passes of modules of a pipeline."""
    modules, hidden = list(parts(pipe)), _compiled_insides(pipe)
    visible = [module for module in modules if module not in hidden]
    calls: list[None] = []
    handles = [module.register_forward_pre_hook(lambda *_: calls.append(None)) for module in visible]
    try:
        yield lambda: len(calls) if visible or not modules else None
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _calls_of_functions(places: Callable[[Any], Iterable[tuple[Any, str]]], pipe: Any) -> Iterator[Count]:
    """Count the calls of functions that are attributes of objects."""
    calls: list[None] = []
    originals = [(owner, name, getattr(owner, name)) for owner, name in places(pipe)]

    def counted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return function(*args, **kwargs)

    for owner, name, function in originals:
        setattr(owner, name, partial(counted, function))
    try:
        yield lambda: len(calls)
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


@contextmanager
def _not_counted(_pipe: Any) -> Iterator[Count]:
    yield lambda: None


@contextmanager
def _spared_layers(pipe: Any) -> Iterator[Count]:
    layers = getattr(pipe.transformer, "cached_layers", None)
    before = layers.hits if layers else 0
    measures = getattr(pipe.transformer._cache_config, "calibrate", False)  # MagCache, which then prints ratios and spares nothing
    yield lambda: layers.hits - before if layers and not measures else None


def _layers(pipe: Any) -> Iterator[Any]:
    return iter(pipe.transformer.modules())


def _compiled(pipe: Any) -> list[nn.Module]:
    return [layer for layer in _layers(pipe) if layer._compiled_call_impl is not None or hasattr(layer, "_orig_mod")]


def _compiled_insides(pipe: Any) -> set[nn.Module]:
    """All modules inside compiled regions, where a hook would cause another compilation."""
    return {layer for region in _compiled(pipe) for layer in region.modules() if layer is not region or region._compiled_call_impl}


def _compiled_calls(pipe: Any) -> list[tuple[Any, str]]:
    """Functions that are called for each compiled region."""
    return [(layer, "_compiled_call_impl" if layer._compiled_call_impl else "forward") for layer in _compiled(pipe)]


# --- the toggles --------------------------------------------------------------------------------------------------------


def _hook_calls(name: str, pipe: Any) -> AbstractContextManager[Count]:
    """Count the calls of diffusers' hooks of this name."""
    hidden = _compiled_insides(pipe)
    owners = _hooked(name, pipe)
    visible = [registry.hooks[name].fn_ref for layer, registry in owners if layer not in hidden]
    if owners and not visible:
        return _not_counted(pipe)
    return _calls_of_functions(lambda _: [(function, "pre_forward") for function in visible], pipe)


def _hooked(name: str, pipe: Any) -> list[tuple[nn.Module, HookRegistry]]:
    registries = [(layer, getattr(layer, "_diffusers_hook", None)) for layer in _layers(pipe)]
    return [(layer, registry) for layer, registry in registries if registry is not None and name in registry.hooks]


def _adapters(pipe: Any) -> list[nn.Module]:
    """The first matrices of all LoRA adapters that are active."""
    layers = [layer for layer in _layers(pipe) if hasattr(layer, "lora_A") and not layer.disable_adapters and not layer.merged]
    return [layer.lora_A[name] for layer in layers for name in layer.active_adapters if name in layer.lora_A and layer.scaling[name]]


def _fused(pipe: Any) -> list[nn.Module]:
    """The linear layers that take the place of three."""
    return [layer.to_qkv for layer in _layers(pipe) if getattr(layer, "fused_projections", False)]


def _dispatching(pipe: Any) -> list[Any]:
    """The attention layers that go through diffusers' dispatcher: their processors say so with an attribute."""
    return [layer for layer in _layers(pipe) if hasattr(getattr(layer, "processor", None), "_attention_backend")]


def _backend_is_chosen(pipe: Any) -> bool:
    chosen = any(layer.processor._attention_backend is not None for layer in _dispatching(pipe))
    return chosen or _AttentionBackendRegistry._active_backend != AttentionBackendName.NATIVE


def _quantised(pipe: Any) -> list[nn.Module]:
    """The layers with quantised weights; of those that adapters wrap, what is inside."""
    return [layer for layer in _layers(pipe) if not hasattr(layer, "base_layer") and _is_quantised(getattr(layer, "weight", None))]


def _is_quantised(weight: Any) -> bool:
    """Whether a weight holds whole numbers, as bitsandbytes and GGUF keep them, or is one of torchao's."""
    if not isinstance(weight, Tensor):
        return False
    return not weight.is_floating_point() or type(weight.data).__module__.partition(".")[0] == "torchao"


def _is_shared(model: Any, group: str) -> bool:
    return getattr(model, group, None) is not None


def _blocks(pipe: Any) -> list[Any]:
    return list(getattr(pipe.transformer, "transformer_blocks", []))


def _accelerate_hooks(pipe: Any) -> list[tuple[Any, str]]:
    return [(layer._hf_hook, "pre_forward") for layer in _layers(pipe) if hasattr(layer, "_hf_hook")]


_AGAIN = "turn it off, and on again as the last thing before the call"

for _effect in (
    Effect(
        "the feature cache",
        is_on=lambda pipe: getattr(pipe.transformer, "is_cache_enabled", False),
        count=_spared_layers,
        remedy="every layer was computed; raise its threshold, widen its range of timesteps, take more steps, or call "
        "pipe.transformer.disable_cache()",
        whole_loop=True,
    ),
    Effect(
        "the attention backend",
        is_on=_backend_is_chosen,
        count=partial(calls_of, _dispatching),
        remedy="no attention layer goes through diffusers' dispatcher; use this package's transformer and attention processors, or "
        "call set_attention_backend('native')",
    ),
    Effect("fused q, k and v", lambda pipe: bool(_fused(pipe)), partial(calls_of, _fused), "call unfuse_qkv_projections()"),
    Effect("LoRA", lambda pipe: bool(_adapters(pipe)), partial(calls_of, _adapters), "load it again, into the pipeline that is called"),
    Effect(
        "layerwise casting",
        lambda pipe: bool(_hooked("layerwise_casting", pipe)),
        partial(_hook_calls, "layerwise_casting"),
        _AGAIN,
    ),
    Effect("group offloading", lambda pipe: bool(_hooked("group_offloading", pipe)), partial(_hook_calls, "group_offloading"), _AGAIN),
    Effect("CPU offloading", lambda pipe: bool(_accelerate_hooks(pipe)), partial(_calls_of_functions, _accelerate_hooks), _AGAIN),
    Effect("compilation", lambda pipe: bool(_compiled(pipe)), partial(_calls_of_functions, _compiled_calls), _AGAIN),
    Effect(
        "streamed weights",
        lambda pipe: bool(_hooked("cogvideox_streaming", pipe)),
        partial(_hook_calls, "cogvideox_streaming"),
        "call stop_streaming(model) and stream(model, device) again",
    ),
    Effect(
        "quantisation",
        lambda pipe: getattr(pipe.transformer, "is_quantized", False) or bool(_quantised(pipe)),
        partial(calls_of, _quantised),
        "no quantised layer was called; quantise the transformer that the pipeline holds",
    ),
    Effect(
        "parallelism",
        lambda pipe: getattr(pipe.transformer, "_parallel_config", None) is not None,
        partial(calls_of, _dispatching),  # which are handed how the tokens are spread, or have a share of the heads
        "no attention layer takes part; call set_attn_processor(CogVideoXAttnProcessor())",
    ),
    # Of two samples only, and of rows in decoding, after the loop.
    Effect("samples shared by ranks", lambda pipe: _is_shared(pipe.transformer, "batch_group"), _not_counted, "", conditional=True),
    Effect("rows of the VAE shared by ranks", lambda pipe: _is_shared(pipe.vae, "row_group"), _not_counted, "", conditional=True),
    Effect(
        "samples one by one",
        lambda pipe: any(getattr(block, "one_by_one", False) for block in _blocks(pipe)),
        partial(calls_of, lambda pipe: [block.attn1 for block in _blocks(pipe)]),
        "call split_batch() again",
    ),
    Effect(
        "feed-forward networks in chunks",
        lambda pipe: any(getattr(block, "ff_tokens", None) for block in _blocks(pipe)),
        partial(calls_of, lambda pipe: [block.ff for block in _blocks(pipe)]),
        "call chunk_feed_forward(tokens) again",
    ),
    Effect(
        "released modulation",
        lambda pipe: getattr(pipe.transformer, "releases_modulation", False),
        _not_counted,
        "",
        conditional=True,  # only acts on weights that are on an accelerator
    ),
    Effect("tiles of the VAE", lambda pipe: getattr(pipe.vae, "use_tiling", False), _not_counted, "", conditional=True),
    Effect("slices of the VAE", lambda pipe: getattr(pipe.vae, "use_slicing", False), _not_counted, "", conditional=True),
):
    register(_effect)
