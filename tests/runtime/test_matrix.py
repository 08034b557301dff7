"""Where weights are, adapters, compilation, batch split and quantisation in all combinations: the resident result, or a clear error."""

from itertools import product

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from peft import LoraConfig

from diffusers_cogvideox import CogVideoXTransformer3DModel
from diffusers_cogvideox.models.modulation import tabulated
from diffusers_cogvideox.runtime import streaming
from diffusers_cogvideox.runtime.quantisation import quantise
from transformer_cases import inputs, tiny_twins

CPU = torch.device("cpu")
TOLERANCE = {"rtol": 0, "atol": 2e-5}
PLACES = ["resident", "streamed", "disk", "model offload", "sequential offload", "group offload", "leaf offload"]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "ff.net.0.proj", "norm1.linear"], init_lora_weights=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("5b")
    tiny_twins("5b")[0].save_pretrained(made)
    return made


@pytest.fixture(autouse=True)
def from_host_to_host(monkeypatch):
    """Streaming from memory, which makes no sense to the CPU, does the same there as to an accelerator."""
    monkeypatch.setattr(streaming, "_check_request", lambda *_: None)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prepared(folder, lora=False, quantised=False):
    """A transformer on the host; adapters come before casting."""
    model = CogVideoXTransformer3DModel.from_pretrained(folder)
    if lora:
        torch.manual_seed(1)
        model.add_adapter(LORA)
    return quantise(model, "fp8-cast", CPU) if quantised else model


def placed(model, place, folder):
    """The model with its weights brought to the CPU in one of many ways."""
    if place == "streamed":
        streaming.stream(model, CPU)
    elif place == "disk":
        streaming.stream(model, CPU, source="disk", directory=folder)
    elif place == "model offload":
        cpu_offload_with_hook(model, CPU)
    elif place == "sequential offload":
        cpu_offload(model, CPU)
    elif place == "group offload":
        model.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)
    elif place == "leaf offload":
        model.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    return model


def velocity(model, kwargs):
    with torch.no_grad(), tabulated(model, torch.tensor([999, 431]), attention_kwargs=kwargs["attention_kwargs"]):
        return model(**kwargs)[0]


@pytest.fixture(scope="module")
def expected(folder):
    """expected[lora, quantised]: keyword arguments of a pass, and the resident result."""
    made = {}
    for lora, quantised in product([False, True], repeat=2):
        torch.manual_seed(0)
        model = prepared(folder, lora, quantised)
        kwargs = inputs(model) | {"attention_kwargs": {"scale": 0.5}}
        with torch.no_grad():
            made[lora, quantised] = kwargs, model(**kwargs)[0]
    results = [result for _, result in made.values()]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i]), "each of them has an effect"
    return made


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("quantised", [False, True], ids=["exact", "quantised"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_every_combination_gives_the_resident_result(folder, expected, place, lora, quantised):
    kwargs, exact = expected[lora, quantised]
    model = placed(prepared(folder, lora, quantised), place, folder)
    for split in (False, True):
        model.split_batch(split)
        model.chunk_feed_forward(50 if split else None)
        torch.testing.assert_close(velocity(model, kwargs), exact, **TOLERANCE)


QUICK = [("disk", True, False), ("streamed", False, True)]
ALL = product(PLACES, [False, True], [False, True])
COMPILED = [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]


@pytest.mark.parametrize(("place", "lora", "quantised"), COMPILED)
def test_every_combination_compiles(folder, expected, place, lora, quantised):
    kwargs, exact = expected[lora, quantised]
    model = placed(prepared(folder, lora, quantised), place, folder)
    model.compile_repeated_blocks(backend="eager")
    for split in (False, True):
        model.split_batch(split)
        torch.testing.assert_close(velocity(model, kwargs), exact, **TOLERANCE)


SENSELESS = [
    ("disk", lambda m, _: placed(m, "model offload", _).to(CPU), "is not possible while .* streamed: call stop_streaming"),
    ("disk", lambda m, _: m.enable_group_offload(onload_device=CPU), "is not possible while .* streamed"),
    ("streamed", lambda m, _: m.fuse_lora(), "is not possible while .* streamed"),
    ("streamed", lambda m, _: quantise(m, "fp8-cast", CPU), r"carries hooks \(offloading, streaming"),
    ("group offload", lambda m, f: placed(m, "streamed", f), "is offloaded already: load the model anew"),
    ("sequential offload", lambda m, f: placed(m, "disk", f), "is offloaded already"),
    ("model offload", lambda m, f: placed(m, "streamed", f), "is offloaded already"),
    ("model offload", lambda m, _: quantise(m, "fp8-cast", CPU), r"carries hooks \(offloading"),
]


@pytest.mark.parametrize(("place", "act", "message"), SENSELESS)
def test_senseless_combinations_are_refused(folder, place, act, message):
    model = placed(prepared(folder), place, folder)
    with pytest.raises(ValueError, match=message):
        act(model, folder)


def test_a_device_map_goes_on_to_work(folder, expected, tmp_path):
    kwargs, exact = expected[False, False]
    away = {name: "cpu" for name, _ in prepared(folder).named_children()} | {"transformer_blocks": "disk"}
    for device_map in ({"": "cpu"}, away):
        model = CogVideoXTransformer3DModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
        torch.testing.assert_close(velocity(model, kwargs), exact, **TOLERANCE)
