"""Training the transformer on a tiny VAE and text encoder: batches, caching of latents, resume, the saved model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffusers_cogvideox import CogVideoXDDIMScheduler, CogVideoXFunInpaintPipeline
from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.transformer import CogVideoXTransformer3DModel
from diffusers_cogvideox.training import transformer as module
from diffusers_cogvideox.training.config import DataOptions, Stage, TrainConfig
from diffusers_cogvideox.training.curves import plot_curves
from diffusers_cogvideox.training.latents import latent_statistics
from diffusers_cogvideox.training.loop import run
from diffusers_cogvideox.training.transformer import TransformerTask
from parity import TINY_TRANSFORMERS, TINY_VAE

TINY_MODEL = TINY_TRANSFORMERS["5b"] | {"sample_height": 4, "sample_width": 4}


def config(output: Path, parts: dict[str, str], **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "task": "transformer",
        "output": str(output),
        "model": TINY_MODEL,
        "stages": [Stage(steps=2, batch_size=3, frames=1), Stage(steps=2, batch_size=2, frames=9)],
        "data": DataOptions(height=32, width=32, clips=4),
        "checkpoint_every": 2,
        "log_every": 1,
    }
    return TrainConfig(**options | parts | changes)


def test_run_saves_a_transformer_and_its_curves(tmp_path: Path, parts: dict[str, str]) -> None:
    settings = config(tmp_path, parts)
    final = run(settings, TransformerTask(settings))
    assert CogVideoXTransformer3DModel.from_pretrained(final).config.num_layers == 2
    assert plot_curves([tmp_path], tmp_path / "curves.png").stat().st_size > 1000


def test_clips_are_encoded_once_and_scaled(tmp_path: Path, parts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = TransformerTask(config(tmp_path, parts))
    monkeypatch.setattr(module, "encode_clips", lambda *_, **__: pytest.fail("encoded again"))
    again = TransformerTask(config(tmp_path, parts))
    batch, same = first.batch(3), again.batch(3)
    assert all(torch.equal(batch[name], same[name]) for name in ("latents", "text", "timesteps", "noise"))
    assert batch["latents"].shape == (2, 3, 4, 4, 4) and batch["text"].shape == (2, 7, 24)
    video = torch.from_numpy(first.clips[9].world.batch(0, 4)[0]).movedim(-1, 1)
    vae = AutoencoderKLCogVideoX.from_pretrained(parts["vae"])
    with torch.no_grad():
        expected = vae.encode(video).latent_dist.mode().transpose(1, 2) * vae.config.scaling_factor
    torch.testing.assert_close(first.clips[9].latents.float(), expected, atol=2e-2, rtol=2e-2)  # kept in half precision


def test_dropped_captions_are_the_empty_string(tmp_path: Path, parts: dict[str, str]) -> None:
    task = TransformerTask(config(tmp_path, parts, objective={"text_dropout": 1.0}))
    text = task.batch(0)["text"]
    torch.testing.assert_close(text, task._embed([""]).expand_as(text))


def test_scheduler_has_zero_terminal_snr_unless_told_otherwise(tmp_path: Path, parts: dict[str, str]) -> None:
    assert TransformerTask(config(tmp_path, parts)).objective.alphas_cumprod[-1] == 0
    shifted = TransformerTask(config(tmp_path, parts, scheduler={"snr_shift_scale": 3.0}))
    assert shifted.objective.alphas_cumprod[500] < TransformerTask(config(tmp_path, parts)).objective.alphas_cumprod[500]


@pytest.mark.parametrize("missing", ["vae", "text_encoder", "data"])
def test_missing_parts_are_named(tmp_path: Path, parts: dict[str, str], missing: str) -> None:
    with pytest.raises(ValueError, match="needs vae, text_encoder"):
        TransformerTask(config(tmp_path, parts, **{missing: DataOptions() if missing == "data" else None}))


def test_image_model_sees_the_first_frame(tmp_path: Path, parts: dict[str, str]) -> None:
    model = TINY_MODEL | {"in_channels": 8}
    task = TransformerTask(config(tmp_path, parts, model=model, objective={"image_dropout": 0.0}))
    batch = task.batch(3)
    extra, clips = batch["extra"], task.clips[9]
    assert extra.shape == batch["latents"].shape and not extra[:, 1:].any()
    video = torch.from_numpy(clips.world.batch(0, 4)[0][:, :1]).movedim(-1, 1)
    vae = AutoencoderKLCogVideoX.from_pretrained(parts["vae"])
    with torch.no_grad():
        pictures = vae.encode(video).latent_dist.mode().transpose(1, 2) * vae.config.scaling_factor
    torch.testing.assert_close(clips.known["images"].float(), pictures, atol=2e-2, rtol=2e-2)
    assert all(any(torch.equal(shown, picture[0]) for picture in clips.known["images"].float()) for shown in extra[:, 0])
    assert not TransformerTask(config(tmp_path, parts, model=model, objective={"image_dropout": 1.0})).batch(3)["extra"].any()


@pytest.mark.parametrize("channels", [8, 9])
def test_wider_model_starts_as_the_text_model_that_it_comes_from(channels: int, tmp_path: Path, parts: dict[str, str]) -> None:
    settings = config(tmp_path / "text", parts)
    final = run(settings, TransformerTask(settings))
    task = TransformerTask(config(tmp_path / "image", parts, init_from=str(final), model=TINY_MODEL | {"in_channels": channels}))
    text_model, batch = CogVideoXTransformer3DModel.from_pretrained(final), task.batch(3)
    text, time, rotary = batch["text"], batch["timesteps"], batch["rotary"]
    with torch.no_grad():
        expected = text_model(batch["noise"], text, time, image_rotary_emb=rotary).sample
        result = task.transformer(torch.cat([batch["noise"], batch["extra"]], 2), text, time, image_rotary_emb=rotary).sample
    torch.testing.assert_close(result, expected)


# The share of samples with a last image beside the first, the share with nothing, and what the pipeline is then given.
SHOWN = [(1.0, 0.0, ("image", "last_image")), (0.0, 0.0, ("image",)), (0.5, 1.0, ())]


@pytest.mark.parametrize(("last_image", "image_dropout", "given"), SHOWN)
def test_inpainting_model_sees_what_the_pipeline_shows_it(
    last_image: float, image_dropout: float, given: tuple[str, ...], tmp_path: Path, parts: dict[str, str]
) -> None:
    model, chances = TINY_MODEL | {"in_channels": 9}, {"last_image": last_image, "image_dropout": image_dropout}
    settings = config(tmp_path, parts, model=model, objective=chances, data=DataOptions(height=32, width=32, clips=1))
    task = TransformerTask(settings)
    extra = task.batch(3)["extra"][:1]

    vae = AutoencoderKLCogVideoX.from_pretrained(parts["vae"])
    text = dict.fromkeys(("tokenizer", "text_encoder"))
    pipe = CogVideoXFunInpaintPipeline(vae=vae, transformer=task.transformer, scheduler=CogVideoXDDIMScheduler(), **text)
    pipe.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    task.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True)
    frames = torch.from_numpy(task.clips[9].world.batch(0, 1)[0][0]).movedim(-1, 1) / 2 + 0.5  # F 3 H W
    pictures = {name: frames[place] for name, place in {"image": 0, "last_image": -1}.items() if name in given}
    size = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
    pipe(prompt_embeds=torch.zeros(1, 7, 24), **pictures, **size)
    torch.testing.assert_close(extra, seen[0][:, :, 4:], atol=2e-2, rtol=2e-2)  # kept in half precision
    assert bool(extra.any()) == bool(given)


def test_each_sample_is_shown_something_of_its_own(tmp_path: Path, parts: dict[str, str]) -> None:
    """Nothing, the first frame, or the last one too."""
    stage, data = Stage(steps=1, batch_size=48, frames=9), DataOptions(height=32, width=32, clips=1)
    settings = config(tmp_path, parts, model=TINY_MODEL | {"in_channels": 9}, stages=[stage], data=data, objective={"image_dropout": 0.3})
    task = TransformerTask(settings)
    known, views = task.batch(0)["extra"][:, :, 1:], [task.clips[9].known[view].float() for view in ("starts", "ends")]
    assert not torch.equal(*views)
    kinds = torch.stack([(known == view).flatten(1).all(dim=1) for view in (torch.zeros(()), *views)], dim=1)  # 48 samples, 3 kinds
    assert (kinds.sum(dim=1) == 1).all()
    assert (kinds.sum(dim=0) >= 8).all()


def test_other_numbers_of_channels_are_refused(tmp_path: Path, parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="in_channels=10 with out_channels=4 cannot be trained here"):
        TransformerTask(config(tmp_path, parts, model=TINY_MODEL | {"in_channels": 10}))


@pytest.mark.parametrize(("channels", "option"), [(4, "image_dropout"), (8, "last_image")])
def test_options_of_other_models_are_refused(channels: int, option: str, tmp_path: Path, parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"objective has no key {option}"):
        TransformerTask(config(tmp_path, parts, model=TINY_MODEL | {"in_channels": channels}, objective={option: 0.1}))


def test_latents_of_other_clips_are_not_reused(tmp_path: Path, parts: dict[str, str]) -> None:
    TransformerTask(config(tmp_path, parts))
    for data, changed in (({"seed": 1, "clips": 4}, r"data\.seed \(0, now 1\)"), ({"clips": 3}, r"data\.clips \(4, now 3\)")):
        with pytest.raises(ValueError, match=rf"latents_1\.safetensors holds clips .* other settings: {changed}\. Delete it"):
            TransformerTask(config(tmp_path, parts, data=DataOptions(height=32, width=32, **data)))
    AutoencoderKLCogVideoX(**TINY_VAE).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"the weights of the vae \(\w{16}, now \w{16}\)"):
        TransformerTask(config(tmp_path, parts | {"vae": str(tmp_path / "other")}))


def test_latents_that_do_not_say_what_they_are(tmp_path: Path, parts: dict[str, str]) -> None:
    save_file({"latents": torch.zeros(4, 1, 4, 4, 4)}, tmp_path / "latents_1.safetensors")
    with pytest.raises(ValueError, match=r"latents_1\.safetensors does not say from what its clips were encoded"):
        TransformerTask(config(tmp_path, parts))


def test_latent_statistics() -> None:
    latents = torch.randn(64, 3, 4, 8, 8) * 2 + torch.arange(4.0).view(1, 1, 4, 1, 1)
    statistics = latent_statistics(latents)
    assert statistics["channel_mean"] == pytest.approx([0, 1, 2, 3], abs=0.1)
    assert statistics["channel_std"] == pytest.approx([2] * 4, abs=0.1)
    assert statistics["scaling_factor"] == pytest.approx(1 / statistics["std"])


def test_image_models_are_not_measured_by_words(tmp_path: Path, parts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="evaluate_prompts measures text-to-video models"):
        TransformerTask(config(tmp_path, parts, model=TINY_MODEL | {"in_channels": 8}, evaluate_prompts=8))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_parts_that_are_not_there(part: str, tmp_path: Path, parts: dict[str, str]) -> None:
    with pytest.raises(FileNotFoundError, match=f"{part}: there is no folder nowhere"):
        TransformerTask(config(tmp_path, parts | {part: "nowhere"}))
