"""The noise table and its maps, against stock's tables, the published numbers and their own inverses."""

import pytest
import torch

from diffusers_cogvideox.schedulers import CogVideoXScheduler
from diffusers_cogvideox.schedulers import noise as process
from parity import StockDDIMScheduler


def table(scale=1.0, zero=True):
    betas = process.make_betas(1000, 0.00085, 0.012, "scaled_linear")
    return process.make_alphas_cumprod(betas, snr_shift_scale=scale, zero_terminal_snr=zero)


@pytest.mark.parametrize("schedule", process.BETA_SCHEDULES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("zero", [True, False])
def test_tables_equal_stock(schedule, scale, zero):
    config = {"beta_schedule": schedule, "snr_shift_scale": scale, "rescale_betas_zero_snr": zero}
    ours, stock = CogVideoXScheduler(**config).alphas_cumprod, StockDDIMScheduler(**config).alphas_cumprod
    # Stock keeps only "scaled_linear" in float64.
    atol = 1e-14 if schedule == "scaled_linear" else 2e-6
    torch.testing.assert_close(ours, stock.double(), atol=atol, rtol=0)


@pytest.mark.parametrize(("scale", "first"), [(1.0, 0.99957490), (3.0, 0.99872637)])
def test_published_ends_of_the_table(scale, first):
    a = table(scale).sqrt()
    assert a[0].item() == pytest.approx(first, abs=5e-8)  # published in float32
    assert a[-1] == 0
    assert (a.diff() < 0).all()


def test_the_shift_divides_the_signal_to_noise_ratio():
    plain, shifted = table(zero=False), table(3.0, zero=False)
    torch.testing.assert_close(shifted / (1 - shifted), plain / (1 - plain) / 3)


def test_trained_betas_replace_the_schedule():
    betas = process.make_betas(1000, 0.00085, 0.012, "scaled_linear")
    scheduler = CogVideoXScheduler(trained_betas=betas.tolist(), beta_start=0.5, snr_shift_scale=1.0)
    torch.testing.assert_close(scheduler.alphas_cumprod, table(zero=False))


@pytest.mark.parametrize("kind", process.PREDICTION_TYPES)
def test_maps_are_inverses(kind):
    clean, noise = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    alpha, sigma = process.signal_and_noise(table(), torch.tensor([0, 17, 500, 900, 998]), clean)
    assert alpha.shape == sigma.shape == (5, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    noisy = process.add_noise(clean, noise, alpha, sigma)
    prediction = {"epsilon": noise, "sample": clean, "v_prediction": process.to_velocity(clean, noise, alpha, sigma)}[kind]
    torch.testing.assert_close(process.to_clean(prediction, noisy, alpha, sigma, kind), clean)
    torch.testing.assert_close(process.to_noise(prediction, noisy, alpha, sigma, kind), noise)


def test_pure_noise_at_the_last_timestep():
    clean, noise = torch.randn(2, 1, 8)
    alpha, sigma = process.signal_and_noise(table(), torch.tensor(999), clean)
    assert torch.equal(process.add_noise(clean, noise, alpha, sigma), noise)
    assert torch.equal(process.to_velocity(clean, noise, alpha, sigma), -clean)


@pytest.mark.parametrize("function", [process.to_clean, process.to_noise])
def test_unknown_prediction_types_are_refused(function):
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="prediction_type='flow' is unknown: choose one of epsilon, sample, v_prediction"):
        function(x, x, 0.6, 0.8, "flow")
