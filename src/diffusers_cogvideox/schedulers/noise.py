r"""The diffusion process: how much signal is left at each training timestep, and the maps between x_0, noise and velocity.

Notation, as in the CogVideoX paper (arXiv:2408.06072, section 3) and its sources: `abar` is the cumulative product of
`1 - beta`; a noisy latent is `x_t = alpha x_0 + sigma eps` with `alpha = sqrt(abar_t)`, `sigma = sqrt(1 - abar_t)`.
All tensors of latents may have any shape (B, ...); `alpha` and `sigma` are numbers or broadcast against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = [
    "BETA_SCHEDULES",
    "PREDICTION_TYPES",
    "add_noise",
    "make_alphas_cumprod",
    "make_betas",
    "rescale_zero_terminal_snr",
    "shift_snr",
    "signal_and_noise",
    "to_clean",
    "to_noise",
    "to_velocity",
    "unknown_choice",
]

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")

Level = float | torch.Tensor


def unknown_choice(option: str, value: str, choices: Sequence[str]) -> ValueError:
    """The error for a `value` that is none of an option's `choices`."""
    return ValueError(f"{option}={value!r} is unknown: choose one of {', '.join(choices)}.")


# --- the table --------------------------------------------------------------------------------------------------------


def _cosine_betas(count: int) -> torch.Tensor:
    """beta_i = min(1 - f(i + 1) / f(i), 0.999) with f(i) = cos^2(pi/2 (i/T + 0.008) / 1.008) (arXiv:2102.09672, eq. 17)."""
    time = torch.arange(count + 1, dtype=torch.float64) / count
    signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


def make_betas(count: int, start: float, end: float, schedule: str) -> torch.Tensor:
    """Noise variances beta_0 ... beta_{T-1} of `count` = T training timesteps, float64 (T,).

    `linear` runs from `start` to `end`; `scaled_linear` (CogVideoX) is linear in sqrt(beta); `squaredcos_cap_v2` ignores
    both ends. Raises ValueError for another name.
    """
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        return _cosine_betas(count)
    raise unknown_choice("beta_schedule", schedule, BETA_SCHEDULES)


def shift_snr(abar: torch.Tensor, scale: float) -> torch.Tensor:
    """Divide the signal-to-noise ratio abar / (1 - abar) by `scale`: abar -> abar / (s + (1 - s) abar)."""
    if scale <= 0:
        raise ValueError(f"snr_shift_scale={scale} must be positive; 1.0 means no shift.")
    return abar / (scale + (1 - scale) * abar)


def rescale_zero_terminal_snr(abar: torch.Tensor) -> torch.Tensor:
    """Make the last timestep pure noise (arXiv:2305.08891, algorithm 1).

    With a = sqrt(abar): a_t -> (a_t - a_T) a_0 / (a_0 - a_T), so that a_0 stays and a_T becomes 0. abar: (T,).
    """
    a = abar.sqrt()
    return ((a - a[-1]) * (a[0] / (a[0] - a[-1]))) ** 2


def make_alphas_cumprod(
    betas: torch.Tensor | Sequence[float], *, snr_shift_scale: float = 1.0, zero_terminal_snr: bool = False
) -> torch.Tensor:
    """The table abar_0 ... abar_{T-1}, float64 (T,): cumulative product, then SNR shift, then zero terminal SNR."""
    abar = torch.cumprod(1 - torch.as_tensor(betas, dtype=torch.float64), dim=0)
    abar = shift_snr(abar, snr_shift_scale)
    return rescale_zero_terminal_snr(abar) if zero_terminal_snr else abar


def signal_and_noise(abar: torch.Tensor, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) of each sample's timestep, shaped (B, 1, ...) to broadcast against `like` (B, ...).

    The square roots are taken in float64 and returned in float32 at least, on the device of `like`, so that training in
    half precision sees exact levels. timesteps: int64 (B,), (1,) or a scalar, indices into abar (T,).
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    index = timesteps.to(like.device).flatten()

    def pick(table: torch.Tensor) -> torch.Tensor:
        values = table.to(dtype).to(like.device)[index]  # cast first: some devices have no float64
        return values.reshape(-1, *[1] * (like.ndim - 1))

    return pick(abar.sqrt()), pick((1 - abar).sqrt())


# --- the maps ---------------------------------------------------------------------------------------------------------


def add_noise(clean: torch.Tensor, noise: torch.Tensor, alpha: Level, sigma: Level) -> torch.Tensor:
    """x_t = alpha x_0 + sigma eps."""
    return alpha * clean + sigma * noise


def to_velocity(clean: torch.Tensor, noise: torch.Tensor, alpha: Level, sigma: Level) -> torch.Tensor:
    """v = alpha eps - sigma x_0 (arXiv:2202.00512, appendix D)."""
    return alpha * noise - sigma * clean


def to_clean(prediction: torch.Tensor, noisy: torch.Tensor, alpha: Level, sigma: Level, kind: str) -> torch.Tensor:
    """x_0 from what the network predicts of x_t: v: alpha x_t - sigma v; eps: (x_t - sigma eps) / alpha; sample: itself."""
    if kind == "v_prediction":
        return alpha * noisy - sigma * prediction
    if kind == "epsilon":
        return (noisy - sigma * prediction) / alpha
    if kind == "sample":
        return prediction
    raise unknown_choice("prediction_type", kind, PREDICTION_TYPES)


def to_noise(prediction: torch.Tensor, noisy: torch.Tensor, alpha: Level, sigma: Level, kind: str) -> torch.Tensor:
    """eps from what the network predicts of x_t: v: sigma x_t + alpha v; eps: itself; sample: (x_t - alpha x_0) / sigma."""
    if kind == "v_prediction":
        return sigma * noisy + alpha * prediction
    if kind == "epsilon":
        return prediction
    if kind == "sample":
        return (noisy - alpha * prediction) / sigma
    raise unknown_choice("prediction_type", kind, PREDICTION_TYPES)
