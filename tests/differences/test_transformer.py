"""The transformer: what diffusers does, and what we do."""

import pytest
import torch
from diffusers import LayerSkipConfig, SeaCacheConfig, TaylorSeerCacheConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import logging

from diffusers_cogvideox import CogVideoXPipeline
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
    stock.enable_cache(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1))
    counts = []
    for _ in range(5):
        calls.clear()
        with stock.cache_context("cond_uncond"):
            forward(stock, kwargs)
        counts.append(len(calls))
    assert len(set(counts)) == 1
    with pytest.raises(ValueError, match="reaches no layer"):
        ours.enable_cache(TaylorSeerCacheConfig())


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


def test_d12_layers_skip_their_attention():
    config = LayerSkipConfig([0], fqn="transformer_blocks", skip_attention=True, skip_ff=False)
    ours, stock = tiny_twins("5b")
    with pytest.raises(ValueError, match="not registered"):
        apply_layer_skip(stock, config)
        forward(stock, inputs(stock))
    apply_layer_skip(ours, config)
    assert forward(ours, inputs(ours)).isfinite().all()


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
