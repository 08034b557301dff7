"""DDIM inversion: the step against its closed form, round trips, the zero-SNR end, and what is refused."""

import math

import pytest
import torch

from diffusers_cogvideox import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    ContextWindows,
)
from diffusers_cogvideox.pipelines.inversion import InverseStepper, invertible_timesteps
from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.video_io import read_video
from parity import StockDDIMScheduler
from tiny_pipeline import call

PROMPT = "a red circle moves right"


@pytest.fixture
def text_pipe(loaded):
    """text_pipe(variant): our text-to-video pipeline."""

    def made(variant: str = "5b") -> CogVideoXPipeline:
        pipe = CogVideoXPipeline(**loaded(CogVideoXPipeline, variant).components)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return made


def invert(pipe, **options):
    given = {"prompt": PROMPT, "max_sequence_length": 7, "num_inference_steps": 10}
    return pipe.invert(**{**given, **options})


def error_of_round_trip(pipe, clean, **options) -> float:
    found = invert(pipe, latents=clean, **options)
    scale = options.get("guidance_scale", 1.0)
    again = call(pipe, prompt=PROMPT, latents=found.latents, timesteps=found.timesteps, guidance_scale=scale, output_type="latent")
    return (again - clean).square().mean().sqrt().item()


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_the_inverse_step_undoes_the_schedulers_for_a_velocity_that_depends_on_time_alone(variant):
    """Then one iteration is exact, whatever the noise schedule and the number of steps."""
    scheduler = CogVideoXDDIMScheduler(**PRESETS[variant].scheduler)
    scheduler.set_timesteps(7)
    timesteps, clean = invertible_timesteps(scheduler), torch.randn(1, 2, 3, 4, 4)
    velocity = {t: torch.randn_like(clean) for t in timesteps}
    back, x = InverseStepper.of(scheduler), clean
    for t in reversed(timesteps):
        x = back(velocity[t], torch.tensor(t), x)
    scheduler.set_timesteps(timesteps=timesteps)
    for t in timesteps:
        x = scheduler.step(velocity[t], t, x).prev_sample
    torch.testing.assert_close(x, clean, atol=1e-5, rtol=0)


def test_iterations_converge_to_the_solution_of_a_linear_model():
    """v(x) = c x: x_t (cos d - c sin d) = x_s, and the error falls by c tan d with every iteration."""
    turn, c = 0.3, 0.5
    back, start = InverseStepper({40: turn}), torch.ones(1)
    solution, guess, errors = 1 / (math.cos(turn) - c * math.sin(turn)), start, []
    for _ in range(6):
        guess = back(c * guess, torch.tensor(40), guess)
        errors.append(abs(guess.item() - solution))
    assert errors[-1] < 1e-5
    assert errors[2] / errors[1] == pytest.approx(c * math.tan(turn), rel=1e-3)


def test_pure_noise_is_left_out():
    scheduler = CogVideoXDDIMScheduler(**PRESETS["5b"].scheduler)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    assert invertible_timesteps(scheduler) == [799, 599, 399, 199]
    late = CogVideoXDDIMScheduler(**PRESETS["5b"].scheduler | {"timestep_spacing": "leading"})
    late.set_timesteps(5)
    assert invertible_timesteps(late) == [800, 600, 400, 200, 0]


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "guidance"), [("2b", 1.0), ("5b", 3.0), ("1.5-5b", 1.0)])
def test_more_iterations_come_closer(text_pipe, variant, guidance):
    pipe, clean = text_pipe(variant), torch.randn(1, 3, 4, 4, 6)
    errors = [error_of_round_trip(pipe, clean, guidance_scale=guidance, iterations=n) for n in (1, 2, 5)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2]
    assert errors[2] < 0.04


def test_more_steps_come_closer(text_pipe):
    pipe, clean = text_pipe(), torch.randn(1, 3, 4, 4, 6)
    few, many = (error_of_round_trip(pipe, clean, num_inference_steps=n, iterations=1) for n in (4, 20))
    assert many < few / 2


def test_each_step_takes_as_many_predictions_as_asked_for(text_pipe):
    pipe, seen = text_pipe(), []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(int(given["timestep"][0])), with_kwargs=True)
    found = invert(pipe, latents=torch.randn(1, 3, 4, 4, 6), num_inference_steps=4, iterations=2)
    handle.remove()
    assert found.timesteps == [749, 499, 249]
    assert seen == [249, 249, 499, 499, 749, 749]


def test_custom_timesteps(text_pipe):
    found = invert(text_pipe(), latents=torch.randn(1, 3, 4, 4, 6), timesteps=[999, 600, 50])
    assert found.timesteps == [600, 50]


