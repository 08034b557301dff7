"""Samples one after the other and tokens in chunks inside a block: the same results, in less memory, and what goes with them."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

from live_storages import live_peak
from transformer_cases import inputs, tiny_twins

ROUNDING = {"rtol": 0, "atol": 2e-6}
PAB = PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500)


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


def saving(variant="5b", batch=True, tokens=None, **changes):
    ours, stock = tiny_twins(variant, **changes)
    ours.split_batch(batch)
    ours.chunk_feed_forward(tokens)
    return ours, stock


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
@pytest.mark.parametrize("tokens", [None, 1000, 16, 5])
@pytest.mark.parametrize("batch", [True, False])
def test_results_stay_the_same(variant, tokens, batch):
    ours, stock = saving(variant, batch, tokens)
    kwargs = inputs(stock)
    exact = forward(stock, kwargs)
    torch.testing.assert_close(forward(ours, kwargs), exact, rtol=0, atol=2e-5)
    ours.split_batch(False)
    ours.chunk_feed_forward(None)
    plain = forward(ours, kwargs)
    ours.split_batch(batch)
    ours.chunk_feed_forward(tokens)
    torch.testing.assert_close(forward(ours, kwargs), plain, **ROUNDING)


def test_each_layer_sees_one_sample_and_few_tokens():
    ours, _ = saving(tokens=16)
    seen = []
    ours.transformer_blocks[0].ff.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))
    forward(ours, inputs(ours))  # 3 x 4 x 6 = 72 video tokens, 7 of text
    assert seen == 2 * [*4 * [(1, 16)], (1, 8), (1, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_nothing(dtype):
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    exact = forward(stock, kwargs)
    half = {name: value.to(dtype) if name.endswith("hidden_states") else value for name, value in kwargs.items()}
    error = (forward(stock.to(dtype), half) - exact).std()
    ours.to(dtype)
    ours.split_batch()
    ours.chunk_feed_forward(16)
    assert (forward(ours, half) - exact).std() <= 1.02 * error
    ours.keep_residual_in_float32()
    assert (forward(ours, half) - exact).std() <= 1.02 * error
    with torch.autocast("cpu", torch.bfloat16):
        assert forward(ours.float(), kwargs).isfinite().all()


def test_gradients_stay_the_same():
    gradients = []
    for batch, tokens in ((False, None), (True, 16)):
        ours, _ = saving("5b", batch, tokens)
        torch.manual_seed(0)
        kwargs = inputs(ours)
        ours.enable_gradient_checkpointing()
        ours(**kwargs)[0].square().mean().backward()
        gradients.append([p.grad for p in ours.parameters()])
    for saved, plain in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(saved, plain)


def test_a_mask_of_each_sample_goes_with_it():
    ours, stock = tiny_twins("5b")
    kwargs = inputs(ours)
    mask = torch.rand(2, 1, 79) < 0.7
    options = {"attention_kwargs": {"attention_mask": mask.expand(2, 79, 79)}}
    exact = forward(ours, kwargs | options)
    ours.split_batch()
    torch.testing.assert_close(forward(ours, kwargs | options), exact, **ROUNDING)
    assert (exact - forward(stock, kwargs)).abs().max() > 1e-3, "the mask has an effect"
    shared = {"attention_kwargs": {"attention_mask": mask[:1].expand(1, 79, 79)}}
    whole = forward(ours, kwargs | shared)
    ours.split_batch(False)
    torch.testing.assert_close(forward(ours, kwargs | shared), whole, **ROUNDING)


def test_arguments_are_not_written_to():
    ours, _ = saving(tokens=16)
    video, text = torch.randn(2, 72, 64), torch.randn(2, 7, 64)
    copies = video.clone(), text.clone()
    with torch.no_grad():
        ours.transformer_blocks[0](video, text, torch.randn(1, 32))
    assert torch.equal(video, copies[0])
    assert torch.equal(text, copies[1])


def test_memory_of_a_block_shrinks():
    """Live bytes of a pass on the meta device, in tensors like one sample's tokens; without attention, which has no kernel there."""
    peaks = {}
    for batch, tokens in ((False, None), (True, None), (True, 64)):
        ours, _ = saving("5b", batch, tokens)
        block = ours.transformer_blocks[0].to("meta")
        block.attn1.processor = lambda _, hidden_states, encoder_hidden_states, **__: (hidden_states.clone(), encoder_hidden_states.clone())
        args = [torch.empty(2, tokens, 64, device="meta") for tokens in (5000, 7)]
        peaks[batch, tokens] = live_peak(block, *args, torch.empty(1, 32, device="meta")) / (5007 * 64 * 4)
    # Per sample: tokens, their modulated form, the hidden layer before and after its activation; 4 D channels in it.
    assert peaks[False, None] == pytest.approx(2 * 10, rel=0.02)
    assert peaks[True, None] == pytest.approx(10 + 2, rel=0.02)
    assert peaks[True, 64] < 2 + 3.2


@pytest.mark.parametrize("config", [PAB, TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.attn1"])])
def test_caches_that_count_calls_inside_blocks_are_refused(config):
    ours, _ = saving(tokens=16)
    with pytest.raises(ValueError, match=r"counts the calls of 0.attn1, which split_batch\(\) .* call split_batch\(False\)"):
        ours.enable_cache(config)
    assert not ours.is_cache_enabled
    ours.split_batch(False)
    ours.chunk_feed_forward(None)
    ours.enable_cache(config)
    for method, value in ((ours.split_batch, True), (ours.chunk_feed_forward, 16)):
        with pytest.raises(ValueError, match=r"the feature cache on 0.attn1 counts calls: call disable_cache"):
            method(value)
    ours.disable_cache()
    ours.split_batch()


def test_caches_of_whole_blocks_go_with_it():
    ours, stock = saving(tokens=16, num_layers=3)
    kwargs = inputs(stock)
    exact = forward(stock, kwargs)
    ours.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with ours.cache_context("cond_uncond"):
        for _ in range(2):
            torch.testing.assert_close(forward(ours, kwargs), exact, rtol=0, atol=2e-5)


def test_less_than_a_token_is_refused():
    ours, _ = tiny_twins("5b")
    with pytest.raises(ValueError, match=r"chunk_feed_forward\(0\) is not possible: give 1 token or more"):
        ours.chunk_feed_forward(0)


def test_blocks_compile_without_graph_breaks():
    torch.compiler.reset()
    ours, stock = saving(tokens=16)
    kwargs = inputs(stock)
    ours.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), rtol=0, atol=2e-5)
    torch.compiler.reset()
