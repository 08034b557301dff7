"""LoRA files that diffusers cannot read, reads at another strength, or strips."""

import logging

import peft
import pytest
import torch
from safetensors.torch import save_file

from diffusers_cogvideox import CogVideoXPipeline, CogVideoXTransformer3DModel
from lora_cases import SPELLINGS, delta, factors, spelled
from parity import TINY_TRANSFORMERS, StockPipeline, StockTransformer

LORA = factors()


@pytest.fixture
def pipes():
    """Our pipeline and diffusers', with nothing but a transformer."""
    rest = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    config = TINY_TRANSFORMERS["5b"]
    return CogVideoXPipeline(transformer=CogVideoXTransformer3DModel(**config), **rest), StockPipeline(
        transformer=StockTransformer(**config), **rest
    )


@pytest.fixture
def said(caplog):
    """What was logged, by diffusers too, whose logger does not propagate."""
    logging.getLogger("diffusers").addHandler(caplog.handler)
    yield lambda: caplog.text
    logging.getLogger("diffusers").removeHandler(caplog.handler)


def change(pipe):
    """What adapter "a" adds to the queries of the first block."""
    return pipe.transformer.transformer_blocks[0].attn1.to_q.get_delta_weight("a").detach()


def assert_strength(pipe, alpha):
    torch.testing.assert_close(change(pipe), delta(LORA, 0, "to_q", alpha), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spelling", ["sat", "sat, bare"])
def test_d31_sat(pipes, spelling):
    ours, stock = pipes
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        stock.load_lora_weights(spelled(LORA, spelling), adapter_name="a")
    ours.load_lora_weights(spelled(LORA, spelling), adapter_name="a", lora_alpha=1)
    assert_strength(ours, 1.0)


@pytest.mark.parametrize("spelling", ["fun", "kohya", "comfyui", "peft", "bare"])
def test_d31_layouts_that_are_ignored(pipes, spelling, said):
    """Diffusers loads nothing, and calls that safe."""
    ours, stock = pipes
    stock.load_lora_weights(spelled(LORA, spelling), adapter_name="a")
    assert "This is safe to ignore" in said()
    assert stock.get_list_adapters() == {}
    ours.load_lora_weights(spelled(LORA, spelling), adapter_name="a", lora_alpha=2)
    assert_strength(ours, 2.0)


@pytest.mark.parametrize("spelling", ["diffusers", "comfyui"])
def test_d31_alpha_among_the_tensors(pipes, spelling):
    ours, stock = pipes
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        stock.load_lora_weights(spelled(LORA, spelling, alpha=2.0), adapter_name="a")
    ours.load_lora_weights(spelled(LORA, spelling, alpha=2.0), adapter_name="a")
    assert_strength(ours, 2.0)


def test_d31_dora(pipes, said):
    """Diffusers drops the magnitudes of LyCORIS with a warning, and makes an ordinary LoRA of the rest."""
    ours, stock = pipes
    name = SPELLINGS["diffusers"][1]
    magnitudes = {name(*layer, "A").partition(".lora")[0] + ".dora_scale": torch.ones(64, 1) for layer in LORA}
    stock.load_lora_weights(spelled(LORA, "diffusers") | magnitudes, adapter_name="a")
    assert "we are going to filter out the keys" in said()
    assert not stock.transformer.peft_config["a"].use_dora
    ours.load_lora_weights(spelled(LORA, "diffusers") | magnitudes, adapter_name="a", lora_alpha=4)
    assert ours.transformer.peft_config["a"].use_dora
    stored = peft.get_peft_model_state_dict(ours.transformer, adapter_name="a")
    assert sum("lora_magnitude_vector" in key for key in stored) == len(LORA)


def test_d31_layers_that_the_model_lacks(pipes):
    """Of a LoRA with more blocks than the model diffusers loads the first ones; of unknown layers, nothing is said."""
    ours, stock = pipes
    longer = spelled(factors(blocks=3), "diffusers")
    stock.load_lora_weights(longer, adapter_name="a")
    assert "a" in stock.transformer.peft_config
    with pytest.raises(ValueError, match=r"does not fit this transformer in 4 of 12 layers: .*model has none"):
        ours.load_lora_weights(longer, adapter_name="a", lora_alpha=4)


def test_d32_alpha_that_is_nowhere(pipes, said):
    """Diffusers takes the rank, so that CogVideo's finetuned LoRAs (rank 128, alpha 64) work at twice their strength."""
    ours, stock = pipes
    for pipe in (stock, ours):
        pipe.load_lora_weights(spelled(LORA, "diffusers"), adapter_name="a")
        assert_strength(pipe, 4.0)
        assert ("does not say its alpha" in said()) == (pipe is ours)
    ours.unload_lora_weights()
    ours.load_lora_weights(spelled(LORA, "diffusers"), adapter_name="a", lora_alpha=2)
    assert_strength(ours, 2.0)


@pytest.mark.parametrize("header", [{"lora_config": '{"r": 4, "lora_alpha": 2}'}, {"ss_network_alpha": "2"}])
def test_d32_alpha_in_the_header_of_other_trainers(pipes, header, tmp_path):
    ours, stock = pipes
    save_file(spelled(LORA, "diffusers"), tmp_path / "pytorch_lora_weights.safetensors", metadata=header)
    for pipe, alpha in ((stock, 4.0), (ours, 2.0)):
        pipe.load_lora_weights(tmp_path, adapter_name="a")
        assert_strength(pipe, alpha)


def test_d32_alpha_is_saved(pipes, tmp_path, said):
    """The tensors alone, as trainers hand them over, are saved without alpha by both; ours says so, and takes the transformer too."""
    for pipe in pipes:
        pipe.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False), "a")
    ours, stock = pipes
    expected = change(ours)
    for pipe in (stock, ours):
        pipe.save_lora_weights(tmp_path / "tensors", peft.get_peft_model_state_dict(pipe.transformer, adapter_name="a"))
        assert ("saved without its alpha" in said()) == (pipe is ours)
    ours.save_lora_weights(tmp_path / "model", ours.transformer)
    stock.unload_lora_weights()
    for folder, factor in (("tensors", 2.0), ("model", 1.0)):
        stock.load_lora_weights(tmp_path / folder, adapter_name="a")
        torch.testing.assert_close(change(stock), factor * expected, rtol=0, atol=1e-6)
        stock.unload_lora_weights()
