"""Video to video: where diffusers' pipeline fails or returns something else, and ours does what it was asked."""

from typing import Any

import pytest
import torch

from diffusers_cogvideox import CogVideoXVideoToVideoPipeline
from parity import StockVideoToVideoPipeline
from pictures import clip, images

SHORT = {"height": 32, "width": 48, "num_inference_steps": 10, "max_sequence_length": 7, "guidance_scale": 1, "output_type": "pt"}


@pytest.fixture
def pipes(loaded):
    """pipes(variant="5b"): our pipeline and diffusers'."""

    def both(variant="5b"):
        found = [cls(**loaded(cls, variant).components) for cls in (CogVideoXVideoToVideoPipeline, StockVideoToVideoPipeline)]
        for pipe in found:
            pipe.set_progress_bar_config(disable=True)
        return found

    return both


def call(pipe: Any, frames: int, **options: Any) -> torch.Tensor:
    size = {name: options.get(name, SHORT[name]) for name in ("height", "width")}
    defaults = {"video": images(clip(frames, *size.values())), "prompt": "a red circle", "generator": torch.Generator().manual_seed(3)}
    return pipe(**{**defaults, **SHORT, **options}).frames


@pytest.mark.parametrize("frames", [9, 17])
def test_d23_version_1_5_with_the_lengths_it_was_trained_on(pipes, frames: int):
    """8k + 1 frames have an odd number of latent frames; so have the 49 and 81 that the models were trained on."""
    ours, stock = pipes("1.5-5b")
    with pytest.raises(ValueError, match="must be divisible by `patch_size_t=2`"):
        call(stock, frames)
    assert call(ours, frames).shape[1] == frames


def test_d30_strength_that_leaves_no_step(pipes):
    ours, stock = pipes()
    with pytest.raises(RuntimeError, match="stack expects a non-empty TensorList"):
        call(stock, 9, strength=0.05)
    with pytest.raises(ValueError, match=r"strength=0.05 leaves none of 10 steps: use at least 0.1"):
        call(ours, 9, strength=0.05)


def test_d22_number_of_frames(pipes):
    ours, stock = pipes()
    for frames, returned in ((10, 9), (13, 16), (5, 8)):
        assert call(stock, frames).shape[1] == returned
        assert call(ours, frames).shape[1] == frames


def test_v8_multiples_of_four_frames(pipes):
    """Diffusers encodes 8 frames as 4 pairs of pairs: no latent frame holds the first frame alone, as they do in all training videos."""
    ours, stock = pipes()
    frames = clip(8, 32, 48)
    longer = torch.cat([frames, frames[-1:]])
    torch.testing.assert_close(call(ours, 8), call(ours, 9, video=longer)[:, :8])
    torch.testing.assert_close(call(ours, 8), call(stock, 9, video=longer)[:, :8], atol=1e-3, rtol=0)
    assert not torch.allclose(call(stock, 8), call(stock, 9, video=longer)[:, :8], atol=0.1)


def test_d25_version_1_5_above_the_size_of_its_config(pipes):
    ours, stock = pipes("1.5-5b")
    tall = {"height": 176, "width": 32, "strength": 0.2}  # 22 latents for a grid of 20
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        call(stock, 8, **tall)
    assert call(ours, 8, **tall).shape == (1, 8, 3, 176, 32)


def test_d28_one_video_for_several_prompts(pipes):
    ours, stock = pipes()
    prompts = ["a red circle", "a green square"]
    latents = call(ours, 9, prompt=prompts, output_type="latent")
    assert not torch.allclose(latents[0], latents[1], atol=0.1)
    with pytest.raises(IndexError):
        call(stock, 9, prompt=prompts, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])
    assert len(call(ours, 9, prompt=prompts, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)])) == 2
