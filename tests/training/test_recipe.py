"""The shipped recipes, from nothing to a pipeline that makes a video: every file in examples/shapes, with one step each."""

from pathlib import Path

import pytest
import torch

from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "shapes"


def train(name: str, output: Path, *flags: str, frames: int = 9) -> None:
    """`cogvideox train` on a shipped file, for one step."""
    stages = f'[{{"steps": 1, "batch_size": 1, "frames": {frames}}}]'
    assert main(["train", str(RECIPES / f"{name}.yaml"), "--output", str(output), "--stages", stages, *flags]) == 0


def test_recipes_make_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("vae", tmp_path / "vae", "--data.objects", "[1]")
    train("text_encoder", tmp_path / "text", "--data.objects", "[1]")
    parts = ["--vae", str(tmp_path / "vae" / "final"), "--text_encoder", str(tmp_path / "text" / "final")]
    train("transformer", tmp_path / "transformer", *parts, "--data.clips", "1")
    assert "curves.png" in capsys.readouterr().out

    folder = tmp_path / "transformer" / "pipeline"
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 24 * 2**20
    pipe = CogVideoXPipeline.from_pretrained(folder)
    frames = pipe("a red circle moves right", num_frames=9, num_inference_steps=1, output_type="pt").frames
    assert frames.shape == (1, 9, 3, 64, 64) and torch.isfinite(frames).all()


def test_every_recipe_is_trained_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {"vae", "text_encoder", "transformer"}
