"""The loop: exact resume, schedules, logs, interruption."""

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffusers_cogvideox.training.loop as loop
from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.training.config import DataOptions, Optimisation, Stage, TrainConfig
from diffusers_cogvideox.training.loop import learning_rate_factor, run
from diffusers_cogvideox.training.processes import ALONE, Share
from diffusers_cogvideox.training.vae import VAETask
from parity import TINY_VAE

DATA = DataOptions(height=32, width=32)


def config(output: Path, **changes: Any) -> TrainConfig:
    """A VAE run of six steps in two stages."""
    options: dict[str, Any] = {
        "task": "vae",
        "output": str(output),
        "model": TINY_VAE,
        "stages": [Stage(steps=3, batch_size=2, frames=1), Stage(steps=3, batch_size=1, frames=9, crop=16)],
        "data": DATA,
        "optimisation": Optimisation(learning_rate=1e-3, muon_learning_rate=0.01, warmup_steps=2),
        "checkpoint_every": 3,
        "log_every": 1,
    }
    return TrainConfig(**options | changes)


class Interrupted(VAETask):
    """Stops as Ctrl-C would, before the fifth step."""

    def batch(self, step: int, share: Share = ALONE) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return super().batch(step, share)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that nothing interrupted; it is only looked at."""
    settings = config(tmp_path_factory.mktemp("whole"))
    run(settings, VAETask(settings))
    return Path(settings.output)


def test_interrupted_run_resumes_exactly(whole: Path, tmp_path: Path) -> None:
    parted = config(tmp_path / "parted")
    with pytest.raises(KeyboardInterrupt):
        run(parted, Interrupted(parted))
    assert {p.name for p in (tmp_path / "parted").glob("*-*")} == {"checkpoint-3", "checkpoint-4"}
    run(parted, VAETask(parted))
    expected, result = weights(whole / "final"), weights(tmp_path / "parted" / "final")
    assert expected.keys() == result.keys()
    assert all(torch.equal(expected[name], result[name]) for name in expected)
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(tmp_path / "parted")]


def test_a_step_that_has_begun_is_finished(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes after the fourth update, before the average: without care, the run would make that update again."""
    average, calls = loop.EMAModel.step, []

    def interrupted(self: Any, parameters: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        average(self, parameters)

    monkeypatch.setattr(loop.EMAModel, "step", interrupted)
    parted = config(tmp_path / "parted")
    with pytest.raises(KeyboardInterrupt):
        run(parted, VAETask(parted))
    run(parted, VAETask(parted))
    assert len(calls) == 6
    expected, result = weights(whole / "final"), weights(tmp_path / "parted" / "final")
    assert all(torch.equal(expected[key], result[key]) for key in expected)


def test_finished_run_is_not_trained_again(whole: Path) -> None:
    settings, before = config(whole), weights(whole / "final")
    assert run(settings, VAETask(settings)) == whole / "final"
    assert len(lines(whole)) == 6
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(whole / "final").items())


def test_saved_vae_scales_its_own_latents_to_unit_variance(whole: Path) -> None:
    vae = AutoencoderKLCogVideoX.from_pretrained(whole / "final")
    statistics = json.loads((whole / "final" / "latent_statistics.json").read_text())
    assert vae.config.scaling_factor == pytest.approx(1 / statistics["std"], rel=1e-4)


def test_training_reduces_the_loss(tmp_path: Path) -> None:
    """Of one batch, again and again: others would be easier or harder."""

    class Same(VAETask):
        def batch(self, step: int, share: Share = ALONE) -> dict[str, Any]:  # noqa: ARG002 - all steps have that of the first
            return super().batch(0, share)

    settings = config(tmp_path, stages=[Stage(steps=16, batch_size=2, frames=1)], checkpoint_every=100)
    run(settings, Same(settings))
    log = [line["loss"] for line in lines(tmp_path)]
    assert sum(log[-3:]) < 0.8 * sum(log[:3])


