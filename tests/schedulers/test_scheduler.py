"""The scheduler takes stock's steps where stock is right, and those of the closed form for every other number of steps."""

import math

import pytest
import torch

from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.schedulers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXScheduler
from parity import StockDDIMScheduler, StockDPMScheduler

RELEASED = {scale: PRESETS[name].scheduler for scale, name in ((3.0, "2b"), (1.0, "5b"))}
CONFIG = RELEASED[1.0]
SHAPE = (2, 3, 4, 4, 6)
SOLVERS = ("ddim", "dpmsolver++")


def network(x, t):
    """A smooth stand-in for the transformer; accepts a batch of any size."""
    return 0.5 * torch.tanh(x) + 0.3 * x.roll(1, -1) + 0.2 * math.sin(int(t))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def walk(scheduler, x, generator=None, **kwargs):
    """Every x_t and every predicted x_0 of a whole run."""
    states, cleans = [], []
    for t in scheduler.timesteps:
        out = scheduler.step(network(x, t), t, x, generator=generator, **kwargs)
        x = out.prev_sample
        states.append(x)
        cleans.append(out.pred_original_sample)
    return torch.stack(states), torch.stack(cleans)


def walk_stock_dpm(scheduler, x, generator):
    """Drive diffusers' DPM scheduler the way its pipelines do."""
    states, cleans, old = [], [], None
    for i, t in enumerate(scheduler.timesteps):
        back = scheduler.timesteps[i - 1] if i > 0 else None
        x, old = scheduler.step(network(x, t), old, t, back, x, generator=generator)
        states.append(x)
        cleans.append(old)
    return torch.stack(states), torch.stack(cleans)


def levels(scheduler, grid):
    return [*scheduler.alphas_cumprod[grid].tolist(), 1.0]


def ddim_closed_form(scheduler, grid, x):
    """x_p = sqrt(abar_p) x_0 + sqrt(1 - abar_p) eps in float64, from one grid timestep to the next, then to abar = 1."""
    abar = levels(scheduler, grid)
    states = []
    for i, t in enumerate(grid):
        v = network(x, t)
        a, s = math.sqrt(abar[i]), math.sqrt(1 - abar[i])
        clean, noise = a * x - s * v, s * x + a * v
        x = math.sqrt(abar[i + 1]) * clean + math.sqrt(1 - abar[i + 1]) * noise
        states.append(x)
    return torch.stack(states)


def dpm_closed_form(scheduler, grid, x, generator):
    """SDE-DPM-Solver++(2M) as published, in log-SNR, in float64; draws noise in the order of the original sampler."""
    abar = torch.tensor(levels(scheduler, grid), dtype=torch.float64)
    lam = 0.5 * torch.log(abar / (1 - abar))
    states, old = [], None
    for i, t in enumerate(grid):
        clean = abar[i].sqrt() * x - (1 - abar[i]).sqrt() * network(x, t)
        h = lam[i + 1] - lam[i]
        z = torch.randn(x.shape, generator=generator).double()
        d = clean
        if old is not None and i + 1 < len(grid):
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * clean - 1 / (2 * r) * old
            z = torch.randn(x.shape, generator=generator).double()
        x = (
            ((1 - abar[i + 1]) / (1 - abar[i])).sqrt() * torch.exp(-h) * x
            - torch.expm1(-2 * h) * abar[i + 1].sqrt() * d
            + ((1 - abar[i + 1]) * -torch.expm1(-2 * h)).sqrt() * z
        )
        states.append(x)
        old = clean
    return torch.stack(states)


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", sorted(RELEASED))
@pytest.mark.parametrize("steps", [50, 25, 20, 10])
def test_ddim_equals_stock_at_every_step(steps, scale):
    ours, stock = CogVideoXDDIMScheduler(**RELEASED[scale]), StockDDIMScheduler(**RELEASED[scale])
    x = torch.randn(SHAPE)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps)
    torch.testing.assert_close(ours.timesteps, stock.timesteps)
    for mine, theirs in zip(walk(ours, x), walk(stock, x), strict=True):
        torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("scale", sorted(RELEASED))
