"""The map from latents to colours: exact where there is one, and what the picture on disk shows."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_cogvideox import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, Geometry
from diffusers_cogvideox.data.moving_shapes import MovingShapes
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.generation.model_folder import ModelFolder
from diffusers_cogvideox.generation.preview import Preview, PreviewMap, drawn_clips, fit_to_vae, mean_colours
from parity import StockDDIMScheduler
from tiny_pipeline import call

GEOMETRY = Geometry()


def test_mean_colours_by_brute_force():
    video = torch.randn(2, 3, 9, 16, 24)
    found = mean_colours(video, GEOMETRY)
    assert found.shape == (2, 3, 3, 2, 3)
    for frame, frames in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
        for y in range(2):
            for x in range(3):
                block = video[:, :, frames, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                torch.testing.assert_close(found[:, :, frame, y, x], block.mean(dim=(2, 3, 4)))


def test_the_fit_finds_a_linear_map():
    weight, bias = torch.randn(3, 5), torch.randn(3)
    latents = torch.randn(2, 5, 3, 4, 4)
    known = PreviewMap(weight, bias)
    fitted = PreviewMap.fit(latents, known(latents))
    torch.testing.assert_close(fitted.weight, weight)
    torch.testing.assert_close(fitted.bias, bias)


def test_least_squares_is_the_best_map():
    latents, colours = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 3, 2, 8, 8)
    best = PreviewMap.fit(latents, colours)

    def error(colour_map) -> float:
        return (colour_map(latents) - colours).square().mean().item()

    for _ in range(5):
        other = PreviewMap(best.weight + 0.1 * torch.randn(3, 4), best.bias + 0.1 * torch.randn(3))
        assert error(other) > error(best)


def test_maps_are_stored_as_numbers():
    known = PreviewMap(torch.randn(3, 4), torch.randn(3))
    again = PreviewMap.from_json(json.loads(json.dumps(known.to_json())))
    torch.testing.assert_close(again.weight, known.weight, atol=5e-5, rtol=0)
    torch.testing.assert_close(again.bias, known.bias, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": [[1.0]] * 3}, "holds numbers under the keys weight and bias"),
        ({"weight": "x", "bias": [0, 0, 0]}, "holds numbers under the keys weight and bias"),
        ({"weight": [[1.0]] * 2, "bias": [0, 0, 0]}, r"has weight \(3, channels\) and bias \(3,\), not \(2, 1\) and \(3,\)"),
    ],
)
def test_unusable_maps(content, message):
    with pytest.raises(ValueError, match=message):
        PreviewMap.from_json(content)


def test_drawn_clips_are_smooth_and_the_same_every_time():
    clips = drawn_clips(GEOMETRY)
    assert clips.shape == (4, 3, 9, 64, 64)
    assert torch.equal(clips, drawn_clips(GEOMETRY))
    assert clips.abs().max() <= 1 and clips.diff(dim=-1).abs().max() < 0.5 and clips.std() > 0.4


# --- the shipped model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out() -> tuple[torch.Tensor, torch.Tensor, AutoencoderKLCogVideoX]:
    """Latents of held-out clips, the colours behind them, and the shipped VAE."""
    videos, _, _ = MovingShapes(seed=1, held_out=True).batch(0, 4)
    clips = torch.from_numpy(videos).movedim(-1, 1)
    vae = AutoencoderKLCogVideoX.from_pretrained(demo_model(), subfolder="vae", torch_dtype=torch.float32)
    with torch.no_grad():
        return vae.encode(clips).latent_dist.mode(), mean_colours(clips, GEOMETRY), vae


def explained(colour_map: PreviewMap, latents: torch.Tensor, colours: torch.Tensor) -> float:
    """Share of the colours' variance that a map explains."""
    spread = (colours - colours.mean(dim=(0, 2, 3, 4), keepdim=True)).square().sum()
    return 1 - ((colour_map(latents) - colours).square().sum() / spread).item()


def test_the_shipped_map_is_that_of_the_shipped_vae(held_out):
    """A VAE that was trained anew needs a new map: benchmarks/preview_map.py writes it."""
    known = PreviewMap.from_json(ModelFolder.open("demo").preview)
    assert explained(known, *held_out[:2]) > 0.95
    shuffled = PreviewMap(known.weight.roll(1, dims=1), known.bias)
    assert explained(shuffled, *held_out[:2]) < 0.5


def test_a_map_without_clips_of_the_models_world(held_out):
    latents, colours, vae = held_out
    assert explained(fit_to_vae(vae, GEOMETRY), latents, colours) > 0.85


# --- the picture ----------------------------------------------------------------------------------------------------------


def test_the_picture_shows_the_clean_latents(pipe, tmp_path):
    """Independent of the class: the prediction of the last step is what the loop ends with."""
    colours = PreviewMap(torch.randn(3, 4), torch.zeros(3))
    preview = Preview(tmp_path / "a.preview.png", colours, pipe.geometry, pipe.vae_scaling_factor_image)
    shown = []

    def after_step(pipe, index, timestep, tensors):
        preview.after_step(pipe, index, tensors["latents"])
        shown.append(np.asarray(Image.open(preview.path)).copy())
        return {}

    latents = call(pipe, num_inference_steps=4, output_type="latent", callback_on_step_end=after_step)
    assert len({picture.tobytes() for picture in shown}) == 4
    frames = preview.frames(latents)
    assert frames.shape == (3, 32, 48, 3)
    rows = shown[-1][-(32 + 4) : -4]  # below the label; 3 frames with gaps of 4 pixels
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(rows[:, 4 + number * 52 :][:, :48], frame)


def test_a_constant_latent_has_one_colour():
    colours = PreviewMap(torch.tensor([[0.5], [0.0], [-0.5]]), torch.tensor([0.0, 0.2, 0.0]))
    frames = Preview(None, colours, GEOMETRY, scaling_factor=0.5).frames(torch.ones(1, 2, 1, 3, 3))
    expected = np.rint((np.array([1.0, 0.2, -1.0]) + 1) * 127.5)  # the latents are divided by the scaling factor
    np.testing.assert_array_equal(frames, np.broadcast_to(expected, (2, 24, 24, 3)))


@pytest.mark.parametrize(("steps", "writes"), [(1, 1), (4, 4), (30, 11)])
def test_about_ten_updates(steps, writes, tmp_path, monkeypatch):
    path, count = tmp_path / "a.png", []
    monkeypatch.setattr("diffusers_cogvideox.generation.preview.write_image", lambda *_: count.append(1))
    preview = Preview(path, PreviewMap(torch.zeros(3, 1), torch.zeros(3)), GEOMETRY, 1.0)
    pipe = type("Pipe", (), {"num_timesteps": steps, "scheduler": CogVideoXDPMScheduler()})
    for index in range(steps):
        preview.after_step(pipe, index, torch.zeros(1, 1, 1, 2, 2))
    assert len(count) == writes


def test_other_schedulers_show_the_noisy_latents(pipe, tmp_path):
    pipe.scheduler = StockDDIMScheduler.from_config(pipe.scheduler.config)
    preview = Preview(tmp_path / "a.png", PreviewMap(torch.randn(3, 4), torch.zeros(3)), pipe.geometry, 0.7)
    latents = torch.randn(1, 2, 4, 4, 6)
    pipe._num_timesteps = 1
    preview.after_step(pipe, 0, latents)
    np.testing.assert_array_equal(np.asarray(Image.open(preview.path))[-36:-4, 4:52], preview.frames(latents)[0])
