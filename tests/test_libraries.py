"""Other packages that dispatch on diffusers' class names work on our pipelines as they do on diffusers' own."""

import pytest
import torch

from diffusers_cogvideox import CogVideoXPipeline, registered
from diffusers_cogvideox.runtime.effects import summary
from parity import StockPipeline, randomize
from tiny_pipeline import call, save_stock_folder

STEPS = 8


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """Our pipeline and diffusers', with equal transformers of 4 blocks."""
    folder = save_stock_folder(tmp_path_factory.mktemp("libraries"))
    made = [cls.from_pretrained(folder) for cls in (CogVideoXPipeline, StockPipeline)]
    for pipe in made:
        pipe.transformer = randomize(type(pipe.transformer).from_config(pipe.transformer.config, num_layers=4)).eval()
    return made


def latents(pipe):
    return call(pipe, num_inference_steps=STEPS, output_type="latent")


def test_cache_dit_spares_the_same_steps(pipes):
    """cache-dit takes the name of our package for diffusers' and asks for the class on the diffusers module: `register` puts ours there."""
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed: pip install 'diffusers-cogvideox[caches]'")
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=10.0)
    made = []
    for pipe in pipes:
        plain, runs = latents(pipe), []
        handle = pipe.transformer.transformer_blocks[2].ff.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        if isinstance(pipe, StockPipeline):
            cache_dit.enable_cache(pipe, cache_config=config)
        else:
            with registered():
                cache_dit.enable_cache(pipe, cache_config=config)
        made.append(latents(pipe))
        assert len(runs) == 2  # its warm-up; the other 6 steps are spared
        assert (made[-1] - plain).abs().max() > 1e-3
        cache_dit.disable_cache(pipe)
        torch.testing.assert_close(latents(pipe), plain, rtol=0, atol=0)
        handle.remove()
    torch.testing.assert_close(*made, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_peft_adapters_in_the_pipeline(pipes):
    """Two adapters made by peft, weighted, merged into the weights and taken out again."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'diffusers-cogvideox[train]'")
    made = []
    for pipe in pipes:
        plain = latents(pipe)
        for number, dora in enumerate((False, True)):
            torch.manual_seed(number)
            config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_out.0"], use_dora=dora, init_lora_weights=False)
            pipe.transformer.add_adapter(config, adapter_name=f"number{number}")
        pipe.set_adapters(["number0", "number1"], [0.5, 0.25])
        made.append(latents(pipe))
        assert (made[-1] - plain).abs().max() > 1e-3
        if isinstance(pipe, CogVideoXPipeline):
            (finding,) = summary(pipe)
            assert finding.name == "LoRA" and finding.hits >= 4 * 2 * 2  # blocks, layers, adapters; DoRA multiplies twice
        pipe.fuse_lora(adapter_names=["number0"], components=["transformer"])
        pipe.unfuse_lora(components=["transformer"])
        pipe.delete_adapters(["number0", "number1"])
        torch.testing.assert_close(latents(pipe), plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(*made, rtol=0, atol=1e-3)