def test_a_video_comes_back(text_pipe):
    """As the mean of the VAE's posterior, which is the most that inversion can reach."""
    pipe, video = text_pipe(), torch.rand(9, 3, 32, 48)
    found = invert(pipe, video=video, height=32, width=48, num_inference_steps=25, iterations=6)
    again = call(pipe, prompt=PROMPT, latents=found.latents, timesteps=found.timesteps, guidance_scale=1.0, output_type="latent")
    with torch.no_grad():
        latents = 0.7 * pipe.vae.encode(video.transpose(0, 1)[None] * 2 - 1).latent_dist.mode()
    assert latents.std() > 0.3
    assert (again - latents.transpose(1, 2)).square().mean().sqrt() < 0.02


@pytest.mark.parametrize("schedule", ["static", "uniform"])
def test_a_long_video_in_windows_comes_back(text_pipe, schedule):
    """33 frames in windows of 17, also where these move from step to step, and with several prompts; not in other windows."""
    pipe, clean = text_pipe(), torch.randn(1, 9, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    windows = {"context": ContextWindows(frames=17, overlap=0, schedule=schedule), "prompt": {0: PROMPT, 16: "a blue square"}}
    found = invert(pipe, latents=clean, iterations=10, num_inference_steps=10, **windows)
    again = {"latents": found.latents, "timesteps": found.timesteps, "guidance_scale": 1.0, "output_type": "latent", "num_frames": 33}
    others = windows | {"context": ContextWindows(frames=17, overlap=0, schedule={"static": "uniform", "uniform": "static"}[schedule])}
    errors = [(call(pipe, **again, **given) - clean).square().mean().sqrt() for given in (windows, others)]
    assert errors[0] < 1e-3 and errors[1] > 4e-3


def test_noise_that_a_way_back_does_not_start_from(text_pipe):
    with pytest.raises(ValueError, match="shuffle_noise=True has no meaning"):
        invert(text_pipe(), latents=torch.zeros(1, 5, 4, 4, 6), context=ContextWindows(frames=9, shuffle_noise=True))


def test_several_videos_of_any_length_and_size(text_pipe):
    """Padded inside, cropped by the call that follows."""
    pipe, videos = text_pipe("1.5-5b"), torch.rand(2, 12, 3, 40, 50)
    prompts = [PROMPT, "a blue square"]
    found = invert(pipe, prompt=prompts, video=videos, height=40, width=50, num_inference_steps=3, iterations=1)
    assert found.latents.shape == (2, 6, 4, 6, 8)
    given = {"prompt": prompts, "num_frames": 12, "height": 40, "width": 50, "guidance_scale": 1.0}
    frames = call(pipe, latents=found.latents, timesteps=found.timesteps, **given)
    assert frames.shape == (2, 12, 3, 40, 50)


def test_a_real_clip_at_full_size(text_pipe, reference):
    frames = read_video(reference / "videos" / "horse.mp4")[0][:9]
    found = invert(text_pipe(), video=frames, height=480, width=720, num_inference_steps=2, iterations=1)
    assert found.latents.shape == (1, 3, 4, 60, 90)
    assert found.latents.isfinite().all()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of video and latents"),
        ({"latents": torch.zeros(1, 3, 4, 4, 6), "video": torch.zeros(9, 3, 32, 48)}, "exactly one of video and latents"),
        ({"latents": torch.zeros(1, 3, 4, 4, 6), "iterations": 0}, "iterations=0 is not possible"),
        ({"latents": torch.zeros(2, 3, 4, 4, 6)}, r"latents of shape \(2, 3, 4, 4, 6\) are not those of 1 video"),
        ({"latents": torch.zeros(1, 3, 5, 4, 6)}, "are not those of 1 video"),
        ({"latents": torch.zeros(1, 3, 4, 4, 6), "timesteps": [999]}, r"timesteps=\[999\] cannot be inverted"),
    ],
)
def test_impossible_requests(text_pipe, options, message):
    with pytest.raises(ValueError, match=message):
        invert(text_pipe(), **options)


@pytest.mark.parametrize("scheduler", [CogVideoXDPMScheduler, StockDDIMScheduler])
def test_other_schedulers_are_refused(text_pipe, scheduler):
    pipe = text_pipe()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"{scheduler.__name__} cannot be inverted: use diffusers_cogvideox.CogVideoXDDIMScheduler"):
        invert(pipe, latents=torch.zeros(1, 3, 4, 4, 6))


def test_models_that_read_an_image_are_refused(loaded):
    pipe = CogVideoXImageToVideoPipeline(**loaded(CogVideoXPipeline, "5b-i2v").components)
    with pytest.raises(ValueError, match="not a text-to-video model"):
        invert(pipe, latents=torch.zeros(1, 3, 4, 4, 6))


@pytest.mark.parametrize("option", ["eta", "generator", "num_frames", "guider", "use_dynamic_cfg"])
def test_arguments_without_meaning_do_not_exist(text_pipe, option):
    with pytest.raises(TypeError, match=option):
        invert(text_pipe(), latents=torch.zeros(1, 3, 4, 4, 6), **{option: 1})
