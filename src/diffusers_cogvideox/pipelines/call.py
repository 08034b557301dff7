"""The arguments that every pipeline's `__call__` shares, written down once, and how a task adds its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .guiders import BaseGuidance
from .journal import Journal
from .request import Request
from .skip_layers import SkipLayers
from .windows import ContextWindows

__all__ = ["FIRST", "shared_arguments", "task_call"]

FIRST = ""
"""The place before all shared arguments."""


def shared_arguments(
    prompt: str | list[str] | Mapping[int, str] | None = None,
    negative_prompt: str | list[str] | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int = 50,
    timesteps: list[int] | None = None,
    guidance_scale: float = 6,
    use_dynamic_cfg: bool | str = False,
    num_videos_per_prompt: int = 1,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    attention_kwargs: dict[str, Any] | None = None,
    callback_on_step_end: Callable[..., dict[str, Any] | None] | PipelineCallback | MultiPipelineCallbacks | None = None,
    callback_on_step_end_tensor_inputs: list[str] | None = None,
    max_sequence_length: int | None = None,
    sequential_guidance: bool = False,
    zero_unconditional: bool = False,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    skip_layers: SkipLayers | None = None,
    context: ContextWindows | None = None,
    riflex: bool = False,
    journal: Journal | None = None,
    guider: BaseGuidance | None = None,
    cache: Any = None,
    max_error: float | None = None,
    measure_error: bool = False,
) -> None:
    """Of every task:

    prompt, negative_prompt: text, list of B, or with `context` {0: text, 48: text} by frame; what to avoid, for all or each, "" by default.
    height, width: pixels; by default as trained. Multiples of 16 are made as they are, others are cropped from the next larger size.
    num_frames: any number; by default as trained. 8k + 1 frames are made as they are, other numbers are cut from the next larger one.
    num_inference_steps, timesteps: number of steps, or own falling timesteps for schedulers that take them.
    guidance_scale: w in u + w (c - u); 1 or less predicts once per step, without guidance.
    use_dynamic_cfg: True or "stock" for swinging guidance as released, "progress" for a smooth rise from 1 to 1 + w.
    num_videos_per_prompt, max_sequence_length: videos for each prompt, one after the other; text tokens, by default as trained.
    eta, generator: share of fresh noise in a DDIM step, 0 to 1; source of all noise, one for all videos or one for each.
    latents: noise to start from, (videos, latent frames, channels, height / 8, width / 8) of what is made before cropping.
    prompt_embeds, negative_prompt_embeds: embeddings (B, L, D_text) in place of text.
    output_type, return_dict: "pil", "np", "pt", "latent" or "stream" (see `CogVideoXPipelineOutput`); False for a tuple in its place.
    attention_kwargs: handed to the attention processors; `{"scale": s}` scales a LoRA.
    callback_on_step_end: f(pipe, step, timestep, tensors) after each step; what it returns replaces the tensors. It is shown the
        callback_on_step_end_tensor_inputs, some of "latents" (default), "prompt_embeds", "negative_prompt_embeds".
    sequential_guidance, zero_unconditional: one half after the other, in half the memory; zeros for the unconditional half, not "".
    guidance_interval: (start, stop) of the guided part of the loop, in fractions of its steps; outside it one pass is made, not two.
    skip_layers: `SkipLayers(layers, scale)` also predicts without these layers and steps away from that: one more pass per step.
    context: `ContextWindows(frames=...)` predicts a long video in windows of so many frames that fade into each other.
    riflex: lower the frequency that makes videos of twice the trained length or more repeat themselves (without windows).
    journal, guider: saves the loop every few steps, to go on later; one of diffusers' guiders in place of all guidance options above.
    cache, max_error, measure_error: "auto" or a name for the feature cache with the fewest passes that `cogvideox calibrate` saw keep
        max_error (0.05), or a config; make the video without it too. See `pipe.cache_report`, the errors are |z_cached - z| / |z|.

    Raises ValueError or TypeError, before anything runs, for what cannot be had. Errors while decoding carry `latents`: `decode_frames`."""


def task_call(*, without: tuple[str, ...] = (), **places: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make `method(self, request, *, own arguments)` a pipeline's `__call__(self, shared and own arguments)`, without gradients.

    Args:
        without: shared arguments that the task does not have.
        places: for own arguments that have a place in diffusers' signature, the argument that they follow (or FIRST); they may be
            passed by position. All other own arguments are keyword-only.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(method, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
        signature = _merged(own, places, without)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = dict(bound.arguments)
            mine = {parameter.name: given.pop(parameter.name) for parameter in own}
            with torch.no_grad():
                return method(self, Request.from_call(given, self.call_defaults()), **mine)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.getdoc(method)}\n\n{inspect.getdoc(shared_arguments)}"
        return call

    return decorate


def _merged(own: list[inspect.Parameter], places: dict[str, str], without: tuple[str, ...]) -> inspect.Signature:
    """(self, shared and placed arguments in order, *, other own arguments)."""
    merged = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    merged += [p for p in inspect.signature(shared_arguments, eval_str=True).parameters.values() if p.name not in without]
    for parameter in own:
        if parameter.name in places:
            names = [p.name for p in merged]
            at = names.index(places[parameter.name] or "self") + 1
            merged.insert(at, parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD))
    merged += [p for p in own if p.name not in places]
    return inspect.Signature(merged)
