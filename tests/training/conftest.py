"""What a transformer is trained on: a tiny VAE and a tiny text encoder. And less work at the end of a VAE's run."""

from collections.abc import Iterator

import pytest
from transformers import T5Config, T5EncoderModel

from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.training import vae
from diffusers_cogvideox.training.text_encoder import train_tokenizer
from parity import TINY_TRANSFORMERS, TINY_VAE


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny VAE and a tiny text encoder."""
    folder = tmp_path_factory.mktemp("parts")
    AutoencoderKLCogVideoX(**TINY_VAE).save_pretrained(folder / "vae")
    tokenizer = train_tokenizer(["a red circle moves right", "a blue square rests"], folder / "text", 7)
    T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=24, d_ff=16, d_kv=8, num_heads=2, num_layers=1)).save_pretrained(
        folder / "text"
    )
    return {"vae": str(folder / "vae"), "text_encoder": str(folder / "text")}


@pytest.fixture(scope="session")
def tiny_model() -> dict[str, object]:
    """Config of a tiny transformer for clips of 32x32 pixels."""
    return TINY_TRANSFORMERS["5b"] | {"sample_height": 4, "sample_width": 4}


@pytest.fixture(scope="module", autouse=True)
def few_statistics() -> Iterator[None]:
    """Statistics of a VAE's latents from 4 clips: those of 64 take three times as long as all the rest of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "_STATISTICS_CLIPS", 4)
        yield
