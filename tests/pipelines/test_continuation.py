"""Continuation: what was given stays to the bit, what comes after is as long as asked for, and the known frames steer the loop."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from diffusers_cogvideox import CogVideoXContinuationPipeline, CogVideoXPipeline
from diffusers_cogvideox.pipelines.conditioning import Condition
from diffusers_cogvideox.pipelines.known import KnownFrames
from diffusers_cogvideox.schedulers.scheduler import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers_cogvideox.video_io import read_video, write_video
from parity import StockDPMScheduler
from pictures import clip, images

SIZE = {"height": 32, "width": 48}


def extend(pipe: Any, video: Any = None, **options: Any) -> Any:
    """Frames of a short continuation: 8 after 9, in one window of 17."""
    defaults = {"num_frames": 8, "window_frames": 17, "num_inference_steps": 2, "max_sequence_length": 7, "output_type": "pt", **SIZE}
    pipe.set_progress_bar_config(disable=True)
    source = clip(9, *SIZE.values()) if video is None else video
    return pipe(source, "a red circle moves right", **{**defaults, "generator": seed(3), **options}).frames


def seed(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def watch(monkeypatch: pytest.MonkeyPatch, pipe: Any) -> list[torch.Tensor]:
    """What the transformer gets at every call, (2B, F, C, H, W)."""
    seen: list[torch.Tensor] = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(pipe.transformer, "forward", lambda **k: seen.append(k["hidden_states"]) or forward(**k))
    return seen


@pytest.fixture
def make(loaded) -> Callable[..., CogVideoXContinuationPipeline]:
    """make(variant="5b", sampler="ddim"): a new pipeline over shared models."""
    return lambda *which: CogVideoXContinuationPipeline(**loaded(CogVideoXContinuationPipeline, *which).components)


@pytest.fixture
def pipe(make) -> CogVideoXContinuationPipeline:
    return make()


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_given_frames_stay_and_new_ones_follow(make, variant, sampler):
    given = clip(11, *SIZE.values())
    frames = extend(make(variant, sampler), given, num_frames=5)
    assert frames.shape == (1, 16, 3, 32, 48)
    torch.testing.assert_close(frames[0, :11], given, rtol=0, atol=1e-6)
    assert (frames[0, 11:] - given[-1]).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize(("given", "count", "overlap", "windows"), [(9, 8, 9, 1), (30, 9, 9, 2), (1, 16, 1, 1), (3, 20, 1, 2)])
def test_any_number_of_frames(monkeypatch, pipe, given, count, overlap, windows):
    calls = watch(monkeypatch, pipe)
    frames = extend(pipe, clip(given, *SIZE.values()), num_frames=count, overlap_frames=overlap)
    assert frames.shape[1] == given + count
    assert len(calls) == windows * 2
    assert {tuple(x.shape) for x in calls} == {(2, 5, 4, 4, 6)}


def test_bytes_come_back_as_they_were(pipe, tmp_path):
    path = write_video(tmp_path / "clip.mp4", (255 * clip(9, *SIZE.values())).byte().movedim(1, -1), 8)
    given = read_video(path)[0]
    made = extend(pipe, path, output_type="np")
    assert np.array_equal(np.rint(made[0, :9] * 255).astype(np.uint8), given)
    pictures = extend(pipe, [images(torch.from_numpy(given).movedim(-1, 1) / 255)], output_type="pil")
    assert all(np.array_equal(np.asarray(picture), frame) for picture, frame in zip(pictures[0], given, strict=False))
    assert len(pictures[0]) == 17


def test_sizes_that_are_no_multiples_of_16(pipe):
    given = clip(9, 40, 50)
    frames = extend(pipe, given, height=40, width=50)
    assert frames.shape == (1, 17, 3, 40, 50)
    torch.testing.assert_close(frames[0, :9], given, rtol=0, atol=1e-6)


def test_the_seed_decides(pipe):
    first, again, other = (extend(pipe, generator=seed(value), eta=0.5, num_frames=10) for value in (1, 1, 2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert (first - other)[:, 9:].abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers' own with this numpy
@pytest.mark.parametrize("scheduler", [StockDPMScheduler, EulerDiscreteScheduler])
def test_diffusers_schedulers(monkeypatch, pipe, scheduler):
    """Euler counts noise in another unit; what the model sees of the known frames is the same."""
    calls = watch(monkeypatch, pipe)
    extend(pipe, num_inference_steps=2)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert extend(pipe, num_inference_steps=2).isfinite().all()
    for ours, theirs in zip(calls[:2], calls[2:], strict=True):
        torch.testing.assert_close(theirs[:, :3], ours[:, :3], rtol=0, atol=5e-3)


def test_several_videos_each_as_if_made_alone(pipe):
    """One source for two prompts, two sources, and the generators of each; windows after the first go on with their own frames."""
    sources = torch.stack([clip(9, *SIZE.values(), value) for value in (1, 2)])
    options = {"num_frames": 12, "num_videos_per_prompt": 2}
    pair = extend(pipe, sources[0], generator=[seed(5), seed(6)], **options)
    for index, value in enumerate((5, 6)):
        alone = extend(pipe, sources[0], generator=seed(value), num_frames=12)
        torch.testing.assert_close(pair[index : index + 1], alone, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="video: 2 were passed for 1 prompt"):
        extend(pipe, sources)


@pytest.mark.parametrize(("options", "count"), [({"zero_unconditional": True}, 1), ({"negative_prompt": "blue"}, 2)])
def test_texts_are_encoded_once_for_all_windows(pipe, options, count):
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    extend(pipe, num_frames=20, num_inference_steps=1, **options)
    handle.remove()
    assert len(calls) == count


def test_an_interrupted_call_stops_for_good(pipe):
    def stop(pipe, *_):
        pipe._interrupt = True
        return {}

    assert extend(pipe, num_frames=30, callback_on_step_end=stop).shape[1] == 9 + 8


def test_parts_of_a_text_to_video_pipeline(loaded):
    text = loaded(CogVideoXPipeline)
    pipe = CogVideoXContinuationPipeline.from_pipe(text)
    assert pipe.transformer is text.transformer
    assert extend(pipe).shape[1] == 17


# --- inside the loop --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "padding"), [("5b", 0), ("1.5-5b", 1)])
def test_known_latents_enter_every_step_at_its_noise(monkeypatch, make, variant, padding):
    """x_t = alpha_t x_0 + sigma_t eps in all frames that are known, the padding in front being the first of them."""
    pipe = make(variant)
    calls = watch(monkeypatch, pipe)
    given = clip(9, *SIZE.values())
    extend(pipe, given, num_inference_steps=4)
    encoded = pipe.vae.encode(2 * given.transpose(0, 1)[None] - 1).latent_dist.mode().transpose(1, 2) * pipe.vae.config.scaling_factor
    clean = torch.cat([encoded[:, :1]] * padding + [encoded], dim=1)
    noise = calls[0][:1, : 3 + padding]  # at timestep 999 there is nothing else
    for x, t in zip(calls, (999, 749, 499, 249), strict=True):
        abar = pipe.scheduler.alphas_cumprod[t].item()
        torch.testing.assert_close(x[:1, : 3 + padding], abar**0.5 * clean + (1 - abar) ** 0.5 * noise, rtol=0, atol=1e-5)


def test_an_image_model_gets_the_first_known_frame(monkeypatch, make):
    pipe = make("5b-i2v")
    calls = watch(monkeypatch, pipe)
    given = clip(9, *SIZE.values())
    extend(pipe, given)
    extend(pipe, given, overlap_frames=9)
    posteriors = [pipe.vae.encode(2 * given[index].unsqueeze(1)[None] - 1).latent_dist for index in (8, 0)]
    for x, posterior in zip((calls[0], calls[2]), posteriors, strict=True):
        expected, spread = (part.transpose(1, 2)[0] * pipe.vae.config.scaling_factor for part in (posterior.mean, posterior.std))
        assert ((x[0, :1, 4:] - expected).abs() <= 5 * spread).all()  # a sample of the posterior, as in image-to-video
        assert (x[0, 1:, 4:] == 0).all()


@pytest.mark.parametrize("scheduler", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
def test_known_frames_end_clean_whatever_the_model_says(scheduler):
    clean, noise, latents = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.randn(2, 5, 4, 2, 2)
    condition = Condition(latents=latents, known=KnownFrames(clean=clean, noise=noise, scheduler=scheduler(rescale_betas_zero_snr=True)))
    start, end = condition.hold(latents, torch.tensor(999)), condition.hold(latents, None)
    torch.testing.assert_close(start, torch.cat([noise, latents[:, 3:]], dim=1))
    torch.testing.assert_close(end, torch.cat([clean, latents[:, 3:]], dim=1), rtol=0, atol=0)
    assert Condition(latents=latents).hold(latents, None) is latents


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"known frames \(1, 3, 4, 2, 2\) and their noise \(1, 2, 4, 2, 2\)"):
        KnownFrames(clean=torch.zeros(1, 3, 4, 2, 2), noise=torch.zeros(1, 2, 4, 2, 2), scheduler=None)


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "leaves nothing new in window_frames=17": {"overlap_frames": 17},
    "more than the 9 frame": {"overlap_frames": 17, "window_frames": 25},
    "window_frames=12 cannot be decoded exactly: it must be 8k\\+1": {"window_frames": 12},
    "overlap_frames=0 cannot be decoded exactly": {"overlap_frames": 0},
    "window_frames=0 cannot be decoded exactly": {"window_frames": 0},
    "size 8x48": {"height": 8},
    "output_type='latent' is not possible": {"output_type": "latent"},
    "num_frames=0 is not possible": {"num_frames": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_anything_runs(monkeypatch, pipe, message):
    calls = watch(monkeypatch, pipe)
    with pytest.raises(ValueError, match=message):
        extend(pipe, **REFUSED[message])
    assert not calls


def test_other_models_are_refused(loaded):
    pipe = CogVideoXContinuationPipeline(**loaded(CogVideoXPipeline, "fun-inp").components)
    with pytest.raises(ValueError, match=r"not a text-to-video model\. Use CogVideoXFunInpaintPipeline"):
        extend(pipe)
