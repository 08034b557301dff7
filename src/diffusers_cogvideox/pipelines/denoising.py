"""The one denoise loop: predict the velocity, guide it, step, call back. All tasks run it; they differ in their `Condition`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..geometry import Geometry
from ..models.feature_cache import check_unguided_pass, start_cached_loop
from ..models.modulation import ModulationTables, tabulated
from ..models.rope import Rotary, rope_for
from ..runtime.effects import watch
from ..runtime.health import run_checked
from ..runtime.parallel import check_same_start, shares_batches
from .conditioning import Condition
from .guidance import dynamic_rule, guidance_at, guide, guide_away, steps_inside
from .guiders import BaseGuidance, steer
from .request import Request
from .sampling import Stepper, flow_level, make_stepper
from .skip_layers import SkipLayers
from .story import part_of
from .windows import Windows, faded

__all__ = ["Predictor", "denoise"]


def denoise(
    pipe: Any,
    condition: Condition,
    timesteps: Tensor,
    request: Request,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    step: Stepper | None = None,
) -> Tensor:
    """Latents (B, F, C, H, W) at the end of `timesteps` (N,), the padding frames of `condition` included.

    From the prediction on, a step computes in float32; the latents keep their dtype. A callback sees and may replace
    "latents", "prompt_embeds" (with guidance: both halves, the unconditional first) and "negative_prompt_embeds".

    Args:
        pipe: its transformer, scheduler, progress bar, and what callbacks may change meanwhile: `_guidance_scale` and `_interrupt`.
        condition: where the loop starts.
        timesteps: the scheduler's grid, from `condition.first_step` on.
        request: guidance schedule, callback, and options of the scheduler's step.
        prompt_embeds: (B, L, D_text).
        negative_prompt_embeds: (B, L, D_text), or None without guidance.
        step: what a step does with its prediction, by default the scheduler's own.

    Raises ValueError for what is not possible here, for an optimisation that is on and does nothing, and for ranks that start apart.
    """
    rule, guided = dynamic_rule(request.use_dynamic_cfg), steps_inside(request.guidance_interval, len(timesteps), "guidance_interval")
    predict = Predictor.of(pipe, condition, request, timesteps)
    step = step or make_stepper(pipe.scheduler, eta=request.eta, generator=request.generator)
    joined = prompt_embeds if negative_prompt_embeds is None else torch.cat([negative_prompt_embeds, prompt_embeds])
    start = predict.starting_latents(request)
    tensors: dict[str, Any] = {"latents": start, "prompt_embeds": joined, "negative_prompt_embeds": negative_prompt_embeds}
    check_same_start(pipe.transformer, start, joined)
    journal = request.journal
    done = journal.enter(pipe, timesteps, request.generator, tensors) if journal else 0

    with watch(pipe) as watched, predict.tabulated(timesteps) as tables, pipe.progress_bar(total=len(timesteps)) as progress:
        progress.update(done)
        for index, value in list(enumerate(timesteps.tolist()))[done:]:
            if pipe.interrupt:
                break
            pipe._current_timestep = timestep = timesteps[index]
            place = _place(pipe, index, value, len(timesteps))
            scale = None
            if pipe.do_classifier_free_guidance and index in guided:
                scale = guidance_at(rule, pipe.guidance_scale, index=index, timestep=value, steps=len(timesteps))
            latents = condition.hold(tensors["latents"], timestep)
            prediction = predict(pipe.scheduler.scale_model_input(latents, timestep), tensors["prompt_embeds"], timestep, scale, place)
            tensors["latents"] = step(prediction, timestep, latents).to(latents.dtype)
            watched.after_step()
            _call_back(pipe, request, index, timestep, tensors, tables)
            if journal:
                journal.record(index + 1, pipe, timesteps, request.generator, tensors["latents"])
            progress.update()
        pipe._current_timestep = None
        latents = condition.hold(tensors["latents"], None)
        if not pipe.interrupt:
            watched.finish(latents)
    return latents


def _place(pipe: Any, index: int, timestep: float, steps: int) -> dict[str, Any]:
    """Where the loop is, for caching hooks and messages."""
    return {"step_index": index, "num_inference_steps": steps, "timestep": timestep, "sigma": flow_level(pipe.scheduler, timestep)}


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Velocity of latents under guidance, from one transformer with everything that stays the same during a loop.

    With `windows`, the transformer sees one window of the video at a time; they lie at a timestep as its `moments` say, its place from the
    noise down, which is the same on the way back (`inversion`). `skip` is done in `skip_steps`. A `guider` does all guidance.
    """

    transformer: Any
    condition: Condition
    rotary: Rotary | None
    options: dict[str, Any]
    sequential: bool
    windows: Windows | None = None
    moments: Mapping[float, int] = field(default_factory=dict)
    skip: SkipLayers | None = None
    skip_steps: range = range(0)
    guider: BaseGuidance | None = None

    @classmethod
    def of(cls, pipe: Any, condition: Condition, request: Request, timesteps: Tensor) -> Predictor:
        """The predictor for one call of `pipe`, in a loop over `timesteps` (N,).

        Raises:
            ValueError: for windows, frequencies or layers that this model and this video do not have.
        """
        transformer, latents, skip = pipe.transformer, condition.latents, request.skip_layers
        _, frames, _, height, width = latents.shape
        steps = len(timesteps)
        moments = {timestep: moment for moment, timestep in enumerate(sorted(set(timesteps.tolist()), reverse=True))}
        windows = _windows(request, condition, pipe.geometry, len(moments))
        halved = request.guided and steps_inside(request.guidance_interval, steps, "guidance_interval") != range(steps)
        batched = request.guided and not request.sequential_guidance and request.guider is None
        start_cached_loop(transformer, steps, windows=windows is not None, kinds=1 + halved, batched=batched)
        options: dict[str, Any] = {"attention_kwargs": request.attention_kwargs}
        if condition.ofs is not None:
            options["ofs"] = latents.new_full((1,), condition.ofs)
        if skip is not None:
            skip.check(transformer)
        halves_shared = shares_batches(transformer, len(latents) * (2 if request.guided else 1), guider=request.guider is not None)
        seen = windows.length if windows else frames
        return cls(
            transformer=transformer,
            condition=condition,
            rotary=rope_for(transformer.config, seen, height, width, latents.device, riflex=request.riflex),
            options=options,
            sequential=request.sequential_guidance and not halves_shared,  # who shares them has one half at a time anyway
            windows=windows,
            moments=moments,
            skip=skip,
            guider=request.guider,
            skip_steps=steps_inside(skip.interval, steps, "the interval of skip_layers") if skip else range(0),
        )

    def starting_latents(self, request: Request) -> Tensor:
        """The condition's latents (B, F, C, H, W), with the noise of the first window in all of them if the request says so.

        Raises:
            ValueError: for latents that are more than noise.
        """
        latents = self.condition.latents
        if self.windows is None or request.context is None or not request.context.shuffle_noise:
            return latents
        if self.condition.first_step:
            raise ValueError("shuffle_noise=True would shuffle the video that this call starts from: leave it out, or start from noise.")
        return self.windows.reuse_noise(latents, request.generator)

    def tabulated(self, timesteps: Tensor) -> AbstractContextManager[ModulationTables | None]:
        """Modulation tables of the schedule (N,) while the block runs."""
        options = {"ofs": None} | self.options
        return tabulated(self.transformer, timesteps, release=getattr(self.transformer, "releases_modulation", False), **options)

    def __call__(self, latents: Tensor, embeds: Tensor, timestep: Tensor, scale: float | None, place: dict[str, Any]) -> Tensor:
        """Velocity (B, F, C, H, W) in float32.

        Args:
            latents: (B, F, C, H, W), scaled as the scheduler wants.
            embeds: [unconditional; conditional] (2B, L, D_text); the unconditional half may be missing when `scale` is None.
            timestep: one timestep for all.
            scale: guidance scale w of this step, None for no guidance.
            place: where the loop is, for caching hooks.

        Raises:
            ValueError: when `embeds` has not one entry per prediction.
        """
        if scale is not None and len(embeds) != 2 * len(latents):
            raise ValueError(
                f"{len(embeds)} prompt embeddings for {len(latents)} videos with guidance; 2 per video are needed. A callback that drops "
                "the unconditional half must also set pipe._guidance_scale = 0."
            )
        x = self.condition.model_input(latents, place["step_index"])
        if self.windows is None:
            return self._guided(x, embeds, timestep, scale, place)
        windows = self.windows

        def predicted(piece: Tensor, part: int) -> Tensor:
            return self._guided(piece, part_of(embeds, part, windows.parts), timestep, scale, place)

        return faded(windows.at(self.moments[place["timestep"]]), x, predicted)

    def _guided(self, x: Tensor, embeds: Tensor, timestep: Tensor, scale: float | None, place: dict[str, Any]) -> Tensor:
        """Velocity of model inputs (B, F, C + C', H, W), (B, F, C, H, W), with all guidance of this step."""
        batch = len(x)
        if scale is None:
            # In a loop that is guided elsewhere, these passes are half as large: caching hooks must not mix them with the others.
            name = "cond" if len(embeds) > batch else "cond_uncond"
            check_unguided_pass(self.transformer)
            conditional = prediction = self._velocity(x, embeds[-batch:], name, timestep, place)
        elif self.guider is not None:
            return steer(self.guider, self.transformer, embeds, timestep, place, partial(self._velocity, x, timestep=timestep, place=place))
        else:
            unconditional, conditional = self._halves(x, embeds, timestep, place)
            prediction = guide(unconditional, conditional, scale)
        if self.skip is None or place["step_index"] not in self.skip_steps:
            return prediction
        with self.skip.left_out(self.transformer):
            worse = self._velocity(x, embeds[-batch:], "cond_skip", timestep, place)
        return guide_away(prediction, conditional, worse, self.skip.scale)

    def _halves(self, x: Tensor, embeds: Tensor, timestep: Tensor, place: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Velocities without and with the prompt, (B, F, C, H, W) each, in one pass or one after the other."""
        if not self.sequential:
            unconditional, conditional = self._velocity(torch.cat([x, x]), embeds, "cond_uncond", timestep, place).chunk(2)
            return unconditional, conditional
        halves = zip(embeds.chunk(2), ("uncond", "cond"), strict=True)
        unconditional, conditional = (self._velocity(x, half, name, timestep, place) for half, name in halves)
        return unconditional, conditional

    def _velocity(self, x: Tensor, embeds: Tensor, name: str, timestep: Tensor, place: dict[str, Any]) -> Tensor:
        def call() -> Tensor:
            return self.transformer(
                hidden_states=x,
                encoder_hidden_states=embeds,
                timestep=timestep.expand(len(x)),
                image_rotary_emb=self.rotary,
                return_dict=False,
                **self.options,
            )[0]

        where = f"in step {place['step_index'] + 1} of {place['num_inference_steps']} (timestep {place['timestep']:g})"
        with self.transformer.cache_context(name, **place):
            return run_checked(self.transformer, call, where).float()


def _windows(request: Request, condition: Condition, geometry: Geometry, moments: int) -> Windows | None:
    """The context windows over the condition's latents, or None without. Raises ValueError for a prompt that no window would ever have."""
    if request.context is None:
        return None
    starts = request.inputs.starts
    changes = tuple(condition.padding + geometry.latent_frames(start) for start in starts[1:])
    windows = request.context.over(condition.latents.shape[1], geometry, condition.anchors, changes)
    if windows is not None and changes:
        heard = {window.part for moment in range(moments) for window in windows.at(moment)}
        if unheard := [start for part, start in enumerate(starts) if part not in heard]:
            raise ValueError(
                f"the prompt from frame {unheard[0]} on holds too briefly: no context window has it in most of what it shows. Let it hold "
                "for longer, or use shorter windows."
            )
    return windows


def _call_back(pipe: Any, request: Request, index: int, timestep: Tensor, tensors: dict[str, Any], tables: ModulationTables | None) -> None:
    """Show the callback what it asked for and take over what it returns, in `tensors`. Raises ValueError for unknown names."""
    if request.callback_on_step_end is None:
        return
    shown = {name: tensors[name] for name in request.callback_on_step_end_tensor_inputs}
    returned = request.callback_on_step_end(pipe, index, timestep, dict(shown)) or {}
    if tables is not None:
        tables.refresh()  # it may have changed a LoRA
    unknown = sorted(set(returned) - set(tensors))
    if unknown:
        raise ValueError(f"callback_on_step_end returned {unknown}, but only {list(tensors)} can be replaced.")
    changed = {name: value for name, value in returned.items() if value is not tensors[name]}
    tensors.update(changed)
    if changed.get("negative_prompt_embeds") is not None and "prompt_embeds" not in changed:
        tensors["prompt_embeds"] = torch.cat([changed["negative_prompt_embeds"], tensors["prompt_embeds"].chunk(2)[1]])
