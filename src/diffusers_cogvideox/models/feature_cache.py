"""diffusers' feature caches on our transformer: what would silently do nothing, or mix things up, is made to work, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    HookRegistry,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.layer_skip import _apply_layer_skip_hook
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from .cache_states import HookedLayers, hooks_inside
from .tea_cache import TEA_CACHE_HOOK, TeaCacheConfig, apply_tea_cache

__all__ = ["ATTENTION", "CheckedCacheMixin", "check_scores_can_be_skipped", "check_unguided_pass", "noisy_latents", "start_cached_loop"]

ATTENTION = r"transformer_blocks\.\d+\.attn1"
"""Names of the attention layers, as TaylorSeer matches them."""

_LAYER_SKIP_HOOK = "cogvideox_layer_skip"


def _skip_layers(model: Any, config: LayerSkipConfig) -> None:
    if config.skip_attention_scores:
        check_scores_can_be_skipped(model)
    _apply_layer_skip_hook(model, replace(config), name=_LAYER_SKIP_HOOK)  # it writes into the config


_OURS: dict[type, tuple[Callable[[Any, Any], None], str]] = {
    LayerSkipConfig: (_skip_layers, _LAYER_SKIP_HOOK),
    TeaCacheConfig: (apply_tea_cache, TEA_CACHE_HOOK),
}
"""What `enable_cache` of diffusers does not take: how it is turned on, and the name of its hooks."""


class CheckedCacheMixin(CacheMixin):
    """`CacheMixin` whose `enable_cache` takes effect or raises.

    `cached_layers` counts what the cache spares. Every kind of prediction has states of its own.
    """

    cached_layers: HookedLayers | None = None
    _place: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    def enable_cache(self, config: Any) -> None:
        """Turn on one of diffusers' feature caches, as `CacheMixin.enable_cache`; also a `LayerSkipConfig` or a `TeaCacheConfig`.

        What diffusers' configs leave open is filled in: to SeaCache, where the noisy latents are; to PyramidAttentionBroadcast and
        FasterCache, the timestep; to TaylorSeer, the attention layers of this model.

        Raises:
            ValueError: a cache is on already, or this config reaches no layer of this model.
        """
        self._check_possible(config)
        config = self._completed(config)
        before = [hook for _, hook in hooks_inside(self)]  # type: ignore[arg-type]
        if type(config) in _OURS:
            _OURS[type(config)][0](self, config)
            HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()  # type: ignore[arg-type]
            self._cache_config = config
        else:
            super().enable_cache(config)
        added = [hook for _, hook in hooks_inside(self) if hook not in before]  # type: ignore[arg-type]
        self.cached_layers = HookedLayers(self, added)  # type: ignore[arg-type]
        if not added:
            self.disable_cache()
            raise ValueError(
                f"{type(config).__name__} as given reaches no layer of this model, so nothing would be cached. Its identifiers are matched "
                f"with the names of layers, such as transformer_blocks.0.attn1: for the attention layers write {ATTENTION!r}."
            )

    def disable_cache(self) -> None:
        """Turn the feature cache off, as `CacheMixin.disable_cache`."""
        if self.cached_layers is not None:
            self.cached_layers.release()
        self.cached_layers = None
        if type(self._cache_config) not in _OURS:
            return super().disable_cache()
        registry = HookRegistry.check_if_exists_or_initialize(self)  # type: ignore[arg-type]
        registry.remove_hook(_OURS[type(self._cache_config)][1], recurse=True)
        registry.invalidate_child_registries_cache()
        self._cache_config = None
        return None

    @contextmanager
    def cache_context(self, name: str, **place: Any) -> Iterator[None]:
        """As `CacheMixin.cache_context`: names the kind of prediction, and says where the loop is."""
        if self.cached_layers is not None:
            self.cached_layers.enter(name)
        self._place = place
        try:
            with super().cache_context(name, **place):
                yield
        finally:
            self._place = {}

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        super()._reset_stateful_cache(recurse)
        if self.cached_layers is not None:
            self.cached_layers.forget()

    def _check_possible(self, config: Any) -> None:
        if self.is_cache_enabled:
            raise ValueError(f"Caching has already been enabled with {type(self._cache_config).__name__}: call disable_cache() first.")
        blocks = len(self.transformer_blocks)  # type: ignore[attr-defined]
        if isinstance(config, FirstBlockCacheConfig) and blocks < 2:
            raise ValueError(f"FirstBlockCache leaves out all blocks but the first, and this model has {blocks}: use another cache.")

    def _completed(self, config: Any) -> Any:
        """The config with what it leaves open filled in for this model."""
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            return replace(config, raw_vision_callback=noisy_latents)
        if isinstance(config, TaylorSeerCacheConfig) and not (
            config.use_lite_mode or config.cache_identifiers or config.skip_predict_identifiers
        ):
            return replace(config, cache_identifiers=[ATTENTION])
        if isinstance(config, PyramidAttentionBroadcastConfig | FasterCacheConfig) and config.current_timestep_callback is None:
            config = replace(config, current_timestep_callback=self._timestep_of_the_loop)
        if isinstance(config, PyramidAttentionBroadcastConfig) and config.spatial_attention_block_skip_range is None:
            return replace(config, spatial_attention_block_skip_range=2)  # what diffusers warns that it takes
        if isinstance(config, FasterCacheConfig):
            return replace(config, tensor_format="BFCHW")
        return config

    def _timestep_of_the_loop(self) -> float:
        timestep = self._place.get("timestep")
        if timestep is None:
            raise ValueError(
                "The cache needs the timestep: call the model inside cache_context(name, timestep=...), or give the cache's config a "
                "current_timestep_callback."
            )
        return float(timestep)


def noisy_latents(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents of a forward call of the transformer as SeaCache compares them: one (C, F, H, W) per sample, without the channels of
    an image, a mask or a control video, which stay the same from step to step.
    """
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    channels = model.config.out_channels or model.config.in_channels
    return list(latents[:, :, :channels].transpose(1, 2))


