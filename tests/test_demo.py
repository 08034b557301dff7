"""The shipped model: whole, small, shows what a prompt says, and is the same model to diffusers' own classes."""

from pathlib import Path

import pytest
import torch

from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.cli import main
from diffusers_cogvideox.data.captions import parse
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.evaluation.detectors import detect, score
from diffusers_cogvideox.video_io import read_video
from parity import StockDPMScheduler, StockPipeline

PROMPT = "a red circle moves right"


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in demo_model().rglob("*") if file.is_file()) < 24 * 2**20


def test_the_command_makes_a_video_of_the_prompt(tmp_path: Path) -> None:
    video = tmp_path / "demo.mp4"
    assert main(["generate", PROMPT, "--output", str(video)]) == 0
    frames, fps = read_video(video)
    assert (frames.shape, fps) == ((17, 64, 64, 3), 8)
    assert all(score(detect(frames), parse(PROMPT)).values())


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_stock_makes_the_same_video_from_it(sampler: str) -> None:
    def video(cls: type) -> torch.Tensor:
        pipe = cls.from_pretrained(demo_model(), dtype=torch.float32)
        if sampler == "dpm":
            pipe.scheduler = StockDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            PROMPT,
            height=64,
            width=64,
            num_frames=9,
            num_inference_steps=5,
            max_sequence_length=28,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).frames

    torch.testing.assert_close(video(CogVideoXPipeline), video(StockPipeline), atol=1e-3, rtol=0)
