"""Fun Control: where diffusers' pipeline fails, and ours does what it was asked."""

import pytest
import torch

from diffusers_cogvideox import CogVideoXFunControlPipeline
from parity import StockDPMScheduler, StockFunControlPipeline
from pictures import clip, images

SIZE = {"height": 16, "width": 32, "num_inference_steps": 2, "max_sequence_length": 7, "output_type": "pt", "guidance_scale": 1}
VIDEO = images(clip(9, 16, 32))


@pytest.fixture
def pipes(loaded):
    """pipes(variant="fun-control"): our pipeline and diffusers'."""

    def both(variant="fun-control"):
        found = [cls(**loaded(cls, variant).components) for cls in (CogVideoXFunControlPipeline, StockFunControlPipeline)]
        for pipe in found:
            pipe.set_progress_bar_config(disable=True)
        return found

    return both


def test_d23_the_recommended_lengths_of_1_5(pipes):
    """8k + 1 frames have an odd number of latent frames; so have the 49 and 81 that the models were trained on."""
    ours, stock = pipes("fun-1.5-control")
    with pytest.raises(ValueError, match="must be divisible by `patch_size_t=2`"):
        stock("a red circle", control_video=VIDEO, **SIZE)
    assert ours("a red circle", control_video=VIDEO, **SIZE).frames.shape[1] == 9


def test_d29_control_video_latents(pipes):
    ours, stock = pipes()
    latents = ours.encode_control_video(VIDEO, 16, 32)
    for layout in (latents, latents.transpose(1, 2)):
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
            stock("a red circle", control_video_latents=layout, **SIZE)
    noise = {"latents": torch.randn(1, 3, 4, 2, 4)}
    video = ours("a red circle", control_video_latents=latents, **noise, **SIZE).frames
    torch.testing.assert_close(video, stock("a red circle", control_video=VIDEO, **noise, **SIZE).frames, atol=1e-3, rtol=0)


def test_several_prompts_for_one_control_video(pipes):
    ours, stock = pipes()
    with pytest.raises(RuntimeError, match="must match"):
        stock(["a red circle", "a green square"], control_video=VIDEO, **SIZE)
    assert len(ours(["a red circle", "a green square"], control_video=VIDEO, **SIZE).frames) == 2


def test_the_dpm_scheduler(pipes):
    ours, stock = pipes()
    for pipe in (ours, stock):
        pipe.scheduler = StockDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(TypeError, match=r"step\(\) missing 2 required positional arguments"):
        stock("a red circle", control_video=VIDEO, **SIZE)
    assert ours("a red circle", control_video=VIDEO, **SIZE).frames.isfinite().all()
