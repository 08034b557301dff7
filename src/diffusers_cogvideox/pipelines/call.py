"""The arguments that every pipeline's `__call__` shares, written down once, and how a task adds its own."""

# Annotations stay real objects here: the signatures made from them are read by tools that know nothing of this module.

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from .request import Request

__all__ = ["FIRST", "shared_arguments", "task_call"]

FIRST = ""
"""The place before all shared arguments."""


def shared_arguments(
    prompt: str | list[str] | None = None,
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
) -> None:
    """Of every task:

    prompt: one text or a list of B texts.
    negative_prompt: what to steer away from, one text for all or one for each prompt; "" by default.
    height, width: pixels, multiples of 16; by default the size that the model was trained for.
    num_frames: 8k + 1; by default as trained.
    num_inference_steps, timesteps: number of steps, or own falling timesteps for schedulers that take them.
    guidance_scale: w in u + w (c - u); 1 or less predicts once per step, without guidance.
    use_dynamic_cfg: True or "stock" for swinging guidance as released, "progress" for a smooth rise from 1 to 1 + w.
    num_videos_per_prompt: videos for each prompt; they follow each other in the result.
    eta: share of fresh noise in a DDIM step, 0 to 1.
    generator: source of the noise, one for all videos or one for each.
    latents: noise to start from, (videos, latent frames, channels, height / 8, width / 8).
    prompt_embeds, negative_prompt_embeds: embeddings (B, L, D_text) in place of text.
    output_type, return_dict: "pil", "np", "pt" or "latent"; False for a tuple in place of an output object.
    attention_kwargs: handed to the attention processors; `{"scale": s}` scales a LoRA.
    callback_on_step_end: f(pipe, step, timestep, tensors) after each step; what it returns replaces the tensors.
    callback_on_step_end_tensor_inputs: which to show it: "latents" (default), "prompt_embeds", "negative_prompt_embeds".
    max_sequence_length: text tokens; by default as the transformer's config says.
    sequential_guidance: predict the two halves one after the other: half the activation memory, no faster.
    zero_unconditional: zeros for the unconditional half, as in the original code, in place of the embedding of "".

    Raises ValueError or TypeError, before anything runs, for arguments that cannot give what they ask for.
    """


def task_call(*, without: tuple[str, ...] = (), **places: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make `method(self, request, *, own arguments)` a pipeline's `__call__(self, shared and own arguments)`, without gradients.

    Args:
        without: shared arguments that the task does not have.
        places: for own arguments that have a place in diffusers' signature, the argument that they follow (or FIRST); they may be
            passed by position. All other own arguments are keyword-only.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        own = [p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]
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
    merged += [p for p in inspect.signature(shared_arguments).parameters.values() if p.name not in without]
    for parameter in own:
        if parameter.name in places:
            names = [p.name for p in merged]
            at = names.index(places[parameter.name] or "self") + 1
            merged.insert(at, parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD))
    merged += [p for p in own if p.name not in places]
    return inspect.Signature(merged)