def check_scores_can_be_skipped(transformer: Any) -> None:
    """Raise ValueError for an attention backend whose scores LayerSkip, which replaces PyTorch's function, cannot leave out."""
    for processor in transformer.attn_processors.values():
        backend = getattr(processor, "_attention_backend", None) or _AttentionBackendRegistry.get_active_backend()[0]
        name = str(getattr(backend, "value", backend))
        if "native" not in name or "flex" in name:
            raise ValueError(
                f"part='scores' (skip_attention_scores) has no effect with the attention backend {name}: leave out the whole attention, or "
                "call pipe.transformer.set_attention_backend('native')."
            )


def start_cached_loop(model: Any, steps: int, *, windows: bool = False, kinds: int = 1, batched: bool = True) -> None:
    """Check that the feature cache of a transformer, if one is on, can do a denoise loop, and let it forget loops before.

    Args:
        model: the transformer, ours or diffusers'.
        steps: length of the loop.
        windows: whether the video is predicted in context windows.
        kinds: how many sizes of passes there are: 2 for a loop that is guided in some of its steps only.
        batched: whether each guided pass holds both halves, with and without the prompt.

    Raises:
        ValueError: for windows, which the cache would mix up, where MagCache, which counts calls, would count wrongly, and where
            FasterCache would take other samples for the unconditional half.
    """
    config = getattr(model, "_cache_config", None)
    if config is None:
        return
    if windows and not isinstance(config, LayerSkipConfig):
        raise ValueError("A feature cache would mix up the context windows of a video: call pipe.transformer.disable_cache() first.")
    if isinstance(config, MagCacheConfig):
        _check_mag_cache(config, steps, kinds)
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled and (kinds > 1 or not batched):
        raise ValueError(
            "FasterCache predicts the unconditional half of a pass from the conditional one, so that all passes must hold both: leave out "
            "sequential_guidance, guidance_interval and guiders, and use guidance, or pass FasterCacheConfig(is_guidance_distilled=True), "
            "which only spares attention."
        )
    model._reset_stateful_cache()  # a call that failed may have left something


def check_unguided_pass(model: Any) -> None:
    """Raise ValueError when a pass without guidance, in a loop that began with it, would mislead the transformer's feature cache."""
    config = getattr(model, "_cache_config", None)
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled:
        raise ValueError(
            "FasterCache needs passes of both halves, and a callback has turned guidance off: leave one of the two out, or pass "
            "FasterCacheConfig(is_guidance_distilled=True)."
        )


def _check_mag_cache(config: MagCacheConfig, steps: int, kinds: int) -> None:
    if config.num_inference_steps != steps:
        raise ValueError(
            f"MagCacheConfig(num_inference_steps={config.num_inference_steps}) does not fit a loop of {steps} steps, by which it counts: "
            f"call disable_cache(), then enable_cache with num_inference_steps={steps}."
        )
    if kinds > 1:
        raise ValueError("MagCache counts guided and unguided steps apart, and guidance_interval has both: leave one of the two out.")
