"""The residual stream in float32: float16 models survive activations beyond 65504, at float16's accuracy."""

import pytest
import torch

from diffusers_cogvideox import CogVideoXTransformer3DModel
from parity import TINY_TRANSFORMERS
from transformer_cases import VARIANTS, inputs, tiny_twins

EPS = torch.finfo(torch.float16).eps


def in_half(kwargs):
    """Latents and text in float16; timesteps and rotary tables as they are."""
    return {k: v.half() if k in ("hidden_states", "encoder_hidden_states") else v for k, v in kwargs.items()}


def large_residual(model: CogVideoXTransformer3DModel) -> None:
    """Gates 1000 times as large: what a block adds stays in range, the sum does not. LayerNorm makes the rest of the model blind to it."""
    with torch.no_grad():
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2):
                gates = norm.linear.bias.view(6, -1)[[2, 5]]
                norm.linear.bias.view(6, -1)[[2, 5]] = 3e4 + gates


@torch.no_grad()
def outputs(variant: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Results (B, F, C, H, W) in float32, float16, and float16 with the residual in float32, of a model with a large residual."""
    model = tiny_twins(variant)[0]
    large_residual(model)
    kwargs = inputs(model)
    exact = model(**kwargs)[0]
    model.half()
    plain = model(**in_half(kwargs))[0]
    model.keep_residual_in_float32()
    return exact, plain, model(**in_half(kwargs))[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sum_beyond_float16_survives(variant):
    exact, plain, safe = outputs(variant)
    assert not plain.isfinite().all()
    assert safe.dtype == torch.float16
    error = (safe.float() - exact).abs().mean() / exact.abs().mean()
    assert error < 8 * EPS


@torch.no_grad()
def test_it_is_not_worse_where_float16_does_not_overflow():
    model = tiny_twins("5b")[0]
    kwargs = inputs(model)
    exact = model(**kwargs)[0]
    model.half()
    errors = []
    for safe in (False, True):
        model.keep_residual_in_float32(safe)
        errors.append((model(**in_half(kwargs))[0].float() - exact).abs().mean())
    assert 0 < errors[1] < errors[0]


@torch.no_grad()
def test_linear_layers_and_attention_stay_in_float16():
    model = tiny_twins("5b")[0].half()
    model.keep_residual_in_float32()
    block, seen = model.transformer_blocks[1], {}
    for name in ("norm1", "attn1.to_q", "attn1.to_out.0", "ff.net.2"):
        block.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].dtype}))
    model(**in_half(inputs(model)))
    assert seen == {"norm1": torch.float32, **dict.fromkeys(("attn1.to_q", "attn1.to_out.0", "ff.net.2"), torch.float16)}


@torch.no_grad()
def test_in_float32_nothing_changes():
    model = tiny_twins("1.5-5b")[0]
    kwargs = inputs(model)
    before = model(**kwargs)[0]
    model.keep_residual_in_float32()
    torch.testing.assert_close(model(**kwargs)[0], before, rtol=0, atol=0)
    model.keep_residual_in_float32(False)
    assert not model.float32_residual


def test_weights_keep_their_dtype():
    model = CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"]).half()
    model.keep_residual_in_float32()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
