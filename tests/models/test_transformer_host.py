"""What diffusers, peft and torch do to models works on ours: LoRA, caches, skipping, checkpointing, casting, offload, compilation."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, LayerSkipConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig, TextKVCacheConfig
from diffusers.hooks import apply_layer_skip
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from peft import LoraConfig

from diffusers_cogvideox.models.attention import CogVideoXAttnProcessor
from diffusers_cogvideox.models.block import CogVideoXBlock
from transformer_cases import inputs, tiny_twins

TOLERANCE = {"rtol": 0, "atol": 2e-5}


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


@pytest.fixture
def registered(monkeypatch):
    """Our block and processor in diffusers' tables, as the package registers them; taken out again afterwards."""
    block = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    processor = AttentionProcessorMetadata(skip_processor_output_fn=lambda *_, **k: (k["hidden_states"], k["encoder_hidden_states"]))
    for table in (TransformerBlockRegistry, AttentionProcessorRegistry):
        table._register()
        monkeypatch.setattr(table, "_registry", dict(table._registry))
    TransformerBlockRegistry.register(CogVideoXBlock, block)
    AttentionProcessorRegistry.register(CogVideoXAttnProcessor, processor)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# --- caches and guidance hooks ----------------------------------------------------------------------------------------


def test_first_block_cache_skips_the_other_blocks(registered):
    ours, stock = tiny_twins("5b", num_layers=3)
    kwargs = inputs(stock)
    exact = forward(stock, kwargs)
    calls = count_calls(ours.transformer_blocks[1].ff)
    ours.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with ours.cache_context("cond_uncond"):
        torch.testing.assert_close(forward(ours, kwargs), exact, **TOLERANCE)
        torch.testing.assert_close(forward(ours, kwargs), exact, **TOLERANCE)  # from the cached residual
        assert len(calls) == 1
        moved = forward(ours, kwargs | {"hidden_states": -kwargs["hidden_states"]})
        assert len(calls) == 2
    assert (moved - exact).abs().max() > 0.1
    ours.disable_cache()
    torch.testing.assert_close(forward(ours, kwargs), exact, **TOLERANCE)


def test_pyramid_attention_broadcast_reuses_attention():
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 800), current_timestep_callback=lambda: 500
    )
    calls = count_calls(ours.transformer_blocks[0].attn1.to_q)
    ours.enable_cache(config)
    for _ in range(4):
        forward(ours, kwargs)
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{"cache_identifiers": [r"transformer_blocks\.\d+\.attn1"]}, {"use_lite_mode": True}, {}])
def test_taylorseer_predicts_attention(options):
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    calls = count_calls(ours.transformer_blocks[0].attn1.to_q)
    ours.enable_cache(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, **options))
    with ours.cache_context("cond_uncond"):
        for _ in range(6):
            forward(ours, kwargs)
    assert len(calls) == 3


@pytest.mark.parametrize("config", [TaylorSeerCacheConfig(cache_identifiers=["attn"]), TextKVCacheConfig()])
def test_caches_that_reach_nothing_are_refused(config):
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    before = forward(ours, kwargs)
    with pytest.raises(ValueError, match=f"{type(config).__name__} as given reaches no layer .* such as transformer_blocks.0.attn1"):
        ours.enable_cache(config)
    assert not ours.is_cache_enabled
    torch.testing.assert_close(forward(ours, kwargs), before, rtol=0, atol=0)
    ours.enable_cache(FirstBlockCacheConfig(threshold=0.5))


@pytest.mark.parametrize(
    "config",
    [
        LayerSkipConfig([0], skip_attention=True, skip_ff=False),
        LayerSkipConfig([0], skip_attention=False, skip_ff=False, skip_attention_scores=True),
        LayerSkipConfig([0], skip_attention=False, skip_ff=True),
        LayerSkipConfig([0]),
    ],
    ids=["attention", "scores", "ff", "block"],
)
def test_layers_can_be_skipped(config, registered):
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    exact = forward(ours, kwargs)
    calls = count_calls(ours.transformer_blocks[0].attn1.to_q)
    apply_layer_skip(ours, config)
    skipped = forward(ours, kwargs)
    assert skipped.isfinite().all()
    assert (skipped - exact).abs().max() > 1e-2
    assert bool(calls) == (not config.skip_attention)


# --- LoRA -------------------------------------------------------------------------------------------------------------


def lora_twins(tmp_path):
    """Our model with an adapter that stock made and saved, and stock's."""
    ours, stock = tiny_twins("5b")
    stock.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    stock.save_lora_adapter(tmp_path)
    ours.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    return ours, stock


def test_lora_of_stock_loads_and_scales(tmp_path):
    ours, stock = lora_twins(tmp_path)
    kwargs = inputs(stock)
    outputs = []
    for scale in (0.0, 0.5, 1.0):
        scaled = kwargs | {"attention_kwargs": {"scale": scale}}
        outputs.append(forward(ours, scaled))
        torch.testing.assert_close(outputs[-1], forward(stock, scaled), **TOLERANCE)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2
    ours.disable_lora()
    torch.testing.assert_close(forward(ours, kwargs), outputs[0], **TOLERANCE)


def test_lora_trains_only_the_adapter():
    ours, _ = tiny_twins("5b")
    ours.requires_grad_(False)
    ours.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    ours.enable_gradient_checkpointing()
    ours(**inputs(ours))[0].square().mean().backward()
    trained = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {name for name, _ in ours.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 4 * 2


# --- training and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_checkpointing_changes_no_gradient(variant):
    ours, _ = tiny_twins(variant)
    kwargs = inputs(ours)
    calls = count_calls(ours.transformer_blocks[0].ff)
    gradients = []
    for prepare in (ours.disable_gradient_checkpointing, ours.enable_gradient_checkpointing):
        prepare()
        ours.zero_grad()
        ours(**kwargs)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert len(calls) == 3, "once without and twice with checkpointing"
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_equals_stocks(storage):
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    exact = forward(stock, kwargs)
    for model in (ours, stock):
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert {n for n, p in ours.named_parameters() if p.dtype == storage} == {n for n, p in stock.named_parameters() if p.dtype == storage}
    cast = forward(ours, kwargs)
    torch.testing.assert_close(cast, forward(stock, kwargs), **TOLERANCE)
    assert 1e-4 < (cast - exact).std() < 0.2


@pytest.mark.parametrize("how", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_group_offload_changes_nothing(how):
    ours, _ = tiny_twins("5b-i2v")
    kwargs = inputs(ours)
    exact = forward(ours, kwargs)
    ours.enable_group_offload(onload_device=torch.device("cpu"), **how)
    torch.testing.assert_close(forward(ours, kwargs), exact, rtol=0, atol=0)


# --- compilation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_blocks_compile_without_graph_breaks(fresh_compiler):
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    ours.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), **TOLERANCE)
    assert all(block._compiled_call_impl is not None for block in ours.transformer_blocks)


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
def test_whole_model_compiles_without_graph_breaks(variant, fresh_compiler):
    ours, stock = tiny_twins(variant)
    kwargs = inputs(stock)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    torch.testing.assert_close(forward(compiled, kwargs), forward(stock, kwargs), **TOLERANCE)
