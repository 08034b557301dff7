"""The one denoise loop: predict the velocity, guide it, step, call back. All tasks run it; they differ in their `Condition`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..models.rope import Rotary, rope_for
from .conditioning import Condition
from .guidance import dynamic_rule, guidance_at, guide
from .request import Request
from .sampling import make_stepper

__all__ = ["Predictor", "denoise"]

logger = logging.get_logger(__name__)


def denoise(
    pipe: Any, condition: Condition, timesteps: Tensor, request: Request, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None
) -> Tensor:
    """Latents (B, F, C, H, W) at the end of `timesteps` (N,), the padding frames of `condition` included.

    From the prediction on, a step computes in float32; the latents keep their dtype. A callback sees and may replace
    "latents", "prompt_embeds" (with guidance: both halves, the unconditional first) and "negative_prompt_embeds".

    Args:
        pipe: the pipeline, for its transformer, scheduler, progress bar and what callbacks may change while the loop
            runs: `_guidance_scale` and `_interrupt`.
        condition: where the loop starts.
        timesteps: the scheduler's grid, from `condition.first_step` on.
        request: guidance schedule, callback, and options of the scheduler's step.
        prompt_embeds: (B, L, D_text).
        negative_prompt_embeds: (B, L, D_text), or None without guidance.
    """
    rule = dynamic_rule(request.use_dynamic_cfg)
    predict = Predictor.of(pipe, condition, request)
    step = make_stepper(pipe.scheduler, eta=request.eta, generator=request.generator)
    joined = prompt_embeds if negative_prompt_embeds is None else torch.cat([negative_prompt_embeds, prompt_embeds])
    tensors: dict[str, Any] = {"latents": condition.latents, "prompt_embeds": joined, "negative_prompt_embeds": negative_prompt_embeds}

    with pipe.progress_bar(total=len(timesteps)) as progress:
        for index, (timestep, value) in enumerate(zip(timesteps, timesteps.tolist(), strict=True)):
            if pipe.interrupt:
                break
            pipe._current_timestep = timestep
            place = {"step_index": index, "num_inference_steps": len(timesteps)}
            scale = guidance_at(rule, pipe.guidance_scale, index=index, timestep=value, steps=len(timesteps))
            latents = tensors["latents"]
            scaled = pipe.scheduler.scale_model_input(latents, timestep)
            prediction = predict(scaled, tensors["prompt_embeds"], timestep, scale if pipe.do_classifier_free_guidance else None, place)
            tensors["latents"] = step(prediction, timestep, latents).to(latents.dtype)
            _call_back(pipe, request, index, timestep, tensors)
            progress.update()
    pipe._current_timestep = None
    _warn_if_not_finite(tensors["latents"])
    return tensors["latents"]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Velocity of latents under guidance, from one transformer with everything that stays the same during a loop."""

    transformer: Any
    condition: Condition
    rotary: Rotary | None
    options: dict[str, Any]
    sequential: bool

    @classmethod
    def of(cls, pipe: Any, condition: Condition, request: Request) -> Predictor:
        """The predictor for one call of `pipe`."""
        _, frames, _, height, width = condition.latents.shape
        rotary = rope_for(pipe.transformer.config, frames, height, width, condition.latents.device)
        options: dict[str, Any] = {"attention_kwargs": request.attention_kwargs}
        if condition.ofs is not None:
            options["ofs"] = condition.latents.new_full((1,), condition.ofs)
        return cls(
            transformer=pipe.transformer, condition=condition, rotary=rotary, options=options, sequential=request.sequential_guidance
        )

    def __call__(self, latents: Tensor, embeds: Tensor, timestep: Tensor, scale: float | None, place: dict[str, int]) -> Tensor:
        """Velocity (B, F, C, H, W) in float32.

        Args:
            latents: (B, F, C, H, W), scaled as the scheduler wants.
            embeds: [unconditional; conditional] (2B, L, D_text), or the conditional half alone when `scale` is None.
            timestep: one timestep for all.
            scale: guidance scale w of this step, None for no guidance.
            place: where the loop is, for caching hooks.

        Raises:
            ValueError: when `embeds` has not one entry per prediction.
        """
        batch, x = len(latents), self.condition.model_input(latents)
        if scale is None:
            return self._velocity(x, embeds[-batch:], timestep, "cond_uncond", place)
        if len(embeds) != 2 * batch:
            raise ValueError(
                f"{len(embeds)} prompt embeddings for {batch} videos with guidance; 2 per video are needed. A callback that drops the "
                "unconditional half must also set pipe._guidance_scale = 0."
            )
        if self.sequential:
            unconditional = self._velocity(x, embeds[:batch], timestep, "uncond", place)
            conditional = self._velocity(x, embeds[batch:], timestep, "cond", place)
        else:
            unconditional, conditional = self._velocity(torch.cat([x, x]), embeds, timestep, "cond_uncond", place).chunk(2)
        return guide(unconditional, conditional, scale)

    def _velocity(self, x: Tensor, embeds: Tensor, timestep: Tensor, name: str, place: dict[str, int]) -> Tensor:
        with self.transformer.cache_context(name, **place):
            velocity = self.transformer(
                hidden_states=x,
                encoder_hidden_states=embeds,
                timestep=timestep.expand(len(x)),
                image_rotary_emb=self.rotary,
                return_dict=False,
                **self.options,
            )[0]
        return velocity.float()


def _call_back(pipe: Any, request: Request, index: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
    """Show the callback what it asked for and take over what it returns, in `tensors`. Raises ValueError for unknown names."""
    if request.callback_on_step_end is None:
        return
    shown = {name: tensors[name] for name in request.callback_on_step_end_tensor_inputs}
    returned = request.callback_on_step_end(pipe, index, timestep, dict(shown)) or {}
    unknown = sorted(set(returned) - set(tensors))
    if unknown:
        raise ValueError(f"callback_on_step_end returned {unknown}, but only {list(tensors)} can be replaced.")
    changed = {name: value for name, value in returned.items() if value is not tensors[name]}
    tensors.update(changed)
    if changed.get("negative_prompt_embeds") is not None and "prompt_embeds" not in changed:
        tensors["prompt_embeds"] = torch.cat([changed["negative_prompt_embeds"], tensors["prompt_embeds"].chunk(2)[1]])


def _warn_if_not_finite(latents: Tensor) -> None:
    if not torch.isfinite(latents).all():
        logger.warning(
            f"The latents contain NaN or infinity, so the video will be black or noise. They were computed in {latents.dtype}: "
            "the 5B models overflow in float16; load the pipeline with dtype=torch.bfloat16 or torch.float32."
        )
