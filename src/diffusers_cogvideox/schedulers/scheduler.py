"""CogVideoXScheduler: one sampler that walks its own timestep grid with either of the family's two solvers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from . import noise as process
from .options import SOLVER_OF, check_choice, check_inert, check_offset, translate
from .solvers import StepWeights, ddim_weights, dpm_weights
from .timesteps import check_timesteps, shorten, spaced_timesteps

__all__ = [
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CogVideoXScheduler",
    "CogVideoXSchedulerOutput",
]


@dataclass
class CogVideoXSchedulerOutput(SchedulerOutput):
    """What `step` returns: `prev_sample`, the less noisy latents, and `pred_original_sample`, the predicted clean ones."""

    pred_original_sample: torch.Tensor | None = None


class CogVideoXScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Sampler of the CogVideoX family: DDIM (`algorithm_type="ddim"`) or SDE-DPM-Solver++(2M) (`"dpmsolver++"`).

    Reads the configuration files of diffusers' two CogVideoX schedulers and takes the same steps where they are right.
    Every step goes to the next timestep of the grid and the last one to the clean end, for any number of steps. All
    arithmetic is done in float32 at least, whatever the dtype of the latents.

    Args:
        num_train_timesteps: T, length of the noise table.
        beta_start, beta_end, beta_schedule: see `noise.make_betas`.
        trained_betas: T betas to use instead.
        clip_sample, clip_sample_range, sample_max_value: stand in the published files only; latents are never clipped,
            and values that ask for it are refused.
        set_alpha_to_one: the last step ends at abar = 1, fully clean; otherwise at abar_0.
        steps_offset: added to every timestep of "leading" spacing; refused with the others.
        prediction_type: what the network predicts, "epsilon", "sample" or "v_prediction" (all released models).
        timestep_spacing: "trailing" (all released models), "leading" or "linspace", see `timesteps.spaced_timesteps`.
        rescale_betas_zero_snr: make timestep T - 1 pure noise (all released models).
        snr_shift_scale: divides the signal-to-noise ratio; 3.0 for the 2B model, 1.0 for all others.
        algorithm_type: "ddim" or "dpmsolver++"; None is the class's own, here "ddim".

    The defaults are diffusers'; the released models need the values named above (`presets.PRESETS[...].scheduler`).
    Raises ValueError for an unknown choice and for an option that would have no effect.
    """

    _compatibles: ClassVar[list[str]] = [  # type: ignore[misc]
        *SOLVER_OF,
        *(scheduler.name for scheduler in KarrasDiffusionSchedulers),
    ]
    _solver: ClassVar[str | None] = None  # set by the subclasses that have only one
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | np.ndarray | None = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 3.0,
        algorithm_type: str | None = None,
    ) -> None:
        self._choose_algorithm(algorithm_type)
        check_choice(beta_schedule=beta_schedule, prediction_type=prediction_type, timestep_spacing=timestep_spacing)
        check_inert(clip_sample=clip_sample, clip_sample_range=clip_sample_range, sample_max_value=sample_max_value)
        check_offset(steps_offset, timestep_spacing)
        if trained_betas is None:
            betas = process.make_betas(num_train_timesteps, beta_start, beta_end, beta_schedule)
        else:
            betas = torch.as_tensor(trained_betas, dtype=torch.float64)
        if len(betas) != num_train_timesteps:
            raise ValueError(f"trained_betas has {len(betas)} values, but num_train_timesteps={num_train_timesteps}: make them equal.")
        self.alphas_cumprod = process.make_alphas_cumprod(betas, snr_shift_scale=snr_shift_scale, zero_terminal_snr=rescale_betas_zero_snr)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.num_inference_steps: int | None = None
        self._use_grid(list(range(num_train_timesteps))[::-1])

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    # --- configuration ------------------------------------------------------------------------------------------------

    def _choose_algorithm(self, requested: str | None) -> None:
        """Set `algorithm_type`; only a class that leaves the choice open keeps the key in its configuration."""
        if self._solver and requested not in (None, self._solver):
            raise ValueError(f"algorithm_type={requested!r} is not what {type(self).__name__} does: use CogVideoXScheduler.")
        self.algorithm_type = self._solver or requested or "ddim"
        check_choice(algorithm_type=self.algorithm_type)
        # For `from_config` of other classes: whose config this is, and which keys to leave out as "default". None is, since
        # other classes have other defaults, but "ddim", as the solver families of diffusers have a key of the same name.
        unset = ["algorithm_type"] if self.algorithm_type == "ddim" else []
        self.register_to_config(_class_name=type(self).__name__, _use_default_values=unset)
        if self._solver is None:
            self.register_to_config(algorithm_type=self.algorithm_type)

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Split any scheduler's config for `from_config`, read as `options.translate` says. Raises ValueError as it does."""
        return super().extract_init_dict(translate(config_dict, cls.__name__, cls._solver), **kwargs)

    # --- the grid -----------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Choose the grid, `num_inference_steps` spaced ones or your own decreasing `timesteps`, and start a new video.

        Sets `timesteps`, int64 (n,) on `device`. Raises ValueError unless exactly one of the two is given, for a count
        outside 1 ... T, and for timesteps that are not decreasing indices below T.
        """
        if timesteps is not None and num_inference_steps is None:
            grid = [int(t) for t in timesteps]
        elif num_inference_steps is not None and timesteps is None:
            spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
            grid = spaced_timesteps(spacing, operator.index(num_inference_steps), len(self), offset)
        else:
            raise ValueError("pass either num_inference_steps or timesteps: exactly one of the two.")
        self._check_predictable(check_timesteps(grid, len(self))[0])
        self.num_inference_steps = len(grid)
        self._use_grid(grid, device)

    def _check_predictable(self, first: int) -> None:
        """Refuse noise prediction where the sample is nothing but noise."""
        if self.config["prediction_type"] == "epsilon" and not self.alphas_cumprod[first]:
            raise ValueError(
                f"prediction_type='epsilon' is not possible at timestep {first}, which rescale_betas_zero_snr=True makes "
                "pure noise: the noise in it says nothing about the video. Use prediction_type='v_prediction'."
            )

    def _use_grid(self, grid: list[int], device: str | torch.device | None = None) -> None:
        self.timesteps = torch.tensor(grid, dtype=torch.int64, device=device)
        self._position_of = {t: i for i, t in enumerate(grid)}
        # Signal levels from the noisiest to the clean end: a step goes from entry i to entry i + 1.
        self._levels = [*self.alphas_cumprod[grid].tolist(), float(self.final_alpha_cumprod)]
        self._start_at(None)

    def _start_at(self, begin_index: int | None) -> None:
        self._begin_index = begin_index
        self._step_index: int | None = None
        self._previous_clean: torch.Tensor | None = None

    @property
    def begin_index(self) -> int | None:
        """Position on the grid that the first step has to be at; None: any."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start a new video at this position of the grid (0 is the noisiest); its first `step` is held to it."""
        self._start_at(begin_index)

    @property
    def step_index(self) -> int | None:
        """Position on the grid of the next step; None before the first."""
        return self._step_index

    def index_for_timestep(self, timestep: int | torch.Tensor) -> int:
        """Position of a timestep on the grid. Raises ValueError when it is not on it."""
        position = self._position_of.get(int(timestep))
        if position is None:
            raise ValueError(f"timestep {int(timestep)} is not on the grid {shorten(list(self._position_of))}: pass one of `timesteps`.")
        return position

    def history(self) -> dict[str, torch.Tensor]:
        """What a later step needs to know of the steps before, by name; empty before the first."""
        known = {"step_index": self._step_index, "previous_clean": self._previous_clean}
        return {name: torch.as_tensor(value) for name, value in known.items() if value is not None}

    def load_history(self, history: Mapping[str, torch.Tensor]) -> None:
        """Go on after the steps that `history()` comes from, on the same grid."""
        self._step_index = int(history["step_index"]) if "step_index" in history else None
        self._previous_clean = history.get("previous_clean")

    # --- sampling -----------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
        """Return `sample` (B, ...): these models see x_t as it is. Part of the interface of diffusers' schedulers."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> CogVideoXSchedulerOutput | tuple[torch.Tensor, ...]:
        """Go from x_t to the next timestep of the grid: x_next = sample x_t + clean D + noise z, see `solvers`.

        Args:
            model_output: what the network predicted of x_t, (B, ...).
            timestep: t, one of `timesteps`.
            sample: x_t, (B, ...).
            eta: DDIM only: 0 is deterministic, 1 as noisy as DDPM.
            generator: source of the noise; of a list each batch element has its own and gets what it would get alone.
            variance_noise: z to use instead of drawing it, (B, ...).
            return_dict: False returns (prev_sample, pred_original_sample).

        Raises ValueError before `set_timesteps`, for a timestep off the grid, for shapes that differ, for `eta` outside
        0 ... 1 or with the other solver, and for a list of generators of another length than the batch.
        """
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)} must have one shape.")
        index = self._locate(timestep)
        weights = self._weights(index, eta)
        dtype = torch.promote_types(model_output.dtype, sample.dtype)
        x, prediction = (tensor.to(torch.promote_types(dtype, torch.float32)) for tensor in (sample, model_output))
        level = self._levels[index]
        clean = process.to_clean(prediction, x, level**0.5, (1 - level) ** 0.5, self.config["prediction_type"])

        direction = clean
        if weights.extrapolation is not None and self._previous_clean is not None:
            direction = clean + weights.extrapolation * (clean - self._previous_clean)
        less_noisy = weights.sample * x + weights.clean * direction
        z = self._draw(weights, sample, generator) if variance_noise is None else variance_noise
        if z is not None:
            less_noisy = less_noisy + weights.noise * z.to(x.dtype)
        self._step_index, self._previous_clean = index + 1, clean
        output = CogVideoXSchedulerOutput(prev_sample=less_noisy.to(dtype), pred_original_sample=clean.to(dtype))
        return output if return_dict else output.to_tuple()

    def _locate(self, timestep: int | torch.Tensor) -> int:
        """Position of this step; forgets the step before when the two do not follow each other."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step.")
        index = self.index_for_timestep(timestep)
        if self._step_index is None and self._begin_index not in (None, index):
            raise ValueError(f"set_begin_index({self._begin_index}) was called, but the first step is at position {index}.")
        if index != self._step_index:
            self._previous_clean = None
        return index

    def _weights(self, index: int, eta: float) -> StepWeights:
        level, following = self._levels[index : index + 2]
        if self.algorithm_type == "ddim" and 0 <= eta <= 1:
            return ddim_weights(level, following, eta)
        if eta:
            raise ValueError(f"eta={eta} is not possible: it must be 0 ... 1, and 0 with algorithm_type='dpmsolver++'.")
        first_order = self._previous_clean is None or index + 1 == self.num_inference_steps
        return dpm_weights(level, following, None if first_order else self._levels[index - 1])

    def _draw(
        self, weights: StepWeights, sample: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor | None:
        """Noise for one step (B, ...), or None where DDIM needs none."""
        if isinstance(generator, list) and len(generator) != len(sample):
            raise ValueError(f"{len(generator)} generators for a batch of {len(sample)}: pass one, or one per batch element.")
        if self.algorithm_type == "ddim" and not weights.noise:
            return None
        # The original sampler draws for a first-order step, then again if it takes a second-order one instead. The unused
        # draw stays (as does the one of the last step, which has weight 0), so that a seed names the same video as there.
        draws = 1 if weights.extrapolation is None else 2
        return [randn_tensor(sample.shape, generator, sample.device, sample.dtype) for _ in range(draws)][-1]

    # --- training -----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps; samples and noise (B, ...), timesteps int64 (B,) or (1,)."""
        return self._mix(process.add_noise, original_samples, noise, timesteps)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0, the target of v-prediction; shapes as in `add_noise`."""
        return self._mix(process.to_velocity, sample, noise, timesteps)

    def _mix(self, rule: Callable[..., torch.Tensor], clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.signal_and_noise(self.alphas_cumprod, timesteps, clean)
        return rule(clean, noise, alpha, sigma).to(clean.dtype)


class CogVideoXDDIMScheduler(CogVideoXScheduler):
    """`CogVideoXScheduler` with DDIM; reads and writes the configuration file of diffusers' class of this name."""

    _solver = SOLVER_OF["CogVideoXDDIMScheduler"]
    ignore_for_config: ClassVar[list[str]] = ["algorithm_type"]  # type: ignore[misc]


class CogVideoXDPMScheduler(CogVideoXScheduler):
    """`CogVideoXScheduler` with SDE-DPM-Solver++(2M); reads and writes the file of diffusers' class of this name."""

    _solver = SOLVER_OF["CogVideoXDPMScheduler"]
    ignore_for_config: ClassVar[list[str]] = ["algorithm_type"]  # type: ignore[misc]
