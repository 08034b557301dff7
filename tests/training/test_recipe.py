"""The shipped recipes, from nothing to a pipeline that makes a video: every file in examples/shapes, with one step each."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_cogvideox import CogVideoXImageToVideoPipeline, CogVideoXPipeline
from diffusers_cogvideox.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "examples" / "shapes"


def train(name: str, output: Path, *flags: str) -> None:
    """`cogvideox train` on a shipped file, for one step."""
    stages = '[{"steps": 1, "batch_size": 1, "frames": 9}]'
    assert main(["train", str(RECIPES / f"{name}.yaml"), "--output", str(output), "--stages", stages, *flags]) == 0


def test_recipes_make_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("vae", tmp_path / "vae", "--data.objects", "[1]")
    train("vae_decoder", tmp_path / "vae_decoder", "--init_from", str(tmp_path / "vae" / "final"))
    train("text_encoder", tmp_path / "text", "--data.objects", "[1]")
    parts = ["--vae", str(tmp_path / "vae_decoder" / "final"), "--text_encoder", str(tmp_path / "text" / "final")]
    parts += ["--data.clips", "1", "--no-compile", "--evaluate_prompts", "0"]
    train("transformer_images", tmp_path / "pictures", *parts)
    train("transformer", tmp_path / "transformer", *parts, "--init_from", str(tmp_path / "pictures" / "final"))
    assert "curves.png" in capsys.readouterr().out
    train("transformer_motion", tmp_path / "motion", *parts, "--init_from", str(tmp_path / "transformer" / "final"))
    for name in ("image_to_video", "inpaint"):
        train(name, tmp_path / name, *parts, "--init_from", str(tmp_path / "transformer" / "final"))

    text, image, ends = (tmp_path / name / "pipeline" for name in ("motion", "image_to_video", "inpaint"))
    shipped = [file for folder in (text, image / "transformer") for file in folder.rglob("*")]
    assert sum(file.stat().st_size for file in shipped) < 24 * 2**20
    call = {"prompt": "a red circle moves right", "num_frames": 9, "num_inference_steps": 1, "output_type": "pt"}
    shown = torch.full((3, 64, 64), 0.5)
    for frames in (
        CogVideoXPipeline.from_pretrained(text)(**call).frames,
        CogVideoXImageToVideoPipeline.from_pretrained(image)(image=shown, **call).frames,
        DiffusionPipeline.from_pretrained(ends)(image=shown, last_image=shown, **call).frames,
    ):
        assert frames.shape == (1, 9, 3, 64, 64) and torch.isfinite(frames).all()


def test_every_recipe_is_trained_here() -> None:
    trained = {"vae", "vae_decoder", "text_encoder", "transformer_images", "transformer", "transformer_motion", "image_to_video", "inpaint"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == trained
