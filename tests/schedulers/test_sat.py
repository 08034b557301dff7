"""Recorded runs of the original code (SAT): its tables, its update rules, and how far its choice of levels is from ours."""

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.schedulers import CogVideoXScheduler
from diffusers_cogvideox.schedulers import noise as process
from diffusers_cogvideox.schedulers.solvers import ddim_weights, dpm_weights
from diffusers_cogvideox.schedulers.timesteps import spaced_timesteps

SOLVERS = {"ddim": "ddim", "dpm": "dpmsolver++"}


@pytest.fixture
def sat(reference):
    return load_file(reference / "sat" / "sampler_io.safetensors")


def table(scale):
    betas = process.make_betas(1000, 0.00085, 0.012, "scaled_linear")
    return process.make_alphas_cumprod(betas, snr_shift_scale=scale)


def guided(x, t, sat, scale):
    """The toy network of the recording under classifier-free guidance."""
    velocity = 0.5 * torch.tanh(x) + 0.001 * t / 1000
    return velocity + scale * sat["cond"].mean()


def guidance(sat, name, steps):
    return sat[f"dyn_cfg_sat_{steps}"].tolist() if name == "dyn" else [6.0] * steps


@pytest.mark.parametrize("scale", [1, 3])
def test_tables(sat, scale):
    full = process.rescale_zero_terminal_snr(table(scale)).sqrt()
    torch.testing.assert_close(full.float(), sat[f"sqrt_acp_1000_shift{scale}"], atol=2e-7, rtol=0)
    for steps in (10, 50):
        grid = sat[f"timesteps_{steps}"]
        assert grid.tolist() == spaced_timesteps("trailing", steps, 1000)
        chosen = process.rescale_zero_terminal_snr(table(scale)[grid.flip(0)]).flip(0).sqrt()
        torch.testing.assert_close(chosen.float(), sat[f"sqrt_acp_{steps}_shift{scale}"], atol=2e-7, rtol=0)


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("cfg", ["cfg", "dyn"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_update_rules_reproduce_every_step(sat, solver, cfg, scale):
    """With the original's levels (rescaled after choosing the timesteps) the two solvers retrace its trajectories."""
    full = process.rescale_zero_terminal_snr(table(scale))
    levels = [*(sat[f"sqrt_acp_10_shift{scale}"].double() ** 2).tolist(), 1.0]
    noises = iter(sat.get(f"{solver}_{cfg}_shift{scale}_steps10_noises", ()))
    trajectory = sat[f"{solver}_{cfg}_shift{scale}_steps10_traj"]
    x, old = sat["x_T"], None
    for i, w in enumerate(guidance(sat, cfg, 10)):
        nearest = int((full.sqrt() - levels[i] ** 0.5).abs().argmin())  # the level that the original's network is told
        alpha, sigma = full[nearest].item() ** 0.5, (1 - full[nearest].item()) ** 0.5
        clean = process.to_clean(guided(x, nearest, sat, w), x, alpha, sigma, "v_prediction")
        if solver == "ddim" or i == 9:
            weights, draws = ddim_weights(levels[i], levels[i + 1]), 0  # the last step is the same for both
        else:
            weights, draws = dpm_weights(levels[i], levels[i + 1], levels[i - 1] if i else None), 2 if i else 1
        direction = clean if weights.extrapolation is None else clean + weights.extrapolation * (clean - old)
        x = weights.sample * x + weights.clean * direction
        for z in [next(noises) for _ in range(draws)][-1:]:
            x = x + weights.noise * z
        old = clean
        torch.testing.assert_close(x, trajectory[i], atol=1e-5, rtol=0, msg=lambda m, i=i: f"step {i}: {m}")
    assert next(noises, None) is None


@pytest.mark.parametrize(("solver", "scale", "bound"), [("ddim", 1, 7e-3), ("ddim", 3, 1.3e-2), ("dpm", 1, 3e-2), ("dpm", 3, 3e-2)])
@pytest.mark.parametrize("cfg", ["cfg", "dyn"])
def test_the_scheduler_is_near_the_original_run(sat, solver, cfg, scale, bound):
    """diffusers, and we, rescale the table once for all step counts; that alone makes this difference."""
    config = PRESETS["5b"].scheduler | {"snr_shift_scale": float(scale)}
    scheduler = CogVideoXScheduler(**config, algorithm_type=SOLVERS[solver])
    scheduler.set_timesteps(10)
    noises = iter(sat.get(f"{solver}_{cfg}_shift{scale}_steps10_noises", ()))
    x = sat["x_T"]
    for i, (t, w) in enumerate(zip(scheduler.timesteps, guidance(sat, cfg, 10), strict=True)):
        draws = 0 if solver == "ddim" or i == 9 else 2 if i else 1
        z = ([torch.zeros_like(x)] + [next(noises) for _ in range(draws)])[-1]
        x = scheduler.step(guided(x, int(t), sat, w), t, x, variance_noise=z).prev_sample
    difference = (x - sat[f"{solver}_{cfg}_shift{scale}_steps10_out"]).abs().max()
    assert 1e-5 < difference < bound * 1.1


@pytest.mark.parametrize(("scale", "bound"), [(1, 1.5e-3), (3, 5e-3)])
@pytest.mark.parametrize("cfg", ["cfg", "dyn"])
def test_more_steps_come_nearer(sat, cfg, scale, bound):
    scheduler = CogVideoXScheduler(**PRESETS["5b"].scheduler | {"snr_shift_scale": float(scale)})
    scheduler.set_timesteps(50)
    x = sat["x_T"]
    for t, w in zip(scheduler.timesteps, guidance(sat, cfg, 50), strict=True):
        x = scheduler.step(guided(x, int(t), sat, w), t, x).prev_sample
    assert (x - sat[f"ddim_{cfg}_shift{scale}_steps50_out"]).abs().max() < bound * 1.1
