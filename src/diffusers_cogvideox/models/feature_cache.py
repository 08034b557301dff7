"""diffusers' feature caches on our transformer: what would silently do nothing is made to work, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers.hooks import MagCacheConfig, SeaCacheConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor, nn

__all__ = ["CheckedCacheMixin", "check_cached_loop", "first_stateful_layer", "noisy_latents"]


class CheckedCacheMixin(CacheMixin):
    """`CacheMixin` whose `enable_cache` takes effect or raises."""

    def enable_cache(self, config: Any) -> None:
        """Turn on one of diffusers' feature caches, as `CacheMixin.enable_cache`.

        SeaCache, which knows only some models by itself, is told where the noisy latents are.

        Raises:
            ValueError: a cache is on already, or this config reaches no layer of this model.
        """
        if isinstance(config, SeaCacheConfig) and config.raw_vision_callback is None:
            config = replace(config, raw_vision_callback=noisy_latents)
        before = self._count_layer_hooks()
        super().enable_cache(config)
        if self._count_layer_hooks() == before:
            self.disable_cache()
            raise ValueError(
                f"{type(config).__name__} as given reaches no layer of this model, so nothing would be cached. TaylorSeerCacheConfig needs "
                r"cache_identifiers=[r'transformer_blocks\.\d+\.attn1'] or use_lite_mode=True."
            )

    def _count_layer_hooks(self) -> int:
        registries = (getattr(layer, "_diffusers_hook", None) for layer in self.modules() if layer is not self)  # type: ignore[attr-defined]
        return sum(len(registry.hooks) for registry in registries if registry is not None)


def noisy_latents(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The latents of a forward call of the transformer as SeaCache compares them: one (C, F, H, W) per sample, without the channels of
    an image, a mask or a control video, which stay the same from step to step.
    """
    latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    channels = model.config.out_channels or model.config.in_channels
    return list(latents[:, :, :channels].transpose(1, 2))


def check_cached_loop(model: Any, steps: int, *, windows: bool = False, halved: bool = False) -> None:
    """Check that the feature cache of a transformer, if one is on, can do a denoise loop.

    Args:
        model: the transformer, ours or diffusers'.
        steps: length of the loop.
        windows: whether the video is predicted in context windows.
        halved: whether the loop is guided in some of its steps only.

    Raises:
        ValueError: for windows, which the cache would mix up, and where MagCache, which counts calls, would count wrongly.
    """
    config = getattr(model, "_cache_config", None)
    if config is None:
        return
    if windows:
        raise ValueError("A feature cache would mix up the context windows of a video: call pipe.transformer.disable_cache() first.")
    if not isinstance(config, MagCacheConfig):
        return
    if config.num_inference_steps != steps:
        raise ValueError(
            f"MagCacheConfig(num_inference_steps={config.num_inference_steps}) does not fit a loop of {steps} steps, by which it counts: "
            f"call disable_cache(), then enable_cache with num_inference_steps={steps}."
        )
    if halved:
        raise ValueError("MagCache counts guided and unguided steps apart, and guidance_interval has both: leave one of the two out.")


def first_stateful_layer(blocks: nn.ModuleList) -> str | None:
    """Name of the first layer inside the blocks, not a block itself, with a hook that remembers its calls; None without any."""
    for name, layer in blocks.named_modules():
        registry = getattr(layer, "_diffusers_hook", None)
        if "." in name and registry is not None and any(hook._is_stateful for hook in registry.hooks.values()):
            return name
    return None
