"""Foreign schedulers: their noise schedule stays the checkpoint's, or they are refused."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_cogvideox import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline, shifted_config
from diffusers_cogvideox.presets import PRESETS
from tiny_pipeline import call

# Several of diffusers' schedulers call numpy functions on tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FOREIGN = [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_the_line_of_every_tutorial_with_a_foreign_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert call(pipe, num_inference_steps=5, output_type="latent").isfinite().all()
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps)


def test_plain_ddim_takes_the_same_path(pipe):
    ours = call(pipe, num_inference_steps=5, output_type="latent")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(call(pipe, num_inference_steps=5, output_type="latent"), ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", ["2b", "5b"])
@pytest.mark.parametrize("scheduler", FOREIGN)
def test_a_schedule_written_out_is_kept_by_every_scheduler(loaded, scheduler, variant: str):
    pipe = CogVideoXPipeline(**loaded(CogVideoXPipeline, variant).components)
    expected = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler = scheduler.from_config(shifted_config(pipe.scheduler.config))
    assert call(pipe, output_type="latent").isfinite().all()
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps)
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod.double(), expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "variant", "dropped"),
    [
        (EulerDiscreteScheduler, "2b", "snr_shift_scale=3.0"),
        (DDIMScheduler, "2b", "snr_shift_scale=3.0"),
        (HeunDiscreteScheduler, "2b", "snr_shift_scale=3.0 and rescale_betas_zero_snr=True"),
        (HeunDiscreteScheduler, "5b", "rescale_betas_zero_snr=True"),
    ],
)
def test_a_dropped_schedule_is_refused_with_the_remedy(loaded, scheduler, variant: str, dropped: str):
    pipe = CogVideoXPipeline(**loaded(CogVideoXPipeline, variant).components)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=rf"ignores {dropped} .*{scheduler.__name__}.from_config\(diffusers_cogvideox.shifted_config"):
        call(pipe)


def test_a_schedule_written_out_means_the_same_to_our_scheduler():
    config = {**PRESETS["2b"].scheduler}
    expected = CogVideoXDDIMScheduler(**config).alphas_cumprod
    once = CogVideoXDDIMScheduler.from_config(shifted_config(config))
    twice = CogVideoXDDIMScheduler.from_config(shifted_config(shifted_config(config)))
    for scheduler in (once, twice, CogVideoXDDIMScheduler.from_config(EulerDiscreteScheduler.from_config(once.config).config)):
        torch.testing.assert_close(scheduler.alphas_cumprod, expected, atol=1e-7, rtol=1e-8)


def test_flow_matching_is_refused(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no prediction_type"):
        call(pipe)


def test_custom_timesteps_need_a_scheduler_that_takes_them(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="DDIMScheduler does not support custom timesteps"):
        call(pipe, timesteps=[999, 500])


@pytest.mark.parametrize("spacing", ["steps", "timesteps"])
@pytest.mark.parametrize(("sampler", "eta"), [(CogVideoXDDIMScheduler, 0.0), (CogVideoXDDIMScheduler, 1.0), (CogVideoXDPMScheduler, 0.0)])
def test_each_video_of_a_batch_is_the_one_made_alone(pipe, sampler, eta, spacing):
    """Starting noise and the noise of every step come from the video's own generator."""
    pipe.scheduler = sampler.from_config(pipe.scheduler.config)
    grid = {"timesteps": [999, 700, 350, 20]} if spacing == "timesteps" else {"num_inference_steps": 4}
    options = {"eta": eta, "output_type": "latent", **grid}
    prompts = ["a red circle", "a green square moves left"]

    def seeded(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = call(pipe, prompt=prompts, generator=seeded(5, 6), **options)
    for number, prompt in enumerate(prompts):
        alone = call(pipe, prompt=prompt, generator=seeded(5 + number), **options)
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)
    one_source = call(pipe, prompt=prompts, generator=torch.Generator().manual_seed(5), **options)
    assert (one_source[1] - together[1]).abs().max() > 0.1


def test_custom_timesteps_of_the_usual_grid_change_nothing(pipe):
    usual = call(pipe, num_inference_steps=5, output_type="latent")
    torch.testing.assert_close(call(pipe, timesteps=[999, 799, 599, 399, 199], output_type="latent"), usual, atol=0, rtol=0)
