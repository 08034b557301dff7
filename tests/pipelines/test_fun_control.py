"""Control video: the same video as diffusers where diffusers works, and what only works here."""

import numpy as np
import pytest
import torch

from diffusers_cogvideox import CogVideoXDPMScheduler, CogVideoXFunControlPipeline, ContextWindows
from parity import StockDPMScheduler, StockFunControlPipeline
from pictures import clip, images
from tiny_pipeline import call

HEIGHT, WIDTH = 16, 32
VIDEO, OTHER = clip(9, HEIGHT, WIDTH), clip(9, HEIGHT, WIDTH, seed=1)


@pytest.fixture
def pipe(loaded) -> CogVideoXFunControlPipeline:
    return CogVideoXFunControlPipeline(**loaded(CogVideoXFunControlPipeline, "fun-control").components)


@pytest.fixture
def stock(loaded) -> StockFunControlPipeline:
    return StockFunControlPipeline(**loaded(StockFunControlPipeline, "fun-control").components)


def controlled(pipe, **options) -> torch.Tensor:
    """Frames of a short call; the length is that of the control video."""
    return call(pipe, **{"height": HEIGHT, "width": WIDTH, "num_frames": None, "num_inference_steps": 2} | options)


def stock_video(pipe, **options) -> torch.Tensor:
    """The same from diffusers' pipeline, whose call has no num_frames."""
    pipe.set_progress_bar_config(disable=True)
    size = {"prompt": "a red circle moves right", "height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "max_sequence_length": 7}
    return pipe(**size | {"generator": torch.Generator().manual_seed(3), "output_type": "pt"} | options).frames


def model_inputs(pipe, **options) -> list[torch.Tensor]:
    """Extra channels (B, f, C, h, w) that the transformer sees at each step."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, __, k: seen.append(k["hidden_states"][:, :, 4:]), with_kwargs=True)
    controlled(pipe, output_type="latent", guidance_scale=1, **options)
    hook.remove()
    return seen


# --- against diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"control_video": images(VIDEO)},
        {"control_video": [VIDEO], "guidance_scale": 1.0, "output_type": "latent"},
        {"control_video": [VIDEO], "use_dynamic_cfg": True, "num_inference_steps": 10},
        {"control_video": [VIDEO, OTHER], "prompt": ["a red circle", "a green square"], "negative_prompt": ["blue", "black"]},
        {"control_video": images(clip(17, 32, 48)), "height": 32, "width": 16},
    ],
    ids=["images", "tensor without guidance", "dynamic guidance", "two videos", "resized"],
)
def test_same_video_from_the_same_seed(pipe, stock, options):
    expected = stock_video(stock, **options)
    assert expected.std() > 0.1
    torch.testing.assert_close(controlled(pipe, **options), expected, atol=1e-3, rtol=0)


def test_same_video_with_the_other_sampler(pipe, stock):
    """Diffusers' pipeline cannot call its own DPM scheduler; with ours, whose `step` is ordinary, it can."""
    pipe.scheduler = StockDPMScheduler.from_config(pipe.scheduler.config)
    stock.scheduler = CogVideoXDPMScheduler.from_config(stock.scheduler.config)
    options = {"control_video": images(VIDEO), "num_inference_steps": 4}
    torch.testing.assert_close(controlled(pipe, **options), stock_video(stock, **options), atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_same_latents_with_1_5(loaded, sampler):
    """Diffusers takes lengths of whole patches only: 13 frames, of which ours is given the first 9."""
    pipe, stock = (cls(**loaded(cls, "fun-1.5-control").components) for cls in (CogVideoXFunControlPipeline, StockFunControlPipeline))
    if sampler == "dpm":
        for each in (pipe, stock):
            each.scheduler = CogVideoXDPMScheduler.from_config(each.scheduler.config)
    held = images(torch.cat([VIDEO, VIDEO[-1:].expand(4, -1, -1, -1)]))
    expected = stock_video(stock, control_video=held, output_type="latent")
    assert expected.shape[1] == 4
    latents = controlled(pipe, control_video=images(VIDEO), output_type="latent")
    torch.testing.assert_close(latents, expected[:, :3], atol=1e-3, rtol=0)


# --- control_video_latents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["fun-control", "fun-1.5-control"])
def test_latents_in_place_of_the_video(loaded, variant):
    pipe = loaded(CogVideoXFunControlPipeline, variant)
    latents = pipe.encode_control_video(VIDEO, HEIGHT, WIDTH)
    assert latents.shape == (1, 4 if "1.5" in variant else 3, 4, 2, 4)
    expected = controlled(pipe, control_video=VIDEO)
    torch.testing.assert_close(controlled(pipe, control_video_latents=latents), expected)
    torch.testing.assert_close(controlled(pipe, control_video_latents=latents, num_frames=7), expected[:, :7])


def test_latents_need_no_vae(pipe):
    latents = pipe.encode_control_video(VIDEO, HEIGHT, WIDTH)
    expected = controlled(pipe, control_video_latents=latents, output_type="latent")
    alone = CogVideoXFunControlPipeline(**pipe.components | {"vae": None})
    torch.testing.assert_close(controlled(alone, control_video_latents=latents, output_type="latent"), expected)
    with pytest.raises(ValueError, match=r"no vae: .*pass control_video_latents"):
        controlled(alone, control_video=VIDEO, output_type="latent")


# --- strength, start, end, length -------------------------------------------------------------------------------------


def test_strength_is_a_factor(pipe):
    latents = pipe.encode_control_video(VIDEO, HEIGHT, WIDTH)
    for strength in (0, 0.5, 2):
        (seen,) = model_inputs(pipe, control_video=VIDEO, control_strength=strength, num_inference_steps=1)
        torch.testing.assert_close(seen, strength * latents)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"control_start": 0.4}, [2, 3, 4]),
        ({"control_end": 0.6}, [0, 1, 2]),
        ({"control_start": 0.2, "control_end": 0.4}, [1]),
        ({"timesteps": [999, 499], "control_end": 0.5}, [0]),
    ],
    ids=str,
)
def test_control_is_seen_between_start_and_end(pipe, options, steps):
    latents = pipe.encode_control_video(VIDEO, HEIGHT, WIDTH)
    seen = model_inputs(pipe, control_video=VIDEO, **{"num_inference_steps": 5} | options)
    for step, extra in enumerate(seen):
        torch.testing.assert_close(extra, latents if step in steps else torch.zeros_like(latents))


