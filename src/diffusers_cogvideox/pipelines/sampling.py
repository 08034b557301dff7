"""One scheduler behind one call: ours, diffusers' CogVideoX schedulers with their own signature, and any other that fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..schedulers.noise import make_alphas_cumprod, make_betas

__all__ = ["Stepper", "check_scheduler", "flow_level", "make_stepper", "set_timesteps", "shifted_config"]

Stepper = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(prediction, timestep, latents (B, F, C, H, W)) -> latents at the next timestep."""


def check_scheduler(scheduler: Any, eta: float = 0.0) -> None:
    """Raise ValueError for a scheduler that would quietly sample something else than the model was trained for.

    Checked: that it knows what a velocity is (flow-matching schedulers do not), that it keeps the checkpoint's SNR shift
    and zero terminal SNR, and that a non-zero `eta` reaches a step that uses it.
    """
    name, known = type(scheduler).__name__, inspect.signature(type(scheduler).__init__).parameters
    if "prediction_type" not in known:
        raise ValueError(
            f"{name} has no prediction_type, so it cannot sample from CogVideoX, which predicts velocities. Use "
            "CogVideoXDPMScheduler.from_config(pipe.scheduler.config) or another scheduler of the DDPM family."
        )
    config = scheduler.config
    asked = {
        "snr_shift_scale": config.get("snr_shift_scale") not in (None, 1.0),
        "rescale_betas_zero_snr": config.get("rescale_betas_zero_snr"),
    }
    ignored = [f"{key}={config[key]}" for key, matters in asked.items() if matters and key not in known]
    if ignored:
        raise ValueError(
            f"{name} ignores {' and '.join(ignored)} of this checkpoint and would sample from another noise schedule. Build it with "
            f"the schedule written out: {name}.from_config(diffusers_cogvideox.shifted_config(pipe.scheduler.config))."
        )
    if eta and (_ignores_eta(scheduler) or "eta" not in inspect.signature(scheduler.step).parameters):
        raise ValueError(f"eta={eta} has no effect in {name}: pass eta=0, or use diffusers_cogvideox.CogVideoXDDIMScheduler.")


def _ignores_eta(scheduler: Any) -> bool:
    # The two CogVideoX schedulers that diffusers ships take eta and never read it.
    return type(scheduler).__module__.startswith("diffusers.") and type(scheduler).__name__.startswith("CogVideoX")


def shifted_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler config with the noise schedule written out as betas, for schedulers that do not know CogVideoX's options.

    SNR shift and zero terminal SNR are worked into beta_t = 1 - abar_t / abar_(t-1). As in diffusers' own schedulers the last
    abar becomes 2^-24 in place of 0, which has no finite log-SNR. Read by a CogVideoX scheduler, it means the same schedule.
    """
    betas = config.get("trained_betas")
    if betas is None:
        betas = make_betas(config["num_train_timesteps"], config["beta_start"], config["beta_end"], config["beta_schedule"])
    shift, rescale = config.get("snr_shift_scale") or 1.0, bool(config.get("rescale_betas_zero_snr"))
    abar = make_alphas_cumprod(betas, snr_shift_scale=shift, zero_terminal_snr=rescale).clamp(min=2**-24)
    betas = 1 - abar / torch.cat([abar.new_ones(1), abar[:-1]])
    return {**config, "trained_betas": betas.tolist(), "snr_shift_scale": 1.0, "rescale_betas_zero_snr": False}


def set_timesteps(scheduler: Any, steps: int, timesteps: list[int] | None, device: torch.device) -> Tensor:
    """Put the scheduler on its grid for `steps` steps, or on custom `timesteps`; returns the timesteps (N,).

    Raises:
        ValueError: for a step count outside 1..num_train_timesteps, or a scheduler without custom timesteps.
    """
    if timesteps is not None:
        if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} does not support custom timesteps: pass num_inference_steps instead.")
        scheduler.set_timesteps(timesteps=timesteps, device=device)
        return scheduler.timesteps
    limit = scheduler.config.get("num_train_timesteps", 1000)
    if not 1 <= steps <= limit:
        raise ValueError(f"num_inference_steps={steps} is not possible: it must be between 1 and {limit}.")
    scheduler.set_timesteps(steps, device=device)
    return scheduler.timesteps


def flow_level(scheduler: Any, timestep: float) -> float | None:
    """Noise level s at a timestep in the terms of flow matching, for caching hooks; None for a scheduler without noise table.

    x = alpha x_0 + sigma eps, divided by alpha + sigma, is (1 - s) x_0 + s eps with s = sigma / (alpha + sigma): 0 is clean, 1 noise.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        return None
    abar = float(table[int(timestep)])
    return (1 - abar) ** 0.5 / (abar**0.5 + (1 - abar) ** 0.5)


def make_stepper(scheduler: Any, *, eta: float, generator: torch.Generator | list[torch.Generator] | None) -> Stepper:
    """The scheduler's step as one function of (prediction, timestep, latents), for one run."""
    accepted = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", eta), ("generator", generator)) if key in accepted}
    if "old_pred_original_sample" in accepted:
        return _StockDPMStepper(scheduler, options)
    return lambda prediction, timestep, latents: scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]


class _StockDPMStepper:
    """Diffusers' CogVideoXDPMScheduler leaves its two-step history to the caller; this keeps it."""

    def __init__(self, scheduler: Any, options: dict[str, Any]) -> None:
        self._step = scheduler.step
        self._options = options
        self._estimate: Tensor | None = None  # x0 of the step before
        self._timestep: Tensor | None = None

    def __call__(self, prediction: Tensor, timestep: Tensor, latents: Tensor) -> Tensor:
        history = self._estimate, timestep, self._timestep
        latents, self._estimate = self._step(prediction, *history, latents, **self._options, return_dict=False)
        self._timestep = timestep
        return latents
