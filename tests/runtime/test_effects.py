"""Toggles that are on are counted, and one that does nothing raises."""

from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, TensorParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from torch import distributed as dist

from diffusers_cogvideox.pipelines.denoising import Predictor
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


class WholeNumbers(torch.nn.Module):
    """A linear layer with weights in eight bits, as loaders of quantised weights make them."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.weight = torch.nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def quantise_a_layer(transformer):
    net = transformer.transformer_blocks[1].ff.net
    net[2] = WholeNumbers(net[2])


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def on_transformer(act):
    return lambda pipe, _: act(pipe.transformer)


# Each is turned on in a pipeline, whose transformer is also in a folder.
TOGGLES = {
    "the feature cache": on_transformer(lambda t: t.enable_cache(FirstBlockCacheConfig(threshold=100.0))),
    "the attention backend": on_transformer(lambda t: t.set_attention_backend("_native_math")),
    "fused q, k and v": on_transformer(lambda t: t.fuse_qkv_projections()),
    "LoRA": on_transformer(add_lora),
    "layerwise casting": on_transformer(lambda t: t.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)),
    "group offloading": on_transformer(lambda t: t.enable_group_offload(onload_device=CPU, offload_type="leaf_level")),
    "CPU offloading": on_transformer(lambda t: cpu_offload_with_hook(t, CPU)),
    "compilation": on_transformer(lambda t: t.compile_repeated_blocks(backend="eager")),
    "streamed weights": lambda pipe, folder: stream(pipe.transformer, CPU, source="disk", directory=folder),
    "quantisation": on_transformer(quantise_a_layer),
    "parallelism": on_transformer(lambda t: t.enable_parallelism(config=TensorParallelConfig(tp_degree=1))),
    "samples shared by ranks": on_transformer(lambda t: t.enable_batch_parallelism()),
    "rows of the VAE shared by ranks": lambda pipe, _: pipe.vae.enable_row_parallelism(),
    "samples one by one": on_transformer(lambda t: t.split_batch()),
    "feed-forward networks in chunks": on_transformer(lambda t: t.chunk_feed_forward(4)),
    "released modulation": on_transformer(lambda t: t.release_modulation()),
    "tiles of the VAE": lambda pipe, _: pipe.vae.enable_tiling(),
    "slices of the VAE": lambda pipe, _: pipe.vae.enable_slicing(),
}
# In the first of 3 steps, with 2 blocks and 2 samples of 7 + 18 tokens: each block's attention, its to_qkv, its two adapters, its network
# for each 4 tokens; for the cache, blocks that are spared; what brings weights brings some for the tables of modulations, too.
# Layerwise casting and group offloading have hooks on many layers.
HITS = {
    "the feature cache": 2,
    "the attention backend": 2,
    "fused q, k and v": 2,
    "LoRA": 4,
    "CPU offloading": 2,
    "compilation": 2,
    "streamed weights": 6,
    "quantisation": 1,
    "parallelism": 2,
    "samples one by one": 4,
    "feed-forward networks in chunks": 14,
}
MAY_DO_NOTHING = {name for name, effect in effects._effects.items() if effect.conditional}


@pytest.fixture(params=TOGGLES)
def toggled(request, own, backends, alone, tmp_path):
    """The name of a toggle, and a pipeline in which it is on."""
    assert summary(own) == []
    own.transformer.save_pretrained(tmp_path)
    TOGGLES[request.param](own, tmp_path)
    assert summary(own) == [Finding(request.param)]
    yield request.param, own
    for turn_off in (own.vae.disable_tiling, own.vae.disable_slicing, own.vae.disable_row_parallelism):
        turn_off()


def test_every_toggle_is_tested():
    assert set(TOGGLES) == set(effects._effects)


def test_what_is_on_is_counted(toggled):
    name, pipe = toggled
    latents(pipe)
    (finding,) = pipe.report().effects
    assert finding.name == name
    if name in MAY_DO_NOTHING:
        assert finding.hits is None
    else:
        assert finding.hits == HITS.get(name, finding.hits), finding
        assert name in HITS or finding.hits > 10
    latents(pipe)  # every call counts anew, and leaves no probe behind
    assert summary(pipe) == [finding]
    hooks = [hook for layer in pipe.transformer.modules() for hook in layer._forward_pre_hooks.values()]
    assert not any("calls_of" in hook.__qualname__ for hook in hooks)


def test_what_is_on_and_does_nothing_raises(toggled, monkeypatch):
    """A transformer that makes its prediction in another way passes all of them by."""
    name, pipe = toggled
    monkeypatch.setattr(pipe.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    monkeypatch.setattr(Predictor, "tabulated", lambda *_: nullcontext())
    if name in MAY_DO_NOTHING:
        latents(pipe)
        assert summary(pipe) == [Finding(name)]
    else:
        remedy = effects._effects[name].remedy[:12]
        with pytest.raises(NoEffectError, match=f"^{name} is on and did nothing in the (first step|whole loop): {remedy}"):
            latents(pipe)


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