def test_the_beginning_of_a_longer_video(pipe):
    longer = torch.cat([VIDEO, OTHER])
    torch.testing.assert_close(controlled(pipe, control_video=longer, num_frames=9), controlled(pipe, control_video=VIDEO))


def test_frames_and_pixels_that_do_not_fit_are_continued(pipe):
    """Behind 4 frames of 16x30 the model sees 5 more like the last, and the columns at the edges twice."""
    held = torch.cat([VIDEO[:4], VIDEO[3:4].expand(5, -1, -1, -1)])
    held = torch.cat([held[..., :1], held[..., :30], held[..., 29:30]], dim=-1)
    found = controlled(pipe, control_video=VIDEO[:4, ..., :30], width=30)
    torch.testing.assert_close(found, controlled(pipe, control_video=held)[:, :4, ..., 1:31])


def test_context_windows_see_their_part_of_the_control(loaded):
    """At the end 1.5 is padded, for windows as for the whole: 41 frames are 11 latent frames, and one more."""
    for variant, total in (("fun-control", 11), ("fun-1.5-control", 12)):
        pipe, video, context = loaded(CogVideoXFunControlPipeline, variant), clip(41, HEIGHT, WIDTH), ContextWindows(frames=17)
        latents = pipe.encode_control_video(video, HEIGHT, WIDTH)
        assert latents.shape[1] == total
        seen = model_inputs(pipe, control_video=video, context=context, control_end=0.5)
        windows = [context.over(total, pipe.geometry).at(step) for step in range(2)]
        expected = [latents[:, window.frames] for window in windows[0]] + [torch.zeros_like(latents[:, w.frames]) for w in windows[1]]
        torch.testing.assert_close(seen, expected)
        assert controlled(pipe, control_video=video, context=context).shape[1] == 41


def test_one_control_video_for_several_prompts(pipe):
    prompts, noise = ["a red circle", "a green square"], torch.randn(2, 3, 4, 2, 4)
    together = controlled(pipe, prompt=prompts, control_video=VIDEO, latents=noise)
    alone = [controlled(pipe, prompt=prompt, control_video=VIDEO, latents=noise[i : i + 1]) for i, prompt in enumerate(prompts)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of control_video and control_video_latents"),
        ({"control_video": VIDEO, "control_video_latents": torch.zeros(1, 3, 4, 2, 4)}, "exactly one"),
        ({"control_video_latents": torch.zeros(3, 4, 2, 4)}, r"must be of shape .*not \(3, 4, 2, 4\)"),
        ({"control_video_latents": torch.zeros(1, 3, 5, 2, 4)}, r"\(1, 3, 5, 2, 4\), but .* needs \(1, 3, 4, 2, 4\).*encode_control_video"),
        ({"control_video_latents": torch.zeros(1, 4, 4, 2, 4)}, r"\(1, 4, 4, 2, 4\), but .* needs \(1, 5, 4, 2, 4\)"),
        ({"control_video": VIDEO, "num_frames": 10}, "num_frames=10 is more than the 9 frames of the control video"),
        ({"control_video": VIDEO, "num_frames": 0}, "num_frames=0 is not possible"),
        ({"control_video": VIDEO, "control_strength": -1}, "control_strength=-1"),
        ({"control_video": VIDEO, "control_strength": float("nan")}, "control_strength=nan"),
        (
            {"control_video": VIDEO, "control_start": 0.5, "control_end": 0.5},
            r"control_end\)=\(0.5, 0.5\) is not possible",
        ),
        ({"control_video": VIDEO, "control_end": 1.5}, "0 <= start < stop <= 1"),
        (
            {"control_video": VIDEO, "control_start": 0.1, "control_end": 0.2},
            r"\(0.1, 0.2\) holds none of 2 steps: .* at least 0.5 wide",
        ),
        ({"control_video": torch.stack([VIDEO, OTHER])}, "control_video: 2 were passed for 1 prompt"),
        ({"control_video": VIDEO, "height": 0}, "0x32 .* is not possible"),
        ({"control_video": VIDEO, "fit": "squeeze"}, "fit='squeeze'"),
        ({"control_video_latents": torch.zeros(1, 3, 4, 2, 4), "fit": "cover"}, "fit='cover' has no effect on control_video_latents"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_arguments(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        controlled(pipe, **options)


def test_no_size_is_replaced_by_the_default(pipe):
    with pytest.raises(ValueError, match=r"0x32 .* is not possible"):
        pipe.encode_control_video(VIDEO, 0, WIDTH)


def test_models_of_other_tasks(loaded):
    other = CogVideoXFunControlPipeline(**loaded(CogVideoXFunControlPipeline, "fun-inp").components)
    with pytest.raises(ValueError, match=r"not a control model\. Use CogVideoXFunInpaintPipeline"):
        controlled(other, control_video=np.zeros((9, HEIGHT, WIDTH, 3), dtype=np.uint8))
