"""Guidance, samplers and their noise: what diffusers does, and what we do."""

import inspect

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, ClassifierFreeGuidance, EulerDiscreteScheduler, LayerSkipConfig, SkipLayerGuidance

from diffusers_cogvideox import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline, SkipLayers, shifted_config
from diffusers_cogvideox.presets import PRESETS
from parity import StockDDIMScheduler, StockDPMScheduler, StockPipeline
from tiny_pipeline import call

CONFIG = PRESETS["5b"].scheduler


@pytest.fixture
def pipes(loaded):
    """pipes(variant="5b"): our pipeline and diffusers'."""
    return lambda variant="5b": [cls(**loaded(cls, variant).components) for cls in (CogVideoXPipeline, StockPipeline)]


def latents(pipe, **options) -> torch.Tensor:
    return call(pipe, output_type="latent", num_inference_steps=2, **options)


@pytest.mark.parametrize("part", ["attention", "scores"])
def test_d12_attention_can_be_skipped_for_guidance(pipes, part):
    """With diffusers' transformer, LayerSkip knows no attention of CogVideoX; its pipeline has no such guidance at all."""
    ours, stock = pipes()
    skipping = {"skip_layers": SkipLayers([0], part=part)}
    assert (latents(ours, **skipping) - latents(ours)).abs().max() > 1e-2
    ours.transformer = stock.transformer
    with pytest.raises(ValueError, match="not registered"):
        latents(ours, **skipping)
    latents(ours)  # nothing is left behind
    with pytest.raises(TypeError, match="skip_layers"):
        latents(stock, **skipping)


def test_d13_guiders(pipes):
    """diffusers' own, which its modular pipelines take; CogVideoX has none there."""
    ours, stock = pipes()
    scale = {"guidance_scale": 6.0}
    torch.testing.assert_close(latents(ours, guider=ClassifierFreeGuidance(**scale)), latents(stock), atol=1e-3, rtol=0)
    layer = LayerSkipConfig([0], fqn="transformer_blocks")
    skipped = SkipLayerGuidance(**scale, skip_layer_config=layer, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    by_hand = latents(ours, skip_layers=SkipLayers([0], scale=2.8, interval=(0.5, 1.0)))  # diffusers' leaves out the first step
    torch.testing.assert_close(latents(ours, guider=skipped), by_hand, atol=1e-3, rtol=0)
    projected = latents(ours, guider=AdaptiveProjectedGuidance(**scale))
    assert projected.isfinite().all() and (projected - by_hand).abs().max() > 1e-2
    with pytest.raises(TypeError, match="guider"):
        latents(stock, guider=ClassifierFreeGuidance(**scale))


def test_d16_eta(pipes):
    changes = [(latents(pipe, eta=1.0) - latents(pipe, eta=0.0)).abs().max() for pipe in pipes()]
    assert changes[0] > 0.1
    assert changes[1] == 0


def test_d17_a_step_returns_what_it_was_asked_for():
    """`return_dict=True` of diffusers' first and last step gives a tuple, and the caller keeps the history."""
    x = torch.randn(1, 2, 3, 2, 2)
    ours, stock = CogVideoXDPMScheduler(**CONFIG), StockDPMScheduler(**CONFIG)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    assert isinstance(stock.step(x, None, 999, None, x, return_dict=True), tuple)
    for t in ours.timesteps:
        assert ours.step(x, t, x, return_dict=True).prev_sample.shape == x.shape


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers calls numpy on tensors
def test_d18_other_schedulers_keep_the_snr_shift_or_are_refused(pipes):
    """abar_500 of the 2B model is 0.095; without the shift it would be 0.241."""
    ours, stock = pipes("2b")
    euler = EulerDiscreteScheduler.from_config(stock.scheduler.config)
    torch.testing.assert_close(euler.alphas_cumprod[500].item(), 0.241, atol=1e-3, rtol=0)
    ours.scheduler = euler
    with pytest.raises(ValueError, match=r"ignores snr_shift_scale=3\.0"):
        latents(ours)
    ours.scheduler = EulerDiscreteScheduler.from_config(shifted_config(stock.scheduler.config))
    torch.testing.assert_close(ours.scheduler.alphas_cumprod[500].item(), 0.095, atol=1e-3, rtol=0)
    assert latents(ours).isfinite().all()


@pytest.mark.parametrize("steps", [7, 28])
@pytest.mark.parametrize("classes", [(CogVideoXDDIMScheduler, StockDDIMScheduler), (CogVideoXDPMScheduler, StockDPMScheduler)])
def test_d19_the_last_step_ends_at_the_clean_video(classes, steps):
    """It then returns its own prediction of it; diffusers' goes to timestep 0 or near it, which still has noise."""
    distances = []
    for cls in classes:
        scheduler = cls(**CONFIG)
        scheduler.set_timesteps(steps)
        x, v, t = torch.randn(1, 2, 3, 2, 2), torch.randn(1, 2, 3, 2, 2), scheduler.timesteps[-1]
        history = [None, t, None] if "old_pred_original_sample" in inspect.signature(scheduler.step).parameters else [t]
        after = scheduler.step(v, *history, x, return_dict=False)[0]
        abar = scheduler.alphas_cumprod[t].double()
        distances.append((after - (abar.sqrt() * x - (1 - abar).sqrt() * v)).abs().max())
    assert distances[0] < 1e-6
    assert distances[1] > 1e-3


@pytest.fixture
def batch_sizes():
    """batch_sizes(model, ...): a list that grows by the batch size of every call of these models."""
    sizes, handles = [], []

    def watch(*models):
        handles.extend(
            model.register_forward_pre_hook(lambda _, __, given: sizes.append(len(given["hidden_states"])), with_kwargs=True)
            for model in models
        )
        return sizes

    yield watch
    for handle in handles:
        handle.remove()


def test_d35_guidance_need_not_double_the_batch(pipes, batch_sizes):
    """Half the memory one after the other, half the time outside an interval."""
    ours, stock = pipes()
    sizes = batch_sizes(ours.transformer, stock.transformer)
    expected = latents(stock)
    assert sizes == [2, 2]
    sizes.clear()
    torch.testing.assert_close(latents(ours, sequential_guidance=True), expected, atol=1e-3, rtol=0)
    assert sizes == [1, 1, 1, 1]
    sizes.clear()
    latents(ours, guidance_interval=(0.0, 0.5))
    assert sizes == [2, 1]
    for option in ("sequential_guidance", "guidance_interval"):
        with pytest.raises(TypeError, match=option):
            latents(stock, **{option: None})
