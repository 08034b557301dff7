"""Attention backends and compilation: every kernel gives the same numbers, or is refused; nothing is compiled twice."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from diffusers_cogvideox.models import backends
from diffusers_cogvideox.models.backends import check_backend
from transformer_cases import inputs, tiny_twins

ON_CPU = ["native", "_native_math", "_native_flash", "flex"]
NOT_ON_CPU = ["_native_efficient", "_native_cudnn"]
ABSENT = ["flash", "_flash_3", "sage", "xformers", "flash_hub", "sage_hub"]
SAYS_EAGER = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@SAYS_EAGER
@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("masked", [False, True])
def test_d1_backends_agree(name, masked):
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    before = _AttentionBackendRegistry.get_active_backend()
    if masked:
        tokens = 7 + kwargs["image_rotary_emb"][0].shape[0]
        kwargs["attention_kwargs"] = {"attention_mask": torch.rand(2, tokens, tokens) > 0.3}
    expected = forward(ours if masked else stock, kwargs)
    ours.set_attention_backend(name.upper())
    if masked and name == "_native_flash":
        with pytest.raises(ValueError, match=r"'_native_flash' cannot serve this model, heads of 32 .* with a mask: .*not supported"):
            forward(ours, kwargs)
    else:
        torch.testing.assert_close(forward(ours, kwargs), expected, rtol=0, atol=1e-5)
    assert _AttentionBackendRegistry.get_active_backend() == before
    ours.reset_attention_backend()
    assert {part._attention_backend for part in ours.attn_processors.values()} == {None}


@pytest.mark.parametrize("name", ["native", "_native_math", "flex"])
def test_backends_agree_when_compiled(name, fresh_compiler):
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    ours.set_attention_backend(name)
    ours.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), rtol=0, atol=1e-5)
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["_native_math", "_native_flash", "_native_efficient", "_native_cudnn"])
def test_backends_agree_on_a_gpu(name):
    ours, _ = tiny_twins("5b", num_attention_heads=1, attention_head_dim=64)
    ours.to("cuda", torch.bfloat16)
    kwargs = inputs(ours)
    kwargs |= {part: kwargs[part].to("cuda", torch.bfloat16) for part in ("hidden_states", "encoder_hidden_states")}
    expected = forward(ours, kwargs)
    ours.set_attention_backend(name)
    torch.testing.assert_close(forward(ours, kwargs), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("name", NOT_ON_CPU)
def test_a_kernel_that_is_not_for_this_device_is_refused(name):
    ours, stock = tiny_twins("5b")
    ours.set_attention_backend(name)
    with pytest.raises(ValueError, match=rf"'{name}' cannot serve this model, heads of 32 channels in torch.float32 on cpu"):
        forward(ours, inputs(stock))


@pytest.mark.parametrize("name", ABSENT)
def test_a_package_that_is_missing_is_named(name):
    ours, _ = tiny_twins("5b")
    with pytest.raises(RuntimeError, match=r"(?i)not usable"):
        ours.set_attention_backend(name)
    assert {part._attention_backend for part in ours.attn_processors.values()} == {None}


def test_unknown_names_and_deaf_processors_are_refused():
    ours, _ = tiny_twins("5b")
    with pytest.raises(ValueError, match="'fast' is unknown: use one of flash, "):
        ours.set_attention_backend("fast")
    ours.set_attn_processor(CogVideoXAttnProcessor2_0())
    with pytest.raises(ValueError, match="CogVideoXAttnProcessor2_0 does not ask"):
        ours.set_attention_backend("native")


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch):
    """One that ignores its mask, as those of packed sequences do with all but the keys' padding."""
    native = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_NPU, lambda query, key, value, **_: native(query, key, value)
    )
    fresh = check_backend.__wrapped__
    place = (16, torch.float32, torch.device("cpu"))
    fresh(AttentionBackendName._NATIVE_NPU, *place, masked=False)
    with pytest.raises(ValueError, match=r"'_native_npu' computes something else than attention for .* with a mask"):
        fresh(AttentionBackendName._NATIVE_NPU, *place, masked=True)


def test_a_backend_is_tried_once(monkeypatch):
    ours, stock = tiny_twins("5b")
    calls = []
    monkeypatch.setattr(backends, "check_backend", lambda *arguments: calls.append(arguments))
    forward(ours, inputs(stock))
    assert not calls
    ours.set_attention_backend("_native_math")
    with torch.autocast("cpu", torch.bfloat16):
        forward(ours, inputs(stock))
    assert calls == [(AttentionBackendName._NATIVE_MATH, 32, torch.bfloat16, torch.device("cpu"), False)]


def steps(model):
    """Calls that differ as those of a denoise loop: another prompt, another step, the other half."""
    kwargs = inputs(model)
    for timestep in (999, 500, 1):
        for _ in range(2):
            yield kwargs | {
                "hidden_states": torch.randn_like(kwargs["hidden_states"]),
                "encoder_hidden_states": torch.randn_like(kwargs["encoder_hidden_states"]),
                "timestep": torch.tensor([timestep, timestep]),
            }


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "whole"])
def test_d5_nothing_is_compiled_twice(variant, blocks, fresh_compiler):
    """Zero graph breaks (fullgraph), and one compilation for all blocks or for the whole model."""
    ours, stock = tiny_twins(variant, num_layers=3)
    counted = CompileCounterWithBackend("eager")
    if blocks:
        ours.compile_repeated_blocks(fullgraph=True, backend=counted)
    run = ours if blocks else torch.compile(ours, fullgraph=True, backend=counted)
    for kwargs in steps(stock):
        torch.testing.assert_close(forward(run, kwargs), forward(stock, kwargs), rtol=0, atol=2e-5)
    assert counted.frame_count == 1
    assert not counters["graph_break"]
