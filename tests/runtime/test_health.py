"""A model that breaks says where; a healthy one does not notice that it is watched."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers.utils import logging
from torch import nn

from diffusers_cogvideox import PRESETS, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.runtime import health
from parity import TINY_TRANSFORMERS, TINY_VAE
from tiny_pipeline import call
from transformer_cases import inputs, tiny_twins

NAN = float("nan")


def poison(module: nn.Module, value: float = NAN) -> None:
    """Spoil one weight."""
    with torch.no_grad():
        module.weight.view(-1)[0] = value


@pytest.fixture
def model():
    """A tiny transformer of its own; its blocks and layers have the names of the released ones."""
    return tiny_twins("5b")[0]


def run(model, **changes):
    kwargs = inputs(model) | changes
    with torch.no_grad():
        return health.run_checked(model, lambda: model(**kwargs)[0], "in a test")


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    logging.enable_propagation()
    health._warn_about_float16.cache_clear()
    yield caplog
    logging.disable_propagation()


@pytest.mark.parametrize(("name", "dtype", "count"), [("5b", "float16", 1), ("2b", "float16", 0), ("5b", "bfloat16", 0)])
def test_float16_is_warned_about_once_where_it_overflows(said, name, dtype, count):
    for _ in range(2):
        health.check_dtype(name, PRESETS[name].dtype, getattr(torch, dtype))
    assert said.text.count(f"CogVideoX {name} was trained in bfloat16") == count
    assert said.text.count("dtype=torch.bfloat16") == count


@pytest.mark.parametrize("safe", [False, True])
def test_the_pipeline_warns(said, pipe, monkeypatch, safe):
    monkeypatch.setattr("diffusers_cogvideox.pipelines.base.match_preset", lambda _: PRESETS["5b"])
    pipe.transformer = tiny_twins("5b")[0].half()
    pipe.transformer.keep_residual_in_float32(safe)
    call(pipe, output_type="latent", num_inference_steps=1)
    assert ("float16 may overflow" in said.text) is not safe


# --- the check --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (NAN, False), (float("inf"), False), (-float("inf"), False)])
def test_is_finite(dtype, value, finite):
    x = torch.full((3, 4), 3e4, dtype=dtype)  # whose sum is not finite in float16
    x[1, 2] = value
    assert health.is_finite(x) is finite


def test_is_finite_where_there_are_no_values():
    assert health.is_finite(torch.empty(2, 0))
    assert health.is_finite(torch.empty(2, 3, device="meta"))


def test_a_healthy_model_runs_once(model):
    calls, kwargs = [], inputs(model)
    with torch.no_grad():
        expected = model(**kwargs)[0]
    model.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(run(model, **kwargs), expected, rtol=0, atol=0)
    assert len(calls) == 1


LAYERS = [
    "patch_embed.text_proj",
    "time_embedding.linear_2",
    "transformer_blocks.0.attn1.to_v",
    "transformer_blocks.1.norm2.linear",
    "transformer_blocks.1.ff.net.2",
    "norm_out.linear",
    "proj_out",
]


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_bad_layer_is_named(model, name):
    poison(model.get_submodule(name))
    with pytest.raises(FloatingPointError, match=rf"in a test: the first layer to go bad is {name}\. Its weights are not finite"):
        run(model)
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_inputs_are_told_from_bad_layers(model):
    text = inputs(model)["encoder_hidden_states"] * NAN
    with pytest.raises(FloatingPointError, match=r"patch_embed\.text_proj, whose input was bad already.*far outside the usual range"):
        run(model, encoder_hidden_states=text)


def test_overflow_in_float16_gets_its_own_remedy(model):
    model.half()
    with torch.no_grad():
        model.transformer_blocks[1].ff.net[2].weight.fill_(6e4)
    kwargs = {key: value.half() for key, value in inputs(model).items() if key in ("hidden_states", "encoder_hidden_states")}
    with pytest.raises(FloatingPointError, match=r"transformer_blocks\.1\.ff\.net\.2\. float16 ends at 65504.*keep_residual_in_float32"):
        run(model, **kwargs)


def test_hooks_go_away_after_an_error(model):
    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        health.first_bad_layer(model, broken)
    assert not any(module._forward_hooks for module in model.modules())


def test_meta_models_pass():
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["2b"])
        kwargs = {"hidden_states": torch.empty(1, 3, 4, 8, 12), "encoder_hidden_states": torch.empty(1, 7, 24), "timestep": torch.empty(1)}
    assert health.run_checked(model, lambda: model(**kwargs)[0], "").is_meta


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_compiled_models_stay_whole_and_are_searched(model, way, fresh_compiler):
    """`fullgraph=True` would raise at a graph break; the search runs the same modules uncompiled."""
    options = {"backend": "eager", "fullgraph": True}
    if way == "blocks":
        model.compile_repeated_blocks(**options)
    compiled = torch.compile(model, **options) if way == "whole" else model
    kwargs = inputs(model)
    with torch.no_grad():
        assert health.run_checked(compiled, lambda: compiled(**kwargs)[0], "").isfinite().all()
        poison(model.transformer_blocks[1].attn1.to_out[0])
        with pytest.raises(FloatingPointError, match=r"is transformer_blocks\.1\.attn1\.to_out\.0\. Its weights"):
            health.run_checked(compiled, lambda: compiled(**kwargs)[0], "")


# --- in the pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(pipe):
    """broken(component, layer): the tiny pipeline with a spoiled copy of one component."""

    def make(name: str, layer: str) -> CogVideoXPipeline:
        part = type(getattr(pipe, name)).from_config(getattr(pipe, name).config).eval()
        part.load_state_dict(getattr(pipe, name).state_dict())
        poison(part.get_submodule(layer))
        setattr(pipe, name, part)
        return pipe

    return make


def test_the_pipeline_names_step_and_timestep(broken):
    """The block goes bad in the second of three steps, at timestep 665 of 998, 665, 332."""
    pipe = broken("transformer", "transformer_blocks.1.ff.net.2")
    layer = pipe.transformer.transformer_blocks[1].ff.net[2]
    spoiled, sound = layer.weight.detach().clone(), layer.weight.detach().nan_to_num()
    layer.weight.data = sound

    def spoil(pipe, index, timestep, tensors):
        layer.weight.data = spoiled
        return {}

    second = pipe.scheduler
    second.set_timesteps(3)
    where = rf"in step 2 of 3 \(timestep {second.timesteps[1]}\): the first layer to go bad is transformer_blocks\.1\.ff\.net\.2\. "
    with pytest.raises(FloatingPointError, match=where):
        call(pipe, callback_on_step_end=spoil)


def test_the_pipeline_checks_every_pass_of_sequential_guidance(broken):
    pipe = broken("transformer", "proj_out")
    with pytest.raises(FloatingPointError, match=r"in step 1 of 3 .* is proj_out\. "):
        call(pipe, sequential_guidance=True)


def test_the_vae_names_its_layer(broken):
    layer = "decoder.up_blocks.2.resnets.0.conv1.conv"
    assert "up_block_types" not in TINY_VAE  # the names are those of the released VAE
    with pytest.raises(FloatingPointError, match=rf"AutoencoderKLCogVideoX made NaN or infinity while decoding: .* is {layer}\. "):
        call(broken("vae", layer), num_inference_steps=1)


def test_offloaded_pipelines_are_searched_too(broken):
    pipe = broken("transformer", "transformer_blocks.0.attn1.to_k")
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(FloatingPointError, match=r"is transformer_blocks\.0\.attn1\.to_k"):
        call(pipe)
    pipe.remove_all_hooks()


def test_weights_that_are_offloaded_one_by_one(model):
    poison(model.transformer_blocks[1].ff.net[2])
    model = cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.proj_out.weight.is_meta
    with pytest.raises(FloatingPointError, match=r"is transformer_blocks\.1\.ff\.net\.2\. Look for damaged weights"):
        run(model)
