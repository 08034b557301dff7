"""The transformer: what diffusers does, and what we do."""

import json
import re
from collections import Counter

import pytest
import torch
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import logging

from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.models import backends
from parity import StockPipeline
from tiny_pipeline import call
from transformer_cases import inputs, tiny_twins


@torch.no_grad()
def forward(model, kwargs):
    return model(**kwargs)[0]


@pytest.fixture
def quiet():
    """diffusers' warnings off: what it warns about is what is tested."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def count_calls(module) -> list[int]:
    """A list that grows by one whenever the module computes."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def count_runs(model) -> list[int]:
    """A list that grows by one whenever the last block computes."""
    runs = []
    model.transformer_blocks[-1].ff.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_d1_attention_backends(monkeypatch):
    calls = []
    native = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, lambda *a, **k: calls.append(1) or native(*a, **k)
    )
    ours, stock = tiny_twins("5b")
    stock.set_attention_backend("_native_math")
    assert _AttentionBackendRegistry._active_backend is AttentionBackendName._NATIVE_MATH
    forward(stock, inputs(stock))
    assert not calls
    monkeypatch.setattr(backends, "check_backend", lambda *_: None)  # which would call it, too
    ours.set_attention_backend("_native_math")
    forward(ours, inputs(ours))
    assert len(calls) == 2


def test_d5_repeated_blocks():
    ours, stock = tiny_twins("5b")
    with pytest.raises(ValueError, match="_repeated_blocks"):
        stock.compile_repeated_blocks(backend="eager")
    ours.compile_repeated_blocks(backend="eager")


def test_d7_caches_that_match_nothing():
    ours, stock = tiny_twins("5b")
    kwargs, calls = inputs(stock), []
    for layer in stock.transformer_blocks.modules():
        layer.register_forward_hook(lambda *_: calls.append(1))
    runs = count_calls(ours.transformer_blocks[0].attn1.to_q)
    counts = []
    for model in (stock, ours):
        model.enable_cache(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1))
    for _ in range(5):
        calls.clear()
        for model in (stock, ours):
            with model.cache_context("cond_uncond"):
                forward(model, kwargs)
        counts.append(len(calls))
    assert len(set(counts)) == 1
    assert len(runs) == 2  # steps 0 and 2
    ours.disable_cache()
    with pytest.raises(ValueError, match="reaches no layer"):
        ours.enable_cache(TaylorSeerCacheConfig(cache_identifiers=["attn"]))


def test_d8_seacache_skips_steps(loaded, quiet):
    """SeaCache needs the step, the noise level in flow matching's terms, and the latents; diffusers' pipeline tells it none of them."""
    runs = []
    for cls in (CogVideoXPipeline, StockPipeline):
        pipe = cls(**loaded(cls).components)
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).eval()
        pipe.transformer.enable_cache(SeaCacheConfig(threshold=10.0))
        runs.append(count_runs(pipe.transformer))
        call(pipe, num_inference_steps=6, output_type="latent")
    assert [len(run) for run in runs] == [3, 6]  # the first and the last step, and one after two that were skipped


@pytest.mark.parametrize("changed", ["noise", "image"])
def test_d8_seacache_compares_the_noisy_latents_alone(changed):
    """A new step is computed when these have changed; the channels of an image, the second half, do not count."""
    model = tiny_twins("5b-i2v")[0]
    kwargs, runs = inputs(model), count_runs(model)
    model.enable_cache(SeaCacheConfig(threshold=1e-3))
    for index in range(2):
        with model.cache_context("cond_uncond", step_index=index, num_inference_steps=6, sigma=0.5):
            forward(model, kwargs)
        half = slice(0, 4) if changed == "noise" else slice(4, 8)
        kwargs["hidden_states"][:, :, half] += 1
    assert len(runs) == (2 if changed == "noise" else 1)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_d8_the_pipeline_tells_caches_where_it_is(loaded, sampler, monkeypatch):
    """abar = 0 at timestep 999 is noise alone, s = 1; later s = sigma / (alpha + sigma)."""
    seen = []
    for cls in (CogVideoXPipeline, StockPipeline):
        pipe = cls(**loaded(cls, "5b", sampler).components)
        original = pipe.transformer.cache_context
        monkeypatch.setattr(pipe.transformer, "cache_context", lambda *a, o=original, **k: seen.append((a, k)) or o(*a, **k))
        call(pipe, num_inference_steps=2, output_type="latent")
    abar = float(pipe.scheduler.alphas_cumprod[499])
    later = (1 - abar) ** 0.5 / (abar**0.5 + (1 - abar) ** 0.5)
    for index, (timestep, level) in enumerate([(999, 1.0), (499, later)]):
        expected = {"step_index": index, "num_inference_steps": 2, "timestep": timestep, "sigma": pytest.approx(level)}
        assert seen[index] == (("cond_uncond",), expected)
    assert seen[2:] == [(("cond_uncond",), {})] * 2


@pytest.fixture
def cached(loaded, quiet):
    """cached(pipeline class, cache): a pipeline whose transformer, one of its own, has this cache on."""

    def made(cls, config):
        pipe = cls(**loaded(cls).components)
        weights = pipe.transformer.state_dict()
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).eval()
        pipe.transformer.load_state_dict(weights)
        pipe.transformer.enable_cache(config)
        return pipe

    return made


