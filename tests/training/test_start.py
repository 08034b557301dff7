"""What a run starts from: parts that keep their weights."""

from pathlib import Path

import pytest
import torch

from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.training.config import DataOptions, Optimisation, Stage, TrainConfig
from diffusers_cogvideox.training.loop import run
from diffusers_cogvideox.training.start import start_model
from diffusers_cogvideox.training.vae import VAETask


def config(folder: Path, start: str | None, *frozen: str) -> TrainConfig:
    return TrainConfig(
        task="vae",
        output=str(folder / "run"),
        model={},
        init_from=start,
        frozen=frozen,
        stages=[Stage(steps=2, batch_size=1, frames=9)],
        data=DataOptions(height=32, width=32),
        optimisation=Optimisation(learning_rate=1e-3, muon_learning_rate=0.01, warmup_steps=0, ema_decay=0.1),
    )


def test_a_frozen_encoder_stays_and_the_decoder_learns(tmp_path: Path, parts: dict[str, str]) -> None:
    before = AutoencoderKLCogVideoX.from_pretrained(parts["vae"])
    before.register_to_config(scaling_factor=0.5)
    before.save_pretrained(tmp_path / "start")
    settings = config(tmp_path, str(tmp_path / "start"), "encoder")
    after = AutoencoderKLCogVideoX.from_pretrained(run(settings, VAETask(settings)))

    assert after.config.scaling_factor == 0.5
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]) == name.startswith("encoder."), name


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("text_model",), r"no part 'text_model'; the parts that it consists of are .*encoder, decoder"),
        (("",), r"no part ''"),
        (("encoder", "decoder"), "leaves nothing to train"),
    ],
)
def test_parts_that_cannot_be_frozen_are_named(tmp_path: Path, parts: dict[str, str], frozen: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_model(AutoencoderKLCogVideoX, config(tmp_path, parts["vae"], *frozen))


def test_random_weights_are_not_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would keep random weights"):
        start_model(AutoencoderKLCogVideoX, config(tmp_path, None, "encoder"))
