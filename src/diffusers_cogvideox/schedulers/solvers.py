r"""One reverse step of each solver, as weights on what is at hand: the pure maths of the sampler, without any state.

A step from level `abar` to the less noisy level `abar_next` is, for both solvers,

    x_next = sample * x_t + clean * D + noise * z,    D = x_0 + extrapolation * (x_0 - x_0^back),    z ~ N(0, 1)

with x_0 the clean latent predicted at this step and x_0^back the one predicted at the step before.
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = ["StepWeights", "ddim_weights", "dpm_weights"]


class StepWeights(NamedTuple):
    """Weights of x_t, of the predicted clean latent, of fresh noise, and of the extrapolation from the step before."""

    sample: float
    clean: float
    noise: float = 0.0
    extrapolation: float | None = None  # None: first order, D = x_0


def ddim_weights(abar: float, abar_next: float, eta: float = 0.0) -> StepWeights:
    r"""DDIM (arXiv:2010.02502, eq. 12 and 16), written without the division by sqrt(abar) that zero terminal SNR forbids.

        s^2 = eta^2 (1 - abar_next) / (1 - abar) (1 - abar / abar_next)
        x_next = sqrt(abar_next) x_0 + sqrt(1 - abar_next - s^2) eps + s z,    eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar)

    eta = 0 is deterministic; eta = 1 is ancestral sampling with the variance of the DDPM posterior.
    """
    variance = eta**2 * (1 - abar_next) / (1 - abar) * (1 - abar / abar_next)
    kept = math.sqrt(max(0.0, 1 - abar_next - variance) / (1 - abar))
    return StepWeights(sample=kept, clean=math.sqrt(abar_next) - math.sqrt(abar) * kept, noise=math.sqrt(variance))


def dpm_weights(abar: float, abar_next: float, abar_back: float | None = None) -> StepWeights:
    r"""SDE-DPM-Solver++(2M) (arXiv:2211.01095, appendix A), in signal-to-noise ratios instead of their logarithms.

    With lambda = log(SNR) / 2, h = lambda_next - lambda and q = e^{-2h} = SNR / SNR_next:

        x_next = sqrt((1 - abar_next) / (1 - abar) q) x_t + (1 - q) sqrt(abar_next) D + sqrt((1 - abar_next) (1 - q)) z

    Every term stays finite at both ends, where the logarithms do not: SNR = 0 gives q = 0; abar_next = 1 gives x_next = D.
    `abar_back`, the level one step before, makes the step second order: extrapolation h / (2 (lambda - lambda_back)),
    which is 0 when that level was pure noise. Leave it out on the first step and on the step to the clean end.
    """
    ratio = abar * (1 - abar_next) / ((1 - abar) * abar_next)
    return StepWeights(
        sample=math.sqrt((1 - abar_next) / (1 - abar) * ratio),
        clean=(1 - ratio) * math.sqrt(abar_next),
        noise=math.sqrt((1 - abar_next) * max(0.0, 1 - ratio)),
        extrapolation=None if abar_back is None else _extrapolation(abar, abar_next, abar_back),
    )


def _extrapolation(abar: float, abar_next: float, abar_back: float) -> float:
    """1 / (2 r) with r = (lambda - lambda_back) / (lambda_next - lambda); lambda_back is -inf at pure noise."""
    if abar_back == 0:
        return 0.0
    now, after, before = (math.log(level / (1 - level)) for level in (abar, abar_next, abar_back))
    return 0.5 * (after - now) / (now - before)
