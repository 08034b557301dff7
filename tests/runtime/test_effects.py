"""Toggles that are on are counted, and one that does nothing raises."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, LayerSkipConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig

from diffusers_cogvideox.runtime import effects
from diffusers_cogvideox.runtime.effects import Effect, Finding, NoEffectError, calls_of, summary
from diffusers_cogvideox.runtime.streaming import stream
from parity import StockPipeline
from tiny_pipeline import call

CPU = torch.device("cpu")


@pytest.fixture
def own(pipe):
    """A pipeline with a transformer that the test may change."""
    weights = pipe.transformer.state_dict()
    pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).eval()
    pipe.transformer.load_state_dict(weights)
    return pipe


@pytest.fixture
def backends(monkeypatch):
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)


def latents(pipe, **options):
    return call(pipe, output_type="latent", **options)


def add_lora(transformer, layers=("to_q", "to_out.0")):
    transformer.add_adapter(LoraConfig(r=2, target_modules=list(layers), init_lora_weights=False))


TOGGLES = {
    "the feature cache": lambda t: t.enable_cache(FirstBlockCacheConfig(threshold=100.0)),
    "the attention backend": lambda t: t.set_attention_backend("_native_math"),
    "fused q, k and v": lambda t: t.fuse_qkv_projections(),
    "LoRA": add_lora,
    "layerwise casting": lambda t: t.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32),
    "group offloading": lambda t: t.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
    "compilation": lambda t: t.compile_repeated_blocks(backend="eager"),
}
# One pass per step, 3 steps, 2 blocks: each block's attention, its to_qkv, its two adapters; the hooks of the linear layers.
HITS = {"the feature cache": 2, "the attention backend": 2, "fused q, k and v": 2, "LoRA": 4, "compilation": 2}


@pytest.mark.parametrize("name", TOGGLES)
def test_what_is_on_is_counted(own, backends, name):
    assert summary(own) == []
    TOGGLES[name](own.transformer)
    assert summary(own) == [Finding(name)]
    latents(own)
    (finding,) = summary(own)
    assert finding.name == name
    assert finding.hits == HITS[name] if name in HITS else finding.hits > 10
    latents(own)  # every call counts anew, and leaves no probe behind
    assert summary(own) == [finding]
    assert not any(layer._forward_pre_hooks for layer in own.transformer.modules())


def test_offloading_by_accelerate(own, monkeypatch):
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(own.transformer, CPU)
    latents(own)
    (finding,) = summary(own)
    assert finding.name == "CPU offloading" and finding.hits >= 1


def test_stocks_transformer_ignores_the_backend(own, backends, loaded, tmp_path):
    """Accepted as a component, it computes its attention past diffusers' dispatcher: the first step says so."""
    loaded.save_pretrained(tmp_path)
    own.transformer = StockPipeline.from_pretrained(tmp_path).transformer
    steps = []
    options = {"callback_on_step_end": lambda _pipe, index, *_: steps.append(index) or {}}
    latents(own, **options)
    assert len(steps) == 3
    own.transformer.set_attention_backend("_native_math")
    with pytest.raises(NoEffectError, match=r"the attention backend is on and did nothing in the first step: no attention layer"):
        latents(own, **options)
    assert len(steps) == 3


def test_a_cache_without_hits_loses_nothing(own):
    plain = latents(own)
    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with pytest.raises(NoEffectError, match=r"the feature cache .* whole loop: every layer was computed; raise its threshold") as caught:
        latents(own)
    torch.testing.assert_close(caught.value.latents, plain, rtol=0, atol=0)
    own.transformer.disable_cache()
    frames = call(own)
    torch.testing.assert_close(own.decode_frames(caught.value.latents, output_type="pt"), frames, rtol=0, atol=0)


def test_an_interrupted_loop_is_not_blamed(own):
    def stop(pipe, *_):
        pipe._interrupt = True
        return {}

    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    assert latents(own, callback_on_step_end=stop).isfinite().all()


def test_an_adapter_in_a_layer_that_is_skipped(own):
    add_lora(own.transformer, ["transformer_blocks.1.attn1.to_q"])
    own.transformer.enable_cache(LayerSkipConfig([1]))
    with pytest.raises(NoEffectError, match="LoRA is on and did nothing in the first step"):
        latents(own)
    own.transformer.disable_adapters()
    assert [finding.name for finding in summary(own)] == ["the feature cache"]
    assert latents(own).isfinite().all()


def test_nothing_is_counted_inside_compiled_regions(own, backends):
    """A hook there would compile the region once more; the answer is then that nobody knows."""
    own.transformer.fuse_qkv_projections()
    own.transformer.compile_repeated_blocks(backend="eager")
    latents(own)
    assert summary(own) == [Finding("fused q, k and v", None), Finding("compilation", 2)]


def test_what_may_have_nothing_to_do_is_only_reported(own):
    own.vae.enable_tiling()
    try:
        assert latents(own).isfinite().all()
        assert summary(own) == [Finding("tiles of the VAE", None)]
    finally:
        own.vae.disable_tiling()


@pytest.mark.parametrize("works", [True, False])
def test_another_toggle_is_one_line(own, monkeypatch, works):
    monkeypatch.setattr(effects, "_effects", {})

    def parts(pipe):
        return [pipe.transformer.proj_out] if works else [torch.nn.Identity()]

    effects.register(Effect("the toggle", lambda _: True, lambda pipe: calls_of(parts, pipe), "leave it out"))
    if works:
        latents(own)
        assert summary(own) == [Finding("the toggle", 1)]
    else:
        with pytest.raises(NoEffectError, match=r"^the toggle is on and did nothing in the first step: leave it out\.$"):
            latents(own)


def test_the_whole_table_names_a_remedy():
    assert len(effects._effects) >= 10
    assert all(effect.remedy or effect.conditional for effect in effects._effects.values())


MEASURES = {
    "samples one by one": lambda t, _: t.split_batch(),
    "feed-forward networks in chunks": lambda t, _: t.chunk_feed_forward(4),
    "released modulation": lambda t, _: t.release_modulation(),
    "streamed weights": lambda t, folder: stream(t, CPU, source="disk", directory=folder),
}


@pytest.mark.parametrize("name", MEASURES)
def test_measures_against_memory_are_counted(own, name, tmp_path):
    own.transformer.save_pretrained(tmp_path)
    MEASURES[name](own.transformer, tmp_path)
    latents(own)
    (finding,) = summary(own)
    assert finding.name == name
    assert finding.hits is None if name == "released modulation" else finding.hits >= 2
    assert own.report().effects == (finding,)
