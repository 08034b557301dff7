"""The shipped models: whole, small, show what a prompt says, and are the same models to diffusers' own classes."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_cogvideox import CogVideoXPipeline, demo
from diffusers_cogvideox.cli import main
from diffusers_cogvideox.data.captions import parse
from diffusers_cogvideox.demo import demo_image_model, demo_model
from diffusers_cogvideox.evaluation.detectors import detect, score
from diffusers_cogvideox.video_io import probe_video, read_video, write_image
from parity import StockDPMScheduler, StockPipeline
from tiny_pipeline import save_stock_folder

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


# --- the image-to-video sibling -----------------------------------------------------------------------------------------


@pytest.fixture
def sibling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny sibling in the place of the shipped one: its own parts, beside those that the two share."""
    whole = save_stock_folder(tmp_path / "tiny", "5b-i2v")
    own = tmp_path / "image_to_video"
    shutil.copytree(whole / "transformer", own / "transformer")
    shutil.copy(whole / "model_index.json", own)
    (whole / "cogvideox.json").write_text('{"height": 32, "width": 48}')
    shutil.rmtree(whole / "transformer")
    monkeypatch.setattr(demo, "_ROOT", whole)
    monkeypatch.setattr(demo, "_IMAGE", own)
    monkeypatch.setattr(demo, "HF_HOME", str(tmp_path / "cache"))
    return own


def test_the_sibling_is_put_together_once_for_each_content(sibling: Path) -> None:
    first = demo_image_model()
    assert {path.name for path in first.iterdir()} == {"cogvideox.json", "model_index.json", "transformer", *demo._SHARED}
    assert demo_image_model() == first
    (sibling / "cogvideox.json").write_text("{}")
    assert demo_image_model() != first
    assert len(list(first.parent.iterdir())) == 2  # and nothing half done beside them


def test_the_sibling_makes_a_video_of_a_picture(sibling: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(write_image(tmp_path / "picture.png", np.full((32, 48, 3), 128, np.uint8)))
    command = ["generate", PROMPT, "--model", "demo-i2v", "--image", picture, "--steps", "1", "--output", str(tmp_path / "a.mp4")]
    assert main(command) == 0
    assert (probe_video(tmp_path / "a.mp4").height, probe_video(tmp_path / "a.mp4").width) == (32, 48)
    assert main(["generate", str(tmp_path / "a.json"), "--output", str(tmp_path / "b.mp4")]) == 0
    assert (tmp_path / "b.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    capsys.readouterr()
    assert main(["info", "demo-i2v"]) == 0
    assert "32x48 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("demo", ["--image", "picture.png"], "--image needs an image-to-video model (such as demo-i2v or "),
        ("demo-i2v", [], "A prompt alone needs a text-to-video model (such as demo or "),
    ],
)
def test_the_models_name_each_other(
    model: str, options: list[str], message: str, sibling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image("picture.png", np.zeros((32, 48, 3), np.uint8))
    monkeypatch.setattr(demo, "_ROOT", demo._ROOT if model == "demo-i2v" else save_stock_folder(tmp_path / "text"))
    assert main(["generate", PROMPT, "--model", model, *options]) == 2
    assert message in capsys.readouterr().err


def test_all_files_of_the_models_are_packaged() -> None:
    """As setuptools reads the patterns; those of the sibling, too."""
    root = Path(demo.__file__).parent
    options = (Path(__file__).parents[1] / "setup.cfg").read_text().partition("diffusers_cogvideox.demo =")[2].partition("\n\n")[0]
    packaged = {path for pattern in options.split() for path in root.glob(pattern)}
    assert {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")} <= packaged
    own = [Path("image_to_video", name) for name in ("model_index.json", "transformer/config.json", "transformer/a.safetensors")]
    assert all(any(path.match(pattern) for pattern in options.split()) for path in own)