@pytest.mark.parametrize("steps", [50, 25, 20, 10])
def test_dpm_equals_stock_at_every_step_from_the_same_seed(steps, scale):
    ours, stock = CogVideoXDPMScheduler(**RELEASED[scale]), StockDPMScheduler(**RELEASED[scale])
    x = torch.randn(SHAPE)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps)
    mine, theirs = rng(), rng()
    for a, b in zip(walk(ours, x, mine), walk_stock_dpm(stock, x, theirs), strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=0)
    assert torch.equal(mine.get_state(), theirs.get_state()), "the next video of this generator would differ from stock's"


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_other_options_equal_stock(kind, spacing, to_one):
    config = {"prediction_type": kind, "timestep_spacing": spacing, "set_alpha_to_one": to_one}
    ours, stock = CogVideoXDDIMScheduler(**config), StockDDIMScheduler(**config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    for mine, theirs in zip(walk(ours, x), walk(stock, x), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def half_precision_runs(solver, dtype, steps=20):
    """Final states of ours, of stock and of an exact run, which sees the same noise; latents are `dtype` in between."""
    ours, exact = (CogVideoXScheduler(**CONFIG, algorithm_type=solver) for _ in range(2))
    stock = (StockDDIMScheduler if solver == "ddim" else StockDPMScheduler)(**CONFIG)
    for scheduler in (ours, stock, exact):
        scheduler.set_timesteps(steps)
    mine = theirs = torch.randn(SHAPE).to(dtype)
    true, old, (r1, r2, r3) = mine.double(), None, (rng() for _ in range(3))
    for i, t in enumerate(ours.timesteps):
        mine = ours.step(network(mine.float(), t), t, mine, generator=r1).prev_sample.to(dtype)
        velocity, back = network(theirs.float(), t), stock.timesteps[i - 1] if i else None
        if solver == "ddim":
            theirs = stock.step(velocity, t, theirs).prev_sample.to(dtype)
        else:
            theirs, old = stock.step(velocity, old, t, back, theirs, generator=r2)
            theirs = theirs.to(dtype)
        draws = 2 if 0 < i < steps - 1 else 1
        z = [torch.randn(SHAPE, generator=r3, dtype=dtype) for _ in range(draws)][-1]
        true = exact.step(network(true, t), t, true, variance_noise=z.double()).prev_sample
    return mine.double(), theirs.double(), true


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", SOLVERS)
def test_x12_half_precision_is_not_worse_than_stock(solver, dtype):
    mine, theirs, true = half_precision_runs(solver, dtype)
    ours_error, stock_error = ((run - true).pow(2).mean().sqrt() for run in (mine, theirs))
    assert 0 < ours_error <= stock_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_in_is_dtype_out(dtype):
    scheduler = CogVideoXScheduler(**CONFIG)
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE, dtype=dtype)
    out = scheduler.step(x, 999, x)
    assert out.prev_sample.dtype is out.pred_original_sample.dtype is dtype


# --- every number of steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 7, 28, 30, 33, 61])
def test_ddim_equals_the_closed_form(steps, spacing):
    scheduler = CogVideoXScheduler(**CONFIG | {"timestep_spacing": spacing})
    scheduler.set_timesteps(steps)
    grid = scheduler.timesteps.tolist()
    assert len(grid) == steps
    x = torch.randn(SHAPE, dtype=torch.float64)
    torch.testing.assert_close(walk(scheduler, x)[0], ddim_closed_form(scheduler, grid, x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 28, 30, 33])
def test_dpm_equals_the_closed_form(steps):
    scheduler = CogVideoXScheduler(**CONFIG, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE)
    expected = dpm_closed_form(scheduler, scheduler.timesteps.tolist(), x.double(), rng())
    torch.testing.assert_close(walk(scheduler, x, rng())[0], expected.float(), atol=2e-5, rtol=0)


def test_stock_is_wrong_there():
    """The reason for the tests above: from 7 steps on a grid of 1000, stock goes to timesteps that are not on the grid."""
    stock = StockDDIMScheduler(**CONFIG)
    stock.set_timesteps(7)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert (walk(stock, x)[0] - ddim_closed_form(stock, stock.timesteps.tolist(), x)).abs().max() > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_the_last_step_returns_the_predicted_clean_sample(steps, solver):
    scheduler = CogVideoXScheduler(**CONFIG, algorithm_type=solver)
    scheduler.set_timesteps(steps)
    states, cleans = walk(scheduler, torch.randn(SHAPE), rng())
    torch.testing.assert_close(states[-1], cleans[-1], atol=0, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_perfect_network_is_followed_exactly(solver):
    """When every prediction names the same clean sample, any grid arrives at it."""
    scheduler = CogVideoXScheduler(**CONFIG | {"prediction_type": "sample"}, algorithm_type=solver)
    clean = torch.randn(SHAPE)
    for steps in (3, 19, 50):
        scheduler.set_timesteps(steps)
        x = torch.randn(SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(clean, t, x, generator=rng()).prev_sample
        torch.testing.assert_close(x, clean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_step_lands_on_the_level_of_the_next_timestep(solver):
    """From x_t = alpha x_0 + sigma eps with the exact velocity, the next state has variance abar' + (1 - abar') = 1."""
    scheduler = CogVideoXScheduler(**CONFIG, algorithm_type=solver)
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 200_000, generator=rng()).double()
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x = scheduler.add_noise(clean, noise, t)
        scheduler.set_begin_index(i)
        after = scheduler.step(scheduler.get_velocity(clean, noise, t), t, x, generator=rng(i + 1)).prev_sample
        alpha = scheduler.alphas_cumprod[scheduler.timesteps[i + 1]].sqrt()
        rest = after - alpha * clean
        torch.testing.assert_close(rest.std(), (1 - alpha**2).sqrt(), atol=5e-3, rtol=0)


# --- grids ------------------------------------------------------------------------------------------------------------


def test_grids_equal_stock_and_are_complete_for_every_number_of_steps():
    """Stock's trailing grid has one timestep too many, -1, for 62 numbers of steps (61, 103, 121, ...)."""
    excess = []
    for spacing in ("trailing", "leading", "linspace"):
        config = CONFIG | {"timestep_spacing": spacing}
        ours, stock = CogVideoXDDIMScheduler(**config), StockDDIMScheduler(**config)
        for steps in range(2, 1001):
            ours.set_timesteps(steps)
            stock.set_timesteps(steps)
            grid, theirs = ours.timesteps.tolist(), stock.timesteps.tolist()
            assert grid == theirs[:steps]
            assert len(set(grid)) == steps and min(grid) >= 0 and max(grid) <= 999 and grid == sorted(grid)[::-1]
            excess += [steps] * (len(theirs) > steps)
    assert len(excess) == 62 and excess[:3] == [61, 103, 121]


def test_steps_offset_shifts_a_leading_grid():
    scheduler = CogVideoXScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [751, 501, 251, 1]


def test_custom_timesteps_are_walked():
    scheduler = CogVideoXScheduler(**CONFIG)
    grid = [999, 800, 421, 77, 3]
    scheduler.set_timesteps(timesteps=grid)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert scheduler.num_inference_steps == 5
    torch.testing.assert_close(walk(scheduler, x)[0], ddim_closed_form(scheduler, grid, x), atol=1e-9, rtol=0)


def test_a_run_can_start_in_the_middle():
    """What video-to-video does: the first step there is of first order, even after an earlier, unfinished run."""
    scheduler, fresh = (CogVideoXScheduler(**CONFIG, algorithm_type="dpmsolver++") for _ in range(2))
    x = torch.randn(SHAPE)
    for s in (scheduler, fresh):
        s.set_timesteps(10)
    assert scheduler.step_index is None and scheduler.begin_index is None
    for t in scheduler.timesteps[:4]:
        scheduler.step(network(x, t), t, x)
    assert scheduler.step_index == 4
    scheduler.set_begin_index(4)
    t = scheduler.timesteps[4]
    a, b = (s.step(network(x, t), t, x, generator=rng()).prev_sample for s in (scheduler, fresh))
    torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_jumping_on_the_grid_forgets_the_step_before():
    scheduler, fresh = (CogVideoXScheduler(**CONFIG, algorithm_type="dpmsolver++") for _ in range(2))
    x = torch.randn(SHAPE)
    for s in (scheduler, fresh):
        s.set_timesteps(10)
    walk(scheduler, x, rng())  # a whole video; the second one starts without set_timesteps
    for a, b in zip(walk(scheduler, x, rng()), walk(fresh, x, rng()), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


# --- noise ------------------------------------------------------------------------------------------------------------


def test_eta_zero_is_deterministic_and_draws_nothing():
    scheduler = CogVideoXScheduler(**CONFIG)
    scheduler.set_timesteps(10)
    generator = rng()
    before = generator.get_state()
    walk(scheduler, torch.randn(SHAPE), generator)
    assert torch.equal(generator.get_state(), before)


def test_eta_one_has_mean_and_variance_of_the_ddpm_posterior():
    """q(x_p | x_t, x_0) of arXiv:2006.11239, eq. 7, with alpha = abar_t / abar_p and beta = 1 - alpha."""
    scheduler = CogVideoXScheduler(**CONFIG)
    scheduler.set_timesteps(10)
    for i in (1, 5, 8):
        t, p = scheduler.timesteps[i : i + 2]
        abar, abar_p = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[p]
        alpha = abar / abar_p
        x, v = torch.randn(2, 1, 100_000, dtype=torch.float64)
        scheduler.set_begin_index(i)
        out = scheduler.step(v, t, x, eta=1.0, generator=rng())
        mean = (abar_p.sqrt() * (1 - alpha) * out.pred_original_sample + alpha.sqrt() * (1 - abar_p) * x) / (1 - abar)
        variance = (1 - abar_p) / (1 - abar) * (1 - alpha)
        residual = out.prev_sample - mean
        torch.testing.assert_close(residual.var(), variance, rtol=0.02, atol=0)
        scheduler.set_begin_index(i)
        silent = scheduler.step(v, t, x, eta=1.0, variance_noise=torch.zeros_like(x)).prev_sample
        torch.testing.assert_close(silent, mean)


def test_eta_changes_the_video_here_and_not_in_stock():
    x = torch.randn(SHAPE)
    changed = {}
    for cls in (CogVideoXDDIMScheduler, StockDDIMScheduler):
        scheduler = cls(**CONFIG)
        scheduler.set_timesteps(10)
        changed[cls] = (walk(scheduler, x, rng(), eta=1.0)[0] - walk(scheduler, x, rng(), eta=0.0)[0]).abs().max().item()
    assert changed[CogVideoXDDIMScheduler] > 0.1
    assert changed[StockDDIMScheduler] == 0


@pytest.mark.parametrize(("solver", "eta"), [("ddim", 1.0), ("dpmsolver++", 0.0)])
def test_a_list_of_generators_equals_separate_runs(solver, eta):
    scheduler = CogVideoXScheduler(**CONFIG, algorithm_type=solver)
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    together = walk(scheduler, x, [rng(5), rng(6)], eta=eta)[0]
    for i in range(2):
        alone = walk(scheduler, x[i : i + 1], rng(5 + i), eta=eta)[0]
        torch.testing.assert_close(together[:, i : i + 1], alone, atol=1e-6, rtol=0)
    assert not torch.allclose(together[:, 0], together[:, 1])


def test_dpm_noise_can_be_handed_in():
    scheduler = CogVideoXScheduler(**CONFIG, algorithm_type="dpmsolver++")
    scheduler.set_timesteps(10)
    x, z = torch.randn(2, *SHAPE)
    drawn = scheduler.step(network(x, 999), 999, x, generator=rng(3)).prev_sample
    scheduler.set_timesteps(10)
    given = scheduler.step(network(x, 999), 999, x, variance_noise=torch.randn(SHAPE, generator=rng(3))).prev_sample
    torch.testing.assert_close(drawn, given, atol=0, rtol=0)
    scheduler.set_timesteps(10)
    assert not torch.allclose(scheduler.step(network(x, 999), 999, x, variance_noise=z).prev_sample, drawn)


# --- the rest of the interface ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["add_noise", "get_velocity"])
@pytest.mark.parametrize("scale", sorted(RELEASED))
def test_training_maps_equal_stock(method, scale):
    ours, stock = CogVideoXScheduler(**RELEASED[scale]), StockDDIMScheduler(**RELEASED[scale])
    x, noise = torch.randn(2, 4, 3, 2, 2)
    timesteps = torch.tensor([0, 17, 500, 999])
    torch.testing.assert_close(getattr(ours, method)(x, noise, timesteps), getattr(stock, method)(x, noise, timesteps), atol=1e-5, rtol=0)
    one = getattr(ours, method)(x, noise, timesteps[1:2])
    torch.testing.assert_close(one[1], getattr(ours, method)(x, noise, timesteps)[1])


def test_training_maps_are_more_exact_than_stock_in_half_precision():
    ours, stock = CogVideoXScheduler(**CONFIG), StockDDIMScheduler(**CONFIG)
    x, noise = torch.randn(2, 1000, 8)
    timesteps = torch.arange(1000)
    true = ours.add_noise(x.double(), noise.double(), timesteps)
    errors = [(s.add_noise(x.half(), noise.half(), timesteps).double() - true).abs().max() for s in (ours, stock)]
    assert ours.add_noise(x.half(), noise.half(), timesteps).dtype is torch.float16
    assert errors[0] < 4e-3 and errors[0] < errors[1]


def test_interface_of_diffusers_schedulers():
    scheduler = CogVideoXScheduler(**CONFIG)
    x = torch.randn(SHAPE)
    assert scheduler.scale_model_input(x, 999) is x
    assert (len(scheduler), scheduler.order, scheduler.init_noise_sigma) == (1000, 1, 1.0)
    assert scheduler.timesteps.tolist() == list(range(999, -1, -1))
    scheduler.set_timesteps(10)
    assert scheduler.index_for_timestep(torch.tensor(899)) == 1
    result = scheduler.step(network(x, 999), 999, x, return_dict=False)
    assert isinstance(result, tuple) and len(result) == 2


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid' is unknown: choose one of linear"),
        ({"prediction_type": "flow"}, "prediction_type='flow' is unknown"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is unknown"),
        ({"algorithm_type": "euler"}, "algorithm_type='euler' is unknown"),
        ({"clip_sample": True}, "clip_sample=True would have no effect"),
        ({"clip_sample_range": 2.0}, "clip_sample_range=2.0 would have no effect"),
        ({"sample_max_value": 2.0}, "sample_max_value=2.0 would have no effect"),
        ({"steps_offset": 1, "timestep_spacing": "trailing"}, "steps_offset=1 would have no effect"),
        ({"snr_shift_scale": 0.0}, "snr_shift_scale=0.0 must be positive"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values, but num_train_timesteps=1000"),
    ],
)
def test_impossible_options_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        CogVideoXScheduler(**config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 is not possible: choose 1 to 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001 is not possible"),
        ({}, "exactly one"),
        ({"num_inference_steps": 3, "timesteps": [3, 2, 1]}, "exactly one"),
        ({"timesteps": []}, "must decrease"),
        ({"timesteps": [1000, 5]}, "must decrease and lie in 0 ... 999"),
        ({"timesteps": [10, -1]}, "must decrease"),
        ({"timesteps": [10, 10]}, "must decrease"),
    ],
)
def test_impossible_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CogVideoXScheduler(**CONFIG).set_timesteps(**arguments)


def test_an_offset_beyond_the_table_is_refused():
    with pytest.raises(ValueError, match=r"timesteps=\[1000, 999, ..., 1\] are not possible"):
        CogVideoXScheduler(steps_offset=1).set_timesteps(1000)


def test_noise_prediction_from_pure_noise_is_refused():
    scheduler = CogVideoXScheduler(**CONFIG | {"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="not possible at timestep 999"):
        scheduler.set_timesteps(10)


def test_impossible_steps_are_refused():
    x = torch.zeros(SHAPE)
    scheduler = CogVideoXScheduler(**CONFIG)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep 998 is not on the grid"):
        scheduler.step(x, 998, x)
    with pytest.raises(ValueError, match="must have one shape"):
        scheduler.step(x[:1], 999, x)
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        scheduler.step(x, 999, x, generator=[rng()] * 3)
    with pytest.raises(ValueError, match=r"eta=2.0 is not possible"):
        scheduler.step(x, 999, x, eta=2.0)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match=r"set_begin_index\(3\) was called, but the first step is at position 0"):
        scheduler.step(x, 999, x)


def test_eta_is_refused_by_the_stochastic_solver():
    scheduler = CogVideoXDPMScheduler(**CONFIG)
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=r"eta=0.5 is not possible: .* 0 with algorithm_type='dpmsolver\+\+'"):
        scheduler.step(torch.zeros(SHAPE), 999, torch.zeros(SHAPE), eta=0.5)
