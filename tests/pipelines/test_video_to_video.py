"""Video to video: the same video as diffusers where it makes one, exactly as many frames as there were, and what strength does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging

from diffusers_cogvideox import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXVideoToVideoPipeline, shifted_config
from diffusers_cogvideox.pipelines.video_to_video import skipped_steps
from diffusers_cogvideox.video_io import read_video, write_video
from parity import StockPipeline, StockVideoToVideoPipeline, narrow
from pictures import clip, images

STEPS = 10  # divides 1000: on other grids diffusers' own schedulers miss the timesteps


def call(pipe: Any, **options: Any) -> torch.Tensor:
    """Frames of a short call with fixed noise."""
    defaults = {"prompt": "a red circle moves right", "height": 32, "width": 48, "num_inference_steps": STEPS, "max_sequence_length": 7}
    pipe.set_progress_bar_config(disable=True)
    if "latents" not in options:
        defaults["video"] = images(clip(9, 32, 48))
    return pipe(**{**defaults, "output_type": "pt", "generator": seeds(3)[0], **options}).frames


def latents(pipe: Any, **options: Any) -> torch.Tensor:
    return call(pipe, **{"output_type": "latent", "num_inference_steps": 2, "strength": 0.5, **options})


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


@pytest.fixture
def make(loaded) -> Callable[..., Any]:
    """make(class, variant, sampler): a new pipeline over shared models."""
    return lambda cls, *which: cls(**loaded(cls, *which).components)


@pytest.fixture
def pipe(make) -> CogVideoXVideoToVideoPipeline:
    return make(CogVideoXVideoToVideoPipeline)


# --- as diffusers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_same_video_from_the_same_seed(make, variant: str, sampler: str):
    ours, stock = (make(cls, variant, sampler) for cls in (CogVideoXVideoToVideoPipeline, StockVideoToVideoPipeline))
    for options in (
        {"video": images(clip(9, 40, 50))},
        {"strength": 0.35, "use_dynamic_cfg": True, "video": [images(clip(9, 32, 48, seed)) for seed in (1, 2)], "prompt": ["red", "blue"]},
        {"strength": 1.0, "num_inference_steps": 4, "guidance_scale": 1.0, "video": clip(1, 32, 48)},
    ):
        runs = [call(p, **options) for p in (ours, stock)]
        assert runs[1].std() > 0.1
        torch.testing.assert_close(*runs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_version_1_5_is_diffusers_loop_over_a_padded_video(make, sampler: str):
    """Diffusers pads nothing, but its loop can be given the noised latents with the first frame repeated in front."""
    ours, stock = (make(cls, "1.5-5b", sampler) for cls in (CogVideoXVideoToVideoPipeline, StockVideoToVideoPipeline))
    video, generator = clip(25, 32, 48), seeds(3)[0]
    with torch.no_grad():
        clean = 0.7 * stock.vae.encode((2 * video - 1).transpose(0, 1)[None]).latent_dist.sample(generator).transpose(1, 2)
    padded = torch.cat([clean[:, :1], clean], dim=1)
    stock.scheduler.set_timesteps(STEPS)
    noised = stock.scheduler.add_noise(padded, torch.randn(padded.shape, generator=generator), stock.scheduler.timesteps[2:3])
    expected = call(stock, latents=noised, generator=generator, output_type="latent")[:, 1:]
    with torch.no_grad():
        expected = StockPipeline(**stock.components).decode_latents(expected).transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(call(ours, video=video), expected.clamp(0, 1), atol=1e-3, rtol=0)
    if sampler == "ddim":  # which draws nothing more
        torch.testing.assert_close(call(ours, latents=noised), expected.clamp(0, 1), atol=1e-3, rtol=0)


def test_latents_with_their_noise_in_place_of_a_video(make):
    ours, stock = (make(cls) for cls in (CogVideoXVideoToVideoPipeline, StockVideoToVideoPipeline))
    noised = torch.randn(1, 3, 4, 4, 6)
    torch.testing.assert_close(call(ours, latents=noised), call(stock, latents=noised), atol=1e-3, rtol=0)


# --- the source -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["5b", "1.5-5b"])
@pytest.mark.parametrize("size", [(1, 32, 48), (5, 32, 48), (8, 40, 50), (13, 48, 32)])
def test_as_many_frames_and_pixels_come_out(make, variant: str, size: tuple[int, int, int]):
    frames, height, width = size
    video = call(make(CogVideoXVideoToVideoPipeline, variant), video=clip(*size), height=height, width=width)
    assert video.shape == (1, frames, 3, height, width)
    assert video.isfinite().all()


def test_a_file_is_its_frames(pipe, tmp_path):
    path = write_video(tmp_path / "clip.mp4", (clip(9, 32, 48) * 255).byte().movedim(1, -1), 8)
    torch.testing.assert_close(latents(pipe, video=path), latents(pipe, video=read_video(path)[0]))
    both = latents(pipe, video=[path, path], prompt=["red", "blue"])
    assert len(both) == 2


def test_what_was_padded_is_the_last_frame(pipe):
    video = clip(9, 32, 48)
    shorter = torch.cat([video[:7], video[6:7].expand(2, -1, -1, -1)])
    torch.testing.assert_close(call(pipe, video=video[:7]), call(pipe, video=shorter)[:, :7])


@pytest.mark.parametrize("variant", ["5b", "1.5-5b"])
def test_each_video_of_a_batch_is_what_it_would_be_alone(make, variant: str):
    pipe, prompts, clips = make(CogVideoXVideoToVideoPipeline, variant), ["red", "blue"], [clip(9, 32, 48, seed) for seed in (1, 2)]
    for videos in (clips, clips[0]):
        together = latents(pipe, prompt=prompts, video=videos, num_videos_per_prompt=2, generator=seeds(1, 2, 3, 4))
        assert together.shape == (4, 3, 4, 4, 6)  # without the padding frame of 1.5
        for position in range(4):
            video = videos[position // 2] if isinstance(videos, list) else videos
            alone = latents(pipe, prompt=prompts[position // 2], video=video, generator=seeds(position + 1))
            torch.testing.assert_close(together[position], alone[0], atol=1e-4, rtol=0)


def test_fit_reaches_the_video(pipe):
    wide = clip(9, 32, 96)
    torch.testing.assert_close(latents(pipe, video=wide, fit="cover"), latents(pipe, video=wide[..., 24:72]))


# --- strength ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "steps", "skipped"), [(0.8, 50, 10), (1.0, 50, 0), (0.02, 50, 49), (0.35, 10, 7), (0.999, 4, 1)])
def test_strength_is_the_share_of_the_steps(pipe, strength: float, steps: int, skipped: int):
    assert skipped_steps(strength, steps) == skipped
    seen = []

    def note(_, step, timestep, tensors):
        seen.append(int(timestep))

    latents(pipe, strength=strength, num_inference_steps=steps, callback_on_step_end=note)
    assert seen == pipe.scheduler.timesteps.tolist()[skipped:]
    assert pipe.num_timesteps == steps - skipped


@pytest.mark.parametrize("steps", [1, 3, 28, 49, 50, 999])
def test_the_least_strength_that_the_error_names_is_enough(steps: int):
    with pytest.raises(ValueError, match=f"leaves none of {steps} steps: use at least") as error:
        skipped_steps(0.5 / steps, steps)
    least = float(str(error.value).split("at least ")[1].split(",")[0])
    assert skipped_steps(least, steps) == steps - 1


def test_from_full_noise_nothing_of_the_video_is_left(pipe):
    """Zero terminal SNR: the first timestep knows nothing of the video. From later ones on, something stays."""
    videos = [clip(9, 32, 48, seed) for seed in (1, 2)]
    torch.testing.assert_close(*(latents(pipe, video=video, strength=1) for video in videos), atol=1e-5, rtol=0)
    first, second = (latents(pipe, video=video, strength=0.5) for video in videos)
    assert not torch.allclose(first, second, atol=0.1)


def test_custom_timesteps_are_counted(pipe):
    seen = []

    def note(_, step, timestep, tensors):
        seen.append(int(timestep))

    latents(pipe, timesteps=[999, 700, 400, 100], callback_on_step_end=note)
    assert seen == [400, 100]


def test_another_scheduler_of_diffusers_makes_the_same_video(pipe):
    expected = latents(pipe, num_inference_steps=STEPS)
    pipe.scheduler = DDIMScheduler.from_config(shifted_config(pipe.scheduler.config))
    torch.testing.assert_close(latents(pipe, num_inference_steps=STEPS), expected, atol=1e-3, rtol=0)


# --- with the other pipelines, and errors -----------------------------------------------------------------------------


def test_components_move_between_the_pipelines(pipe):
    plain = CogVideoXPipeline.from_pipe(pipe)
    assert plain.transformer is pipe.transformer
    torch.testing.assert_close(latents(CogVideoXVideoToVideoPipeline.from_pipe(plain)), latents(pipe))
    with pytest.raises(ValueError, match=r"not an image-to-video model. Use CogVideoXPipeline or CogVideoXVideoToVideoPipeline"):
        CogVideoXImageToVideoPipeline.from_pipe(pipe)(images(clip(1, 32, 48))[0], "a")


def test_guidance_without_effect_is_reported_once(pipe, caplog):
    logging.enable_propagation()
    latents(pipe, guidance_scale=1, negative_prompt="blue")
    logging.disable_propagation()
    assert sum("turns guidance off" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.01}, "strength=0.01 leaves none of 2 steps: use at least 0.5"),
        ({"strength": 0}, "strength=0 leaves none"),
        ({"strength": 1.2}, "strength=1.2 is not possible: it must be between 0"),
        ({"strength": float("nan")}, "strength=nan is not possible"),
        ({"video": None}, "exactly one of video and latents"),
        ({"video": clip(9, 32, 48), "latents": torch.randn(1, 3, 4, 4, 6)}, "exactly one of video and latents"),
        ({"latents": torch.randn(1, 3, 4, 4, 7)}, r"\(1, 3, 4, 4, 7\).*need \(1, 3, 4, 4, 6\)"),
        ({"latents": torch.randn(1, 3, 4, 4, 6), "fit": "cover"}, "fit='cover' has no effect on latents"),
        ({"latents": torch.randn(3, 4, 4, 6)}, r"latents .*not \(3, 4, 4, 6\)"),
        ({"video": [clip(9, 32, 48)] * 2}, r"video: 2 were passed for 1 prompt\(s\)"),
        ({"video": clip(10, 32, 48)}, "num_frames=10 cannot be decoded exactly"),
        ({"height": 10**6, "video": clip(9, 32, 48)}, "size 1000000x48"),
    ],
)
def test_impossible_arguments(pipe, options, message: str):
    """All of them with latents as the result, which cannot be cropped."""

    def fail(*_):
        raise AssertionError("the transformer ran")

    handle = pipe.transformer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match=message):
            latents(pipe, **options)
    finally:
        handle.remove()


def test_a_video_needs_the_vae(pipe):
    with pytest.raises(ValueError, match=r"no vae: load it with one\."):
        latents(CogVideoXVideoToVideoPipeline(**{**pipe.components, "vae": None}))


def test_latents_need_no_vae(pipe):
    noised = torch.randn(1, 3, 4, 4, 6)
    without = CogVideoXVideoToVideoPipeline(**{**pipe.components, "vae": None})
    torch.testing.assert_close(latents(without, latents=noised), latents(pipe, latents=noised))


# --- real clips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "output_type", "shape"), [("horse", "pt", (1, 9, 3, 480, 720)), ("kitten", "latent", (1, 3, 4, 60, 90))])
def test_a_real_clip_at_full_size(pipe, reference, name: str, output_type: str, shape: tuple[int, ...]):
    frames = read_video(reference / "videos" / f"{name}.mp4")[0][:9]
    pipe.vae = narrow(pipe.vae)
    size = {"height": 480, "width": 720}
    found = call(pipe, video=frames, num_inference_steps=2, strength=0.5, guidance_scale=1, output_type=output_type, **size)
    assert found.shape == shape
    assert found.isfinite().all()
    assert found.std() > 0.05
