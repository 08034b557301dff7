"""One call of a pipeline as a value: everything that is the same for all tasks, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import logging
from torch import Tensor

from ..geometry import Geometry
from .caching import check_cache
from .guidance import Interval, check_interval, dynamic_rule
from .guiders import BaseGuidance
from .journal import Journal
from .prompts import PromptInputs
from .skip_layers import SkipLayers
from .story import check_starts
from .windows import ContextWindows

__all__ = ["OUTPUT_TYPES", "Request"]

OUTPUT_TYPES = ("pil", "np", "pt", "stream", "latent")

_NOT_WITH_GUIDER = (
    "guidance_scale",
    "use_dynamic_cfg",
    "guidance_interval",
    "sequential_guidance",
    "skip_layers",
    "context",
    "journal",
)

logger = logging.get_logger(__name__)

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asked for. Field names are those of the pipelines' `__call__`, where they are described."""

    inputs: PromptInputs
    height: int
    width: int
    num_frames: int
    num_inference_steps: int = 50
    timesteps: list[int] | None = None
    guidance_scale: float = 6.0
    use_dynamic_cfg: bool | str = False
    guidance_interval: Interval = (0.0, 1.0)
    sequential_guidance: bool = False
    skip_layers: SkipLayers | None = None
    zero_unconditional: bool = False
    num_videos_per_prompt: int = 1
    eta: float = 0.0
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: Tensor | None = None
    output_type: str = "pil"
    return_dict: bool = True
    attention_kwargs: dict[str, Any] | None = None
    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    max_sequence_length: int = 226
    context: ContextWindows | None = None
    riflex: bool = False
    journal: Journal | None = None
    guider: BaseGuidance | None = None
    cache: Any = None
    max_error: float | None = None
    measure_error: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError or TypeError for whatever can be told wrong without a model."""
        dynamic_rule(self.use_dynamic_cfg)
        check_interval(self.guidance_interval, "guidance_interval")
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={self.output_type!r} is unknown: use one of {OUTPUT_TYPES}.")
        self._check_numbers()
        check_cache(self.cache, self.max_error, self.measure_error, self.guidance_interval, self.eta)
        if isinstance(self.generator, list) and len(self.generator) != self.count:
            raise ValueError(
                f"{len(self.generator)} generators for {self.count} videos (prompts x num_videos_per_prompt): pass one for all, or "
                "one for each."
            )
        if self.guider is not None:
            self._check_guider()
        inputs = self.inputs
        negative = inputs.negative_prompt is not None or inputs.negative_prompt_embeds is not None
        if self.zero_unconditional and negative:
            raise ValueError("zero_unconditional=True leaves no place for a negative prompt: pass one of the two.")

    def _check_numbers(self) -> None:
        for name in ("height", "width", "num_frames", "num_inference_steps", "num_videos_per_prompt", "max_sequence_length"):
            if not isinstance(getattr(self, name), Integral):
                raise TypeError(f"{name}={getattr(self, name)!r} is not possible: it must be a whole number.")
        for name in ("num_videos_per_prompt", "max_sequence_length"):  # the sizes are checked where the model is known
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not possible: it must be at least 1.")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} is not possible: it must be finite; 1 or less turns guidance off.")

    def _check_guider(self) -> None:
        """Raise for what is no guider, and for options that a guider decides itself, or whose state it would mix up."""
        if not isinstance(self.guider, BaseGuidance):
            raise TypeError(f"guider={self.guider!r} is not possible: pass one of diffusers' guiders, such as AdaptiveProjectedGuidance().")
        defaults = {field.name: field.default for field in fields(Request)}
        if given := [name for name in _NOT_WITH_GUIDER if getattr(self, name) != defaults[name]]:
            raise ValueError(
                f"{', '.join(given)} cannot be combined with a guider ({type(self.guider).__name__}), which has settings of its own: leave "
                "out one of the two."
            )

    def _warn_without_guidance(self) -> None:
        """Log which arguments have no effect because guidance is off."""
        inputs = self.inputs
        negative = inputs.negative_prompt is not None or inputs.negative_prompt_embeds is not None
        limited = self.guidance_interval != (0.0, 1.0)
        if not self.guided and (negative or self.use_dynamic_cfg or self.zero_unconditional or limited):
            logger.warning(
                f"guidance_scale={self.guidance_scale} turns guidance off: negative prompts, use_dynamic_cfg, guidance_interval and "
                "zero_unconditional have no effect."
            )

    @classmethod
    def from_call(cls, arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> Request:
        """The request behind the arguments of a pipeline's `__call__`; None stands for the model's or this class's default."""
        given = {**defaults, **{name: value for name, value in arguments.items() if value is not None}}
        if isinstance(given.get("generator"), tuple):
            given["generator"] = list(given["generator"])  # the only sequence that diffusers' functions take
        callback = given.get("callback_on_step_end")
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        inputs = PromptInputs(**{field.name: given.get(field.name) for field in fields(PromptInputs)})
        request = cls(inputs=inputs, **{field.name: given[field.name] for field in fields(cls) if field.name in given})
        request._warn_without_guidance()
        return request

    @property
    def count(self) -> int:
        """Number of videos B that one call makes."""
        return self.inputs.count * self.num_videos_per_prompt

    @property
    def guided(self) -> bool:
        """Whether the loop predicts with and without the prompt, at least where it starts."""
        return self.guidance_scale > 1 or self.guider is not None

    @property
    def reads_text(self) -> bool:
        """Whether there is text to encode: a prompt, or what guidance steps away from."""
        unconditional = self.guided and not self.zero_unconditional and self.inputs.negative_prompt_embeds is None
        return self.inputs.prompt is not None or unconditional

    @property
    def steps(self) -> int:
        """Number of steps: as many as there are custom timesteps, or as asked for."""
        return self.num_inference_steps if self.timesteps is None else len(self.timesteps)

    def check_size(self, geometry: Geometry) -> None:
        """Raise ValueError, naming the nearest legal value, for a frame count or size that cannot be made, cropped if need be.

        Latents cannot be cropped: there the count and the size must be the model's own.
        """
        if self.context is not None:
            self.context.shared_frames(geometry)
        geometry.padded_frames(self.num_frames)
        check_starts(self.inputs.starts, self.num_frames, self.context.frames if self.context else None, geometry)
        geometry.padded_size(self.height, self.width)
        if self.output_type != "latent":
            return
        try:
            geometry.check_frames(self.num_frames)
            geometry.check_size(self.height, self.width)
        except ValueError as error:
            raise ValueError(f"output_type='latent' cannot be cropped to what was asked for: {error}") from error

    def report_size(self, geometry: Geometry) -> None:
        """Log what is generated where it is not exactly what was asked for, but cropped to it."""
        frames, size = geometry.padded_frames(self.num_frames), geometry.padded_size(self.height, self.width)
        if (frames, *size) != (self.num_frames, self.height, self.width):
            logger.info(
                f"Generating {frames} frames of {size[0]}x{size[1]}, the next that the model can make, and cropping them to "
                f"{self.num_frames} frames of {self.height}x{self.width}."
            )

    def check_callback(self, names: Sequence[str]) -> None:
        """Raise ValueError when the callback asks for tensors other than `names`."""
        unknown = sorted(set(self.callback_on_step_end_tensor_inputs) - set(names))
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs names {unknown}, but only {list(names)} exist.")
