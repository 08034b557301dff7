"""Image to video: where diffusers' pipeline fails or ignores something, and ours does what it was asked."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from diffusers_cogvideox import CogVideoXImageToVideoPipeline
from diffusers_cogvideox.pipelines.inputs import load_image
from parity import StockImageToVideoPipeline
from pictures import picture
from tiny_pipeline import call

NATIVE = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "latent", "image": picture(64, 96)}
SMALL = NATIVE | {"height": 32, "width": 48, "image": picture(32, 48)}


@pytest.fixture
def pipes(loaded):
    """pipes(variant="5b-i2v"): our pipeline and diffusers', over models of their own."""
    return lambda variant="5b-i2v": [
        cls(**loaded(cls, variant).components) for cls in (CogVideoXImageToVideoPipeline, StockImageToVideoPipeline)
    ]


def first_input(pipe: Any, **options: Any) -> torch.Tensor:
    """What the transformer sees first, (B, F, 2C, H, W), without guidance."""
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    call(pipe, guidance_scale=1, **options)
    handle.remove()
    return seen[0]


def test_d28_one_image_for_several_prompts(pipes):
    ours, stock = pipes()
    prompts = ["a red circle", "a green square"]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        call(stock, prompt=prompts, **NATIVE)
    assert len(call(ours, prompt=prompts, **NATIVE)) == 2


def test_d26_learned_positions_at_another_size(pipes):
    ours, stock = pipes()
    with pytest.raises(ValueError, match="currently not possible to generate videos at a different resolution"):
        call(stock, **SMALL)
    assert call(ours, **SMALL).isfinite().all()


@pytest.mark.parametrize("frames", [1, 17])
def test_d26_learned_positions_at_another_length(pipes, frames: int):
    """Another learned table gives another video, if the table is used."""
    change = {}
    for name, pipe in zip(("ours", "stock"), pipes(), strict=True):
        table = pipe.transformer.patch_embed.pos_embedding
        before, original = call(pipe, num_frames=frames, **NATIVE), table.clone()
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        change[name] = (call(pipe, num_frames=frames, **NATIVE) - before).abs().max()
        table.copy_(original)
    assert change["stock"] == 0
    assert change["ours"] > 0.1


def test_d25_version_1_5_above_the_size_of_its_config(pipes):
    ours, stock = pipes("1.5-5b-i2v")
    tall = SMALL | {"height": 176, "width": 32, "image": picture(176, 32)}  # 22 latents for a grid of 20
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        call(stock, **tall)
    assert call(ours, **tall).shape == (1, 3, 4, 22, 4)


def test_d24_latents_of_version_1_5(pipes):
    ours, stock = pipes("1.5-5b-i2v")
    padded, latents = call(stock, **SMALL), call(ours, **SMALL)
    assert padded.shape[1] == 4
    assert latents.shape[1] == 3
    torch.testing.assert_close(latents, padded[:, 1:], atol=1e-3, rtol=0)


def test_v12_scale_of_the_image_latents(pipes):
    """One of three conventions in diffusers, decided by the VAE's config; all three here."""
    ours, stock = pipes("1.5-5b-i2v")
    for pipe in (ours, stock):
        vae = type(pipe.vae).from_config(pipe.vae.config, invert_scale_latents=True)
        vae.load_state_dict(pipe.vae.state_dict())
        pipe.vae = vae
    theirs = first_input(stock, **SMALL)[:, 0, 4:]
    torch.testing.assert_close(first_input(ours, **SMALL)[:, 0, 4:], theirs)
    torch.testing.assert_close(first_input(ours, image_latent_scaling="raw", **SMALL)[:, 0, 4:], 0.7 * theirs)
    torch.testing.assert_close(first_input(ours, image_latent_scaling="scaled", **SMALL)[:, 0, 4:], 0.49 * theirs)
    with pytest.raises(TypeError, match="unexpected keyword argument 'image_latent_scaling'"):
        call(stock, image_latent_scaling="raw", **SMALL)


def test_d15_several_videos_of_one_image(pipes):
    ours, stock = pipes()
    assert len(call(stock, num_videos_per_prompt=2, **NATIVE)) == 1
    assert len(call(ours, num_videos_per_prompt=2, **NATIVE)) == 2


def test_bytes_in_arrays():
    data = np.array(picture(32, 48))
    assert VideoProcessor().preprocess(data, 32, 48).max() > 100
    torch.testing.assert_close(load_image(data, 32, 48), VideoProcessor().preprocess(picture(32, 48), 32, 48))


def test_tensors_between_minus_one_and_one():
    """Which of two ranges is meant, diffusers tells from a negative value: a bright picture is taken for the other one."""
    bright = torch.rand(3, 32, 48)  # in [-1, 1], as it happens without dark parts
    torch.testing.assert_close(VideoProcessor().preprocess(bright, 32, 48), 2 * bright[None] - 1)
    dark = 2 * bright - 1
    with pytest.warns(FutureWarning):
        torch.testing.assert_close(VideoProcessor().preprocess(dark, 32, 48), dark[None])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        load_image(dark, 32, 48)


def test_images_with_transparency(pipes):
    ours, stock = pipes("1.5-5b-i2v")
    transparent = SMALL | {"image": picture(32, 48).convert("RGBA")}
    with pytest.raises(RuntimeError, match="4 channels"):
        call(stock, **transparent)
    torch.testing.assert_close(call(ours, **transparent), call(ours, **SMALL))
