"""The attention module: dispatched, replaceable, and fusable without a second copy of the weights."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from peft import LoraConfig
from torch import nn

from diffusers_cogvideox.models import backends
from diffusers_cogvideox.models.attention import CogVideoXAttention
from transformer_cases import inputs, tiny_twins


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


@pytest.fixture
def calls(monkeypatch):
    """Names of the attention backends in the order they are called; the global choice is restored afterwards."""
    made = []
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    kernels = {name: _AttentionBackendRegistry._backends[name] for name in ("native", "_native_math", "flex")}
    for name, backend in kernels.items():

        def counted(*args, name=name, backend=backend, **kwargs):
            made.append(name)
            return backend(*args, **kwargs)

        monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(name), counted)
    monkeypatch.setattr(backends, "check_backend", lambda *_: None)  # which would call them, too
    return made


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_backend_takes_effect(calls):
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    expected = forward(stock, kwargs)
    ours.set_attention_backend("_native_math")
    torch.testing.assert_close(forward(ours, kwargs), expected, rtol=0, atol=2e-5)
    assert calls == ["_native_math"] * 2
    ours.reset_attention_backend()
    with attention_backend("flex"):
        torch.testing.assert_close(forward(ours, kwargs), expected, rtol=0, atol=2e-5)
    assert calls[2:] == ["flex"] * 2
    ours.set_attention_backend("native")
    forward(ours, kwargs)
    assert calls[4:] == ["native"] * 2


def test_stock_processor_can_be_set():
    ours, stock = tiny_twins("5b")
    assert ours.attn_processors.keys() == stock.attn_processors.keys()
    kwargs = inputs(stock)
    ours.set_attn_processor(CogVideoXAttnProcessor2_0())
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_fusing_keeps_size_and_output_and_can_be_undone(bias):
    ours, stock = tiny_twins("1.5-5b", attention_bias=bias)
    ours.transformer_blocks.requires_grad_(False)
    kwargs = inputs(stock)
    expected, size, state = forward(stock, kwargs), ours.num_parameters(), ours.state_dict()

    ours.fuse_qkv_projections()
    ours.fuse_qkv_projections()
    assert ours.num_parameters() == size
    assert {k.split(".")[-2] for k in ours.state_dict() if "attn1.to_" in k} == {"to_qkv", "0"}
    torch.testing.assert_close(forward(ours, kwargs), expected, rtol=0, atol=2e-5)

    ours.unfuse_qkv_projections()
    ours.unfuse_qkv_projections()
    restored = ours.state_dict()
    assert restored.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(restored[key], value, rtol=0, atol=0)
    assert not any(p.requires_grad or p.untyped_storage().nbytes() > p.nbytes for p in ours.transformer_blocks.parameters())
    torch.testing.assert_close(forward(ours, kwargs), expected, rtol=0, atol=2e-5)


def test_fused_projections_train():
    attention = CogVideoXAttention(32, 2, 16)
    video, text = torch.randn(1, 6, 32), torch.randn(1, 3, 32)
    attention.fuse_projections()
    sum(out.square().mean() for out in attention(video, text)).backward()
    assert attention.to_qkv.weight.grad.abs().sum() > 0
    with torch.no_grad():
        attention.to_qkv.weight.mul_(2)
    doubled = attention.to_qkv.weight.clone()
    attention.unfuse_projections()
    torch.testing.assert_close(torch.cat([attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]), doubled)


def test_fused_projections_refuse_what_needs_the_separate_ones(tmp_path):
    ours, stock = tiny_twins("5b")
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"])
    stock.add_adapter(lora)
    stock.save_lora_adapter(tmp_path)
    ours.fuse_qkv_projections()
    for name, act in {
        "add_adapter": lambda: ours.add_adapter(lora),
        "load_lora_adapter": lambda: ours.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors"),
        "save_pretrained": lambda: ours.save_pretrained(tmp_path),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} needs the separate.*unfuse_qkv_projections\(\) first"):
            act()
    ours.unfuse_qkv_projections()
    ours.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"to_q is a Linear, and only plain linear projections can be fused. Unload LoRA"):
        ours.fuse_qkv_projections()


def test_fusing_refuses_hooked_layers():
    ours, _ = tiny_twins("5b")
    ours.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="to_q carries an offload or casting hook"):
        ours.fuse_qkv_projections()


def test_unfusing_refuses_hooked_layers():
    attention = CogVideoXAttention(32, 2, 16)
    attention.fuse_projections()
    attention.to_qkv = nn.Sequential(attention.to_qkv)
    with pytest.raises(ValueError, match="to_qkv is a Sequential, and only plain linear projections can be split"):
        attention.unfuse_projections()
