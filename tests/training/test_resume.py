"""A run goes on with the settings that it was begun with, or says which have changed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusers_cogvideox.training import resume
from diffusers_cogvideox.training.config import DataOptions, Stage, TrainConfig
from diffusers_cogvideox.training.loop import run
from diffusers_cogvideox.training.resume import check_resumed, checkpoints, write_config
from diffusers_cogvideox.training.vae import VAETask
from parity import TINY_VAE


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    stages = [Stage(steps=1, batch_size=1, frames=1)]
    return TrainConfig(task="vae", output=str(tmp_path / "run"), model=TINY_VAE, stages=stages, data=DataOptions(height=32, width=32))


@pytest.fixture
def begun(config: TrainConfig) -> TrainConfig:
    """A run with a checkpoint, as far as files tell."""
    write_config(config)
    (Path(config.output) / "checkpoint-1").mkdir()
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, r"begun with other settings: seed was 0, now 7\. Restore them to go on, or choose another output, where init_from: "),
        ({"data": DataOptions(height=32, width=32, emphasis={"rotates": 3.0})}, r"data\.emphasis was {}, now {'rotates': 3\.0}"),
        ({"model": TINY_VAE | {"scaling_factor": 0.5}}, r"model was .* now "),
        ({"objective": {"kl_weight": 1.0}, "mixed_precision": "bf16"}, r"mixed_precision was no, now bf16; objective was {}, now"),
        ({"stages": [Stage(steps=2, batch_size=1, frames=1)]}, r"stages was .*'steps': 1.*now .*'steps': 2"),
    ],
)
def test_other_settings_are_refused(begun: TrainConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_resumed(replace(begun, **changes))


def test_what_only_says_how_a_run_is_watched_may_differ(begun: TrainConfig, tmp_path: Path) -> None:
    check_resumed(begun)
    check_resumed(replace(begun, log_every=1, checkpoint_every=7, keep_checkpoints=9))
    moved = tmp_path / "moved"
    Path(begun.output).rename(moved)
    check_resumed(replace(begun, output=str(moved)))


def test_settings_that_an_older_version_did_not_have_were_at_their_defaults(begun: TrainConfig) -> None:
    file = Path(begun.output) / "config.json"
    older = json.loads(file.read_text())
    del older["data"]["emphasis"], older["compile"]
    file.write_text(json.dumps(older))
    check_resumed(begun)
    with pytest.raises(ValueError, match="compile was False, now True"):
        check_resumed(replace(begun, compile=True))


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_model_that_was_trained_anew_is_noticed(part: str, tmp_path: Path) -> None:
    """Under the same name, and whether or not clips that it encoded are still there."""
    folders = {name: tmp_path / name for name in ("vae", "text_encoder")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(name.encode())
    named = {name: str(folder) for name, folder in folders.items()}
    begun = TrainConfig(task="transformer", output=str(tmp_path / "run"), model={}, stages=[Stage(steps=1, batch_size=1)], **named)
    write_config(begun)
    (folders[part] / "model.safetensors").write_bytes(b"trained anew")
    check_resumed(begun)  # there is no checkpoint yet
    (tmp_path / "run" / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match=rf"begun with another {part}: the files in {folders[part]} have changed .*Bring them back"):
        check_resumed(begun)
    (folders[part] / "model.safetensors").write_bytes(part.encode())
    check_resumed(begun)
    (folders[part] / "model.safetensors").write_bytes(b"trained anew")
    (tmp_path / "run" / "parts.json").unlink()  # a run of an older version
    check_resumed(begun)


def test_models_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text encoder may have gigabytes, and is asked for several times until training begins."""
    reads: list[int] = []
    monkeypatch.setattr(resume, "sha256", lambda paths: reads.append(len(list(paths))) or "hash")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "model.safetensors").write_bytes(b"weights")
    begun = TrainConfig(
        task="transformer", output=str(tmp_path / "run"), model={}, stages=[Stage(steps=1, batch_size=1)], vae=str(tmp_path / "vae")
    )
    write_config(begun)
    (tmp_path / "run" / "checkpoint-1").mkdir()
    check_resumed(begun)
    assert reads == [1]


def test_without_a_checkpoint_nothing_depends_on_the_settings(config: TrainConfig) -> None:
    check_resumed(config)
    write_config(config)
    check_resumed(replace(config, seed=7))


def test_somebody_elses_config(begun: TrainConfig) -> None:
    (Path(begun.output) / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not what a run wrote there"):
        check_resumed(begun)


def test_a_run_checks_before_it_writes(config: TrainConfig) -> None:
    run(config, VAETask(config))
    folder = Path(config.output)
    before = (folder / "config.json").read_bytes()
    other = replace(config, seed=7)
    with pytest.raises(ValueError, match="seed was 0, now 7"):
        run(other, VAETask(other))
    assert (folder / "config.json").read_bytes() == before
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1"]
