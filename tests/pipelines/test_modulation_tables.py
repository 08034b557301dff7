"""The denoise loop with modulation tables: the same latents as without, and the layers themselves are not used in it."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, FirstBlockCacheConfig
from peft import LoraConfig

from diffusers_cogvideox import CogVideoXDDIMScheduler, CogVideoXPipeline, ContextWindows, SkipLayers
from diffusers_cogvideox.models.block import AdaLayerNorm
from diffusers_cogvideox.pipelines.denoising import Predictor
from tiny_pipeline import call

EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def without_tables(monkeypatch):
    """without_tables(pipe, **options): what a call gives when the layers compute in every step."""

    def made(pipe, **options):
        with monkeypatch.context() as patch:
            patch.setattr(Predictor, "tabulated", lambda *_: nullcontext())
            return latents(pipe, **options)

    return made


def latents(pipe, **options):
    return call(pipe, output_type="latent", **options)


def count_layers(pipe):
    calls = []
    for module in pipe.transformer.modules():
        if isinstance(module, AdaLayerNorm):
            module.linear.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture
def own(folders):
    """A pipeline whose models a test may change."""
    return CogVideoXPipeline.from_pretrained(folders())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sequential_guidance": True},
        {"guidance_interval": (0.3, 0.9)},
        {"guider": AdaptiveProjectedGuidance()},
        {"skip_layers": SkipLayers([1])},
        {"num_frames": 33, "context": ContextWindows(frames=17, overlap=8)},
        {"generator": [torch.Generator().manual_seed(i) for i in range(2)], "num_videos_per_prompt": 2},
    ],
    ids=["plain", "sequential", "interval", "guider", "skip", "windows", "batch"],
)
def test_the_loop_looks_modulations_up(own, without_tables, options):
    state = [g.get_state() for g in options.get("generator", [])]
    exact = without_tables(own, **options)
    for generator, before in zip(options.get("generator", []), state, strict=True):
        generator.set_state(before)
    calls = count_layers(own)
    torch.testing.assert_close(latents(own, **options), exact, **EXACT)
    assert len(calls) == 5, "each of two blocks' two norms and the last one, once for all steps"


def test_a_callback_may_change_a_lora(own, without_tables):
    own.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["norm1.linear", "to_q"], init_lora_weights=False))

    def switch(pipe, step, *_):
        pipe.enable_lora() if step else pipe.disable_lora()
        return {}

    exact = without_tables(own, callback_on_step_end=switch)
    torch.testing.assert_close(latents(own, callback_on_step_end=switch), exact, **EXACT)
    assert (latents(own) - exact).abs().max() > 1e-2


def test_a_callback_may_run_the_transformer_elsewhere(own, without_tables):
    seen = []

    def look(pipe, step, timestep, tensors):
        x = tensors["latents"]
        seen.append(pipe.transformer(x, torch.ones(1, 7, 24), timestep=3, return_dict=False)[0])
        other = CogVideoXPipeline(**pipe.components | {"scheduler": CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)})
        seen.append(latents(other, num_inference_steps=2))
        return {}

    exact = without_tables(own, callback_on_step_end=look)
    torch.testing.assert_close(latents(own, callback_on_step_end=look), exact, **EXACT)
    half = len(seen) // 2
    torch.testing.assert_close(seen[half:], seen[:half], **EXACT)


def test_a_feature_cache_and_an_error_leave_nothing_behind(own, without_tables):
    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    exact = without_tables(own)
    torch.testing.assert_close(latents(own), exact, **EXACT)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        latents(own, callback_on_step_end=fail)
    assert own.transformer.modulation is None
    assert all(module.table is None for module in own.transformer.modules() if isinstance(module, AdaLayerNorm))


def test_model_offloading(own, without_tables):
    exact = without_tables(own)
    own.enable_model_cpu_offload(device="cpu")
    own.transformer.release_modulation()
    torch.testing.assert_close(latents(own), exact, **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["to", "enable_model_cpu_offload"])
def test_weights_leave_an_accelerator_and_come_back(own, without_tables, method):
    getattr(own, method)("cuda")
    exact = without_tables(own)
    own.transformer.release_modulation()
    away = []

    def look(pipe, *_):
        away.append(pipe.transformer.modulation.released)
        return {}

    torch.testing.assert_close(latents(own, callback_on_step_end=look), exact, **EXACT)
    layers = [module.linear for module in own.transformer.modules() if isinstance(module, AdaLayerNorm)]
    assert set(away) == {sum(p.nbytes for layer in layers for p in layer.parameters())}
    assert all(p.isfinite().all() for layer in layers for p in layer.parameters())
