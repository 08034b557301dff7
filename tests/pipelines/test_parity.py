"""The same video as diffusers from the same seed, and the two packages' components in each other's pipelines."""

import numpy as np
import pytest
import torch

from diffusers_cogvideox import CogVideoXDPMScheduler, CogVideoXPipeline
from parity import StockDPMScheduler, StockPipeline
from tiny_pipeline import call

STEPS = 4  # divides 1000: on other grids diffusers' own schedulers miss the timesteps


def assert_same_video(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b"])
def test_same_video_from_the_same_seed(loaded, variant: str, sampler: str):
    ours, stock = loaded(CogVideoXPipeline, variant, sampler), loaded(StockPipeline, variant, sampler)
    for options in ({}, {"use_dynamic_cfg": True, "num_inference_steps": 10}):
        options = {"num_inference_steps": STEPS, **options}
        assert_same_video(call(ours, **options), call(stock, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 3.5, "negative_prompt": "blue square"},
        {"prompt": ["a red circle", "a green square"], "negative_prompt": ["blue", "black"]},
        {"prompt": ["a red circle", "a green square"], "generator": [torch.Generator().manual_seed(s) for s in (1, 2)]},
        {"height": 64, "width": 96, "num_frames": 17},
        {"num_frames": 1},
        {"output_type": "latent"},
        {"latents": torch.randn(1, 3, 4, 4, 6)},
        {"prompt": None, "prompt_embeds": torch.randn(1, 5, 24), "negative_prompt_embeds": torch.randn(1, 5, 24)},
        {"timesteps": [999, 499], "num_inference_steps": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_same_video_for_every_argument(pipe, stock, options):
    def seeded():
        fresh = [torch.Generator().manual_seed(s) for s in (1, 2)]
        return {"num_inference_steps": STEPS, **options} | ({"generator": fresh} if "generator" in options else {})

    if "timesteps" in options:  # diffusers' scheduler takes no timesteps; these two are its own grid of two steps
        ours, theirs = call(pipe, **options), call(stock, num_inference_steps=2)
    else:
        ours, theirs = call(pipe, **seeded()), call(stock, **seeded())
    assert_same_video(ours, theirs)


def test_same_frames_as_images_and_arrays(pipe, stock):
    ours, theirs = (call(p, num_inference_steps=STEPS, output_type="np") for p in (pipe, stock))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    images, expected = (call(p, num_inference_steps=STEPS, output_type="pil") for p in (pipe, stock))
    assert len(images) == 1
    assert len(images[0]) == 9
    assert np.abs(np.array(images[0][4], float) - np.array(expected[0][4], float)).max() <= 1


def test_diffusers_components_in_our_pipeline(loaded):
    theirs = loaded(StockPipeline)
    assert_same_video(call(CogVideoXPipeline(**theirs.components), num_inference_steps=STEPS), call(theirs, num_inference_steps=STEPS))


def test_our_components_in_diffusers_pipeline(pipe, stock):
    assert_same_video(call(StockPipeline(**pipe.components), num_inference_steps=STEPS), call(stock, num_inference_steps=STEPS))


def test_the_line_of_every_tutorial(pipe, stock):
    for p in (pipe, stock):
        p.scheduler = StockDPMScheduler.from_config(p.scheduler.config, timestep_spacing="trailing")
    expected = call(stock, num_inference_steps=STEPS)
    assert_same_video(call(pipe, num_inference_steps=STEPS), expected)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert_same_video(call(pipe, num_inference_steps=STEPS), expected)


def test_diffusers_lora_files(loaded, folders, tmp_path):
    peft = pytest.importorskip("peft")
    stock, ours = (cls.from_pretrained(folders()) for cls in (StockPipeline, CogVideoXPipeline))
    plain = call(ours, num_inference_steps=STEPS)
    stock.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0"], init_lora_weights=False))
    stock.save_lora_weights(tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(stock.transformer))
    stock.unload_lora_weights()
    for pipe in (stock, ours):
        pipe.load_lora_weights(tmp_path)
    for options in ({}, {"attention_kwargs": {"scale": 0.5}}):
        video = call(ours, num_inference_steps=STEPS, **options)
        assert_same_video(video, call(stock, num_inference_steps=STEPS, **options))
        assert not torch.allclose(video, plain, atol=1e-2)
    ours.unload_lora_weights()
    torch.testing.assert_close(call(ours, num_inference_steps=STEPS), plain)


def test_half_precision_is_as_near_to_float32_as_diffusers(folders):
    exact = call(CogVideoXPipeline.from_pretrained(folders()), num_inference_steps=STEPS, output_type="latent")
    errors = []
    for cls in (CogVideoXPipeline, StockPipeline):
        half = cls.from_pretrained(folders(), dtype=torch.bfloat16)
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3))
        latents = call(half, num_inference_steps=STEPS, output_type="latent", latents=noise.bfloat16())
        assert latents.dtype == torch.bfloat16
        errors.append((latents.float() - exact).square().mean().sqrt().item())
    assert errors[0] <= 1.1 * errors[1]
