"""The objectives against closed forms and the original code's recorded losses."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.schedulers.scheduler import CogVideoXScheduler
from diffusers_cogvideox.training.objectives import DiffusionObjective, VAEObjective, loss_by_bucket, stratified_timesteps
from parity import TINY_VAE


class ToyNetwork(nn.Module):
    """v = 0.5 tanh(x) + mean(text) + 0.001 t / 1000, the network of the recorded reference."""

    def forward(self, hidden_states, encoder_hidden_states, timestep, **_):
        shift = encoder_hidden_states.mean((1, 2)) + 0.001 * timestep / 1000
        return (0.5 * torch.tanh(hidden_states) + shift.view(-1, 1, 1, 1, 1),)


def released_scheduler(shift: float) -> CogVideoXScheduler:
    return CogVideoXScheduler(**PRESETS["5b"].scheduler | {"snr_shift_scale": float(shift)})


@pytest.mark.parametrize("shift", [1, 3])
def test_diffusion_loss_equals_the_original_code(reference: Path, shift: int) -> None:
    recorded = load_file(reference / "sat" / "sampler_io.safetensors")
    table = released_scheduler(shift).alphas_cumprod
    objective = DiffusionObjective(ToyNetwork(), table)
    index = recorded["loss_idx"].long()
    text = recorded["cond"].expand(len(index), -1, -1)
    result = objective(recorded["loss_x0"], text, index, recorded["loss_noise"], None)
    torch.testing.assert_close(result["per_sample"], recorded[f"loss_shift{shift}"], atol=1e-4, rtol=1e-4)


def test_velocity_loss_is_the_weighted_error_of_the_clean_latents() -> None:
    scheduler = released_scheduler(1)
    latents, noise, text = torch.randn(4, 3, 4, 4, 6), torch.randn(4, 3, 4, 4, 6), torch.randn(4, 7, 24)
    timesteps = torch.tensor([10, 300, 700, 950])
    result = DiffusionObjective(ToyNetwork(), scheduler.alphas_cumprod)(latents, text, timesteps, noise, None)

    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1, 1).float()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    clean = abar.sqrt() * noisy - (1 - abar).sqrt() * ToyNetwork()(noisy, text, timesteps)[0]
    weighted = ((clean - latents).square() / (1 - abar)).flatten(1).mean(1)
    torch.testing.assert_close(result["per_sample"], weighted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 7, 64])
def test_stratified_timesteps_put_one_sample_in_every_interval(count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        timesteps = stratified_timesteps(count, 1000, generator)
        edges = torch.arange(count + 1) * 1000 / count
        drawn = timesteps.sort().values
        assert (edges[:-1].floor() <= drawn).all() and (drawn < edges[1:]).all()


def test_stratified_timesteps_are_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([stratified_timesteps(8, 1000, generator) for _ in range(2000)]).float()
    assert abs(drawn.mean() - 499.5) < 5
    assert abs(drawn.std() - 288.7) < 5


def test_loss_by_bucket_averages_inside_its_range() -> None:
    result = loss_by_bucket(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 199, 999]), 1000)
    assert result == {"loss_t0": 2.0, "loss_t800": 10.0}


@pytest.mark.parametrize("l1_weight", [1.0, 0.0])
def test_vae_objective_reaches_every_parameter(l1_weight: float) -> None:
    objective = VAEObjective(AutoencoderKLCogVideoX(**TINY_VAE), kl_weight=1e-3, l1_weight=l1_weight)
    result = objective(torch.rand(1, 3, 9, 16, 16) * 2 - 1)
    result["loss"].backward()
    torch.testing.assert_close(result["loss"], l1_weight * result["l1"] + result["mse"] + 1e-3 * result["kl"])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.parameters())


def test_kl_vanishes_for_a_standard_normal_posterior() -> None:
    vae = AutoencoderKLCogVideoX(**TINY_VAE)
    nn.init.zeros_(vae.encoder.conv_out.conv.weight)
    nn.init.zeros_(vae.encoder.conv_out.conv.bias)
    assert VAEObjective(vae, kl_weight=1.0)(torch.zeros(1, 3, 1, 16, 16))["kl"] == 0


def test_balanced_timesteps_contribute_alike() -> None:
    """With L_t^-1 as the weight of a sample, the expected contribution of every range of timesteps is the same."""

    class Zero(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
            return (torch.zeros_like(hidden_states),)

    timesteps = torch.arange(50, 1000, 100)
    latents = torch.randn(10, 1, 2, 4, 4) * torch.arange(1.0, 11.0).view(-1, 1, 1, 1, 1)
    arguments = {"latents": latents, "text": torch.zeros(10, 1, 1), "noise": torch.zeros_like(latents), "rotary": None}
    alphas = torch.linspace(0.9, 0.0, 1000)
    objective = DiffusionObjective(Zero(), alphas, balance=1.0)
    plain = DiffusionObjective(Zero(), alphas)(timesteps=timesteps, **arguments)
    torch.testing.assert_close(objective(timesteps=timesteps, **arguments)["loss"], plain["loss"])  # nothing is known at first
    for _ in range(400):
        objective.observe(plain["per_sample"], timesteps)
    torch.testing.assert_close(objective.typical_loss, plain["per_sample"], rtol=1e-3, atol=0)
    weights = 1 / plain["per_sample"]
    expected = (weights / weights.mean() * plain["per_sample"]).mean()
    torch.testing.assert_close(objective(timesteps=timesteps, **arguments)["loss"], expected, rtol=1e-3, atol=0)
