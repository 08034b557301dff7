"""Quantised blocks: which layers, how many bytes, how large an error, and what is refused. Needs the packages of the extra `quant`."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from diffusers_cogvideox import CogVideoXTransformer3DModel
from diffusers_cogvideox.runtime import streaming
from diffusers_cogvideox.runtime.quantisation import (
    BFLOAT16_ERROR,
    KEPT,
    QUANTISATIONS,
    check_possible,
    check_quantisation,
    load_quantised,
    quantisation_config,
    quantisation_of,
    quantise,
)
from diffusers_cogvideox.runtime.streamed_parts import named_tensors
from transformer_cases import inputs, tiny_twins

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ON_CPU = [name for name, way in QUANTISATIONS.items() if "cpu" in way.devices]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::UserWarning:peft", "ignore::DeprecationWarning:torchao")


def needed(name):
    package = QUANTISATIONS[name].package
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return name


@pytest.fixture(params=ON_CPU)
def way(request):
    return needed(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("5b")
    tiny_twins("5b")[0].save_pretrained(folder)
    return folder


def bfloat16(model):
    kwargs = inputs(model)
    return {name: value.bfloat16() if name.endswith("hidden_states") else value for name, value in kwargs.items()}


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0].float()


def quantised_layers(model, bytes_each=1.5):
    sizes = {name: sum(t.nbytes for _, t in named_tensors(layer)) for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {
        name for name, layer in model.named_modules() if name in sizes and sizes[name] < bytes_each * layer.in_features * layer.out_features
    }


def test_the_blocks_are_quantised_and_nothing_else(saved, way):
    model = load_quantised(CogVideoXTransformer3DModel, saved, way, CPU)
    assert model.dtype == torch.bfloat16
    expected = {
        f"transformer_blocks.{i}.{name}"
        for i in range(2)
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    }
    assert quantised_layers(model) == expected
    plain = CogVideoXTransformer3DModel.from_pretrained(saved, torch_dtype=torch.bfloat16)
    assert quantised_layers(quantise(plain, way, CPU)) == expected
    kwargs = bfloat16(model)
    torch.testing.assert_close(forward(model, kwargs), forward(plain, kwargs), rtol=0, atol=0)
    assert all(value.dtype != torch.float8_e4m3fn for name, value in named_tensors(model) if set(name.split(".")) & set(KEPT))


def test_the_error_is_that_of_eight_bits(saved, way):
    exact = CogVideoXTransformer3DModel.from_pretrained(saved, torch_dtype=torch.bfloat16)
    kwargs = bfloat16(exact)
    expected = forward(exact, kwargs)
    error = (forward(quantise(exact, way, CPU), kwargs) - expected).std() / expected.std()
    assert 1e-3 < error < (0.015 if way.startswith("int8") else 0.05)


def test_the_bytes_are_as_the_table_says(saved, way):
    model = load_quantised(CogVideoXTransformer3DModel, saved, way, CPU)
    layer = model.transformer_blocks[0].ff.net[0].proj
    weights = [tensor.nbytes for name, tensor in named_tensors(layer) if name.startswith("weight")]
    assert sum(weights) == QUANTISATIONS[way].bytes_per_parameter(layer.in_features) * layer.in_features * layer.out_features


def test_bytes_of_four_bits():
    assert QUANTISATIONS["nf4"].bytes_per_parameter() == pytest.approx((4 + 8 / 64 + 32 / 64 / 256) / 8)


LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "init_lora_weights": False}


def test_adapters_are_loaded_after_torchao(saved, way):
    if QUANTISATIONS[way].package is None:
        pytest.skip("adapters come before casting")
    model = load_quantised(CogVideoXTransformer3DModel, saved, way, CPU)
    kwargs = bfloat16(model)
    plain = forward(model, kwargs)
    model.add_adapter(LoraConfig(**LORA))
    assert (forward(model, kwargs) - plain).abs().max() > 1e-2
    model.delete_adapters("default")
    torch.testing.assert_close(forward(model, kwargs), plain, rtol=0, atol=0)
    with pytest.raises(ValueError, match="adapters"):
        quantise(tiny_with_adapter(), way, CPU)


def tiny_with_adapter():
    model = tiny_twins("5b")[0]
    model.add_adapter(LoraConfig(**LORA))
    return model.bfloat16()


def test_adapters_are_loaded_before_casting():
    model = tiny_with_adapter()
    kwargs = bfloat16(model)
    exact = forward(model, kwargs)
    quantise(model, "fp8-cast", CPU)
    assert all(p.dtype == torch.bfloat16 for name, p in model.named_parameters() if "lora_" in name)
    assert 1e-3 < (forward(model, kwargs) - exact).std() / exact.std() < 0.05
    model.set_adapters("default", 0.0)
    assert (forward(model, kwargs) - exact).std() > 0.02 * exact.std()
    for method in (model.add_adapter, model.load_lora_adapter):
        with pytest.raises(ValueError, match="load it before the model is cast"):
            method(LoraConfig(**LORA))


def test_what_is_there_already_is_refused(saved):
    model = quantise(CogVideoXTransformer3DModel.from_pretrained(saved), "fp8-cast", CPU)
    with pytest.raises(ValueError, match=r"to_q carries hooks .*: quantise \('fp8-cast'\) first"):
        quantise(model, "fp8-cast", CPU)
    with pytest.raises(ValueError, match="to_q carries an offload or casting hook"):
        model.fuse_qkv_projections()
    if importlib.util.find_spec("torchao"):
        model = quantise(CogVideoXTransformer3DModel.from_pretrained(saved, torch_dtype=torch.bfloat16), "int8", CPU)
        with pytest.raises(ValueError, match="is quantised as 'int8' already: load it anew for 'fp8'"):
            quantise(model, "fp8", CPU)


def test_ways_that_are_unknown_slow_or_elsewhere_are_refused(saved):
    cases = [
        ("int3", CPU, "quantisation 'int3' is unknown: use one of int8, "),
        ("int4", CPU, "'int4' is not offered: CogVideoX-5B .* 1068 s .* 212 s in bfloat16"),
        ("nf4", CPU, "'nf4' does not run on cpu, only on cuda: use int8 or "),
        ("fp8-dynamic", CPU, "'fp8-dynamic' does not run on cpu"),
    ]
    for name, device, message in cases:
        with pytest.raises(ValueError, match=message):
            check_quantisation(name, device)
        with pytest.raises(ValueError, match=message):
            load_quantised(CogVideoXTransformer3DModel, saved, name, device)
    with pytest.raises(ValueError, match=r"'fp8-cast' has no config: load the model, and call quantise"):
        quantisation_config("fp8-cast")


def test_errors_are_those_that_were_measured():
    """The table, what was measured, and the page."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "quantisation.json").read_text())["ways"]
    page = (ROOT / "docs" / "quantisation.md").read_text()
    for name, error in {"bfloat16": BFLOAT16_ERROR, **{name: way.error for name, way in QUANTISATIONS.items()}}.items():
        found = measured[name].get("against float32", {}).get("velocity")
        assert error == found
        (row,) = [line for line in page.splitlines() if line.replace("`", "").startswith(f"| {name} |")]
        told = row.split("|")[5].strip()
        assert told.startswith("not measured") if found is None else float(told) == pytest.approx(found, abs=6e-5)