def test_callback_sees_averaged_weights_and_training_goes_on_from_its_own(tmp_path: Path) -> None:
    stages = [Stage(steps=2, batch_size=1, frames=1)]
    settings = config(tmp_path, stages=stages, checkpoint_every=1, optimisation=replace(config(tmp_path).optimisation, ema_decay=0.5))
    task, seen = VAETask(settings), []
    run(settings, task, lambda step, model: seen.append((step, model.encoder.conv_in.conv.weight.detach().clone())))
    assert [step for step, _ in seen] == [1, 2]
    assert not torch.equal(seen[-1][1], task.objective.model.encoder.conv_in.conv.weight)
    assert torch.equal(seen[-1][1], weights(tmp_path / "final")["encoder.conv_in.conv.weight"])


def test_nonfinite_gradients_stop_the_run(tmp_path: Path) -> None:
    class Broken(VAETask):
        def batch(self, step: int, share: Share = ALONE) -> dict[str, Any]:
            return {"video": super().batch(step, share)["video"] * float("nan")}

    settings = config(tmp_path)
    with pytest.raises(FloatingPointError, match="learning_rate"):
        run(settings, Broken(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages is empty"),
        ({"vae": "folder"}, "vae has no effect when the vae is trained, only for: transformer"),
        ({"data": DataOptions(clips=9)}, "data.clips has no effect"),
        ({"task": "text_encoder"}, "stages.crop has no effect when the text_encoder is trained"),
        ({"keep_checkpoints": 0}, "keep_checkpoints=0 is not possible: it must be at least 1"),
        ({"evaluate_prompts": -1}, "evaluate_prompts=-1 is not possible: it must be at least 0"),
        ({"model": {"latent_chanels": 4}}, "model has no key latent_chanels; it has act_fn, "),
        ({"objective": {"kl": 1.0}}, "objective has no key kl; it has kl_weight, l1_weight"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAETask(config(tmp_path, **changes))


def test_weights_to_start_from_are_used_and_must_fit(tmp_path: Path) -> None:
    vae = AutoencoderKLCogVideoX(**TINY_VAE)
    vae.save_pretrained(tmp_path / "start")
    started = VAETask(config(tmp_path, init_from=str(tmp_path / "start"))).objective.model
    assert torch.equal(started.encoder.conv_in.conv.weight, vae.encoder.conv_in.conv.weight)
    with pytest.raises(ValueError, match=r"model\.latent_channels=8, but the weights in .* have latent_channels=4"):
        VAETask(config(tmp_path, init_from=str(tmp_path / "start"), model=TINY_VAE | {"latent_channels": 8}))


def test_folders_that_are_not_there_are_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="init_from: there is no folder nowhere"):
        VAETask(config(tmp_path, init_from="nowhere"))


def test_data_without_clips_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.clips=0 is not possible"):
        DataOptions(clips=0)


def test_batch_that_cannot_be_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Share, "current", classmethod(lambda cls: cls(0, 2)))
    settings = config(tmp_path)
    with pytest.raises(ValueError, match="1 items cannot be split evenly over 2 processes"):
        run(settings, VAETask(settings))


@pytest.mark.parametrize(("step", "expected"), [(0, 0.1), (9, 1.0), (10, 1.0), (55, 0.51), (100, 0.02), (200, 0.02)])
def test_learning_rate_warms_up_and_decays_along_a_cosine(step: int, expected: float) -> None:
    options = Optimisation(warmup_steps=10, final_learning_rate=0.02)
    assert learning_rate_factor(step, 100, options) == pytest.approx(expected, abs=1e-6)


def test_stages_follow_each_other(tmp_path: Path) -> None:
    settings = config(tmp_path)
    assert [settings.stage_at(step).frames for step in range(6)] == [1, 1, 1, 9, 9, 9]
    with pytest.raises(IndexError, match="beyond the last stage"):
        settings.stage_at(6)


def test_impossible_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        Stage(steps=0, batch_size=1)


def test_metrics_name_the_parts(whole: Path) -> None:
    assert {"loss", "l1", "mse", "kl", "psnr", "grad_norm", "lr", "step", "seconds"} <= set(lines(whole)[0])
    saved: Mapping[str, Any] = json.loads((whole / "config.json").read_text())
    assert saved["task"] == "vae" and len(saved["stages"]) == 2