def test_d9_magcache_counts_the_steps_of_the_loop(cached, capsys):
    """It starts anew after `num_inference_steps`, 28 by default, whatever the length of the loop."""
    with pytest.raises(ValueError, match="`mag_ratios` must be provided"):
        MagCacheConfig()
    options = {"num_inference_steps": 6, "output_type": "latent"}
    call(cached(CogVideoXPipeline, MagCacheConfig(calibrate=True, num_inference_steps=6)), **options)
    ratios = json.loads(re.search(r"\[[\d., ]+\]", capsys.readouterr().out)[0])
    assert len(ratios) == 6
    runs = {}
    for cls, counted in ((CogVideoXPipeline, 6), (StockPipeline, 6), (StockPipeline, 3)):
        pipe = cached(cls, MagCacheConfig(mag_ratios=ratios, num_inference_steps=counted, threshold=10.0))
        runs[cls, counted] = count_runs(pipe.transformer)
        call(pipe, **options)
    # A fifth of the steps at the start, then one after three that were skipped; or that of three steps, twice.
    assert [len(run) for run in runs.values()] == [2, 2, 2]
    ours = cached(CogVideoXPipeline, MagCacheConfig(mag_ratios=ratios, num_inference_steps=3))
    with pytest.raises(ValueError, match=r"num_inference_steps=3\) does not fit a loop of 6 steps, .* with num_inference_steps=6"):
        call(ours, **options)
    ours = cached(CogVideoXPipeline, MagCacheConfig(mag_ratios=ratios, num_inference_steps=6))
    with pytest.raises(ValueError, match="MagCache counts guided and unguided steps apart"):
        call(ours, guidance_interval=(0, 0.5), **options)


def test_d10_calls_outside_a_pipeline_name_their_kind():
    """The same in both: calls with and without a prompt that shared a state would skip each other's steps."""
    for model in tiny_twins("5b"):
        kwargs, runs = inputs(model), count_runs(model)
        model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        with pytest.raises(ValueError, match=r"Wrap the denoiser call in `model\.cache_context"):
            forward(model, kwargs)
        for name in ("cond", "uncond", "cond"):
            with model.cache_context(name):
                forward(model, kwargs)
        assert len(runs) == 2


def test_d11_each_half_of_the_guidance_decides_for_itself(cached):
    """The unconditional text changes at every step, so that its half has more to compute; in one batch, both do as one."""
    runs = {}
    for cls, options in ((CogVideoXPipeline, {"sequential_guidance": True}), (CogVideoXPipeline, {}), (StockPipeline, {})):
        pipe = cached(cls, FirstBlockCacheConfig(threshold=1.0))
        names, computed = [], []
        enter = pipe.transformer.cache_context
        pipe.transformer.cache_context = lambda name, enter=enter, names=names, **where: names.append(name) or enter(name, **where)
        pipe.transformer.transformer_blocks[-1].ff.register_forward_hook(lambda *_, n=names, c=computed: c.append(n[-1]))

        def louder(_pipe, index, _timestep, tensors):
            unconditional, conditional = tensors["prompt_embeds"].chunk(2)
            noise = torch.randn(unconditional.shape, generator=torch.Generator().manual_seed(index))
            return {"prompt_embeds": torch.cat([30 * noise, conditional])}

        watched = {"callback_on_step_end": louder, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        call(pipe, guidance_scale=1 + 1e-9, num_inference_steps=8, output_type="latent", **watched, **options)
        runs[cls, len(options)] = dict(Counter(computed))
    apart, together, stock = runs.values()
    assert set(apart) == {"cond", "uncond"} and apart["cond"] < apart["uncond"] < 8
    assert together == stock and set(stock) == {"cond_uncond"}


def test_d12_layers_skip_their_attention():
    config = LayerSkipConfig([0], fqn="transformer_blocks", skip_attention=True, skip_ff=False)
    ours, stock = tiny_twins("5b")
    with pytest.raises(ValueError, match="not registered"):
        apply_layer_skip(stock, config)
        forward(stock, inputs(stock))
    apply_layer_skip(ours, config)
    assert forward(ours, inputs(ours)).isfinite().all()


@pytest.mark.parametrize("how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_d34_norms_and_the_tables_of_offloading_and_casting(how):
    """diffusers' tables know no norms, because its CogVideoX calls each of them twice; both ways work in both."""
    calls = []
    for model in tiny_twins("5b"):
        kwargs = inputs(model)
        exact = forward(model, kwargs)
        model.enable_group_offload(onload_device=torch.device("cpu"), **how)
        torch.testing.assert_close(forward(model, kwargs), exact, rtol=0, atol=0)
        counted = []
        model.transformer_blocks[0].norm1.norm.register_forward_hook(lambda *_, c=counted: c.append(1))
        forward(model, kwargs)
        calls.append(len(counted))
    assert calls[1] == 2
    ours, stock = tiny_twins("5b")
    for model in (ours, stock):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = [{name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32} for model in (ours, stock)]
    assert kept[0] == kept[1] and "transformer_blocks.0.norm1.norm.weight" in kept[0]


def test_d33_fused_projections():
    ours, stock = tiny_twins("5b")
    separate = stock.num_parameters()
    for model in (ours, stock):
        model.fuse_qkv_projections()
    assert ours.num_parameters() == separate < stock.num_parameters()
    kwargs = inputs(stock)
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), rtol=0, atol=2e-5)


# --- found besides ----------------------------------------------------------------------------------------------------


def test_x6_inputs_that_do_not_fit():
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    torch.testing.assert_close(forward(stock, kwargs | {"ofs": torch.ones(1)}), forward(stock, kwargs))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        forward(stock, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"][:1]})
    for change in ({"ofs": torch.ones(1)}, {"encoder_hidden_states": kwargs["encoder_hidden_states"][:1]}):
        with pytest.raises(ValueError, match=r"\w+ .*"):
            forward(ours, kwargs | change)