def test_a_model_tells_how_it_is_quantised(saved, way):
    assert quantisation_of(CogVideoXTransformer3DModel.from_pretrained(saved)) is None
    model = load_quantised(CogVideoXTransformer3DModel, saved, way, CPU)
    assert quantisation_of(model) == way
    if QUANTISATIONS[way].torchao:  # also when diffusers has loaded it
        config = quantisation_config(way, CPU)
        assert quantisation_of(CogVideoXTransformer3DModel.from_pretrained(saved, quantization_config=config)) == way
    quantise_again = [other for other in ON_CPU if other != way]
    with pytest.raises(ValueError, match=f"is quantised as {way!r} already"):
        check_possible(model, needed(quantise_again[0]), CPU)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("diffusers_cogvideox.runtime.quantisation.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"quantisation 'int8' needs torchao: pip install 'diffusers-cogvideox\[quant\]'"):
        quantisation_config("int8", CPU)
    with pytest.raises(ImportError, match="quantisation 'nf4' needs bitsandbytes"):
        quantisation_config("nf4", "cuda")


def test_nf4_is_made_while_loading():
    needed("nf4")
    assert quantisation_config("nf4", "cuda").llm_int8_skip_modules == list(KEPT)
    with pytest.raises(ValueError, match="is made while a model is loaded: use load_quantised"):
        quantise(tiny_twins("5b")[0], "nf4", "cuda")


def test_quantised_blocks_are_streamed(saved, way, monkeypatch):
    monkeypatch.setattr(streaming, "_check_request", lambda *_: None)  # from the memory of the host to that of the host
    model = load_quantised(CogVideoXTransformer3DModel, saved, way, CPU)
    kwargs = bfloat16(model)
    exact = forward(model, kwargs)
    before = {name: tensor.clone() for name, tensor in named_tensors(model)}
    streaming.stream(model, CPU)
    assert not forward(model, kwargs).isnan().any()
    torch.testing.assert_close(forward(model, kwargs), exact, rtol=0, atol=0)
    streaming.stop_streaming(model)
    assert all(torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)) for name, tensor in named_tensors(model))
    torch.testing.assert_close(forward(model, kwargs), exact, rtol=0, atol=0)


def test_quantised_weights_are_not_on_disk(saved):
    model = load_quantised(CogVideoXTransformer3DModel, saved, needed("int8"), CPU)
    with pytest.raises(ValueError, match=r"is quantised \(Int8Tensor\), and on disk it is not: use source='memory'"):
        streaming.stream(model, CPU, source="disk", directory=saved)


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTISATIONS)
def test_on_an_accelerator(saved, name):
    exact = CogVideoXTransformer3DModel.from_pretrained(saved, torch_dtype=torch.bfloat16).cuda()
    kwargs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in bfloat16(exact).items()}
    expected = forward(exact, kwargs)
    model = load_quantised(CogVideoXTransformer3DModel, saved, needed(name)).cuda()
    assert (forward(model, kwargs) - expected).std() < 0.2 * expected.std()
    if name != "nf4":
        streamed = load_quantised(CogVideoXTransformer3DModel, saved, name)
        streaming.stream(streamed, "cuda")
        torch.testing.assert_close(forward(streamed, kwargs), forward(model, kwargs), rtol=0, atol=0)
