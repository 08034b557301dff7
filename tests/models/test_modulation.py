"""Modulation tables: a pass that looks its modulations up equals one that computes them, whatever else acts on the model."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig

from diffusers_cogvideox.models.block import AdaLayerNorm
from diffusers_cogvideox.models.modulation import ModulationTables, SetAside, tabulated
from transformer_cases import inputs, tiny_twins

SCHEDULE = torch.tensor([999, 431, 431, 19])
EXACT = {"rtol": 0, "atol": 2e-6}


def forward(model, kwargs, **changes):
    with torch.no_grad():
        return model(**kwargs | changes)[0]


def norms(model):
    return [module for module in model.modules() if isinstance(module, AdaLayerNorm)]


def released(model):
    """Tables with the weights put aside, which `tabulated` does for an accelerator only."""
    return ModulationTables(model, norms(model), SCHEDULE.unique(), None, True, None)


def without_weights(model):
    """The same model as long as no modulation layer computes anything."""
    copied = copy.deepcopy(model)
    for layer in norms(copied):
        for parameter in layer.linear.parameters():
            parameter.data.fill_(float("nan"))
    return copied


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b-i2v"])
def test_tables_take_the_place_of_the_layers(variant):
    ours, _ = tiny_twins(variant)
    kwargs = inputs(ours)
    exact = forward(ours, kwargs)
    with tabulated(ours, SCHEDULE, kwargs["ofs"]) as tables:
        blind = without_weights(ours)
        torch.testing.assert_close(forward(blind, kwargs), exact, **EXACT)
        one = forward(blind, kwargs, timestep=19)
        assert tables.nbytes == sum(4 * len(layer.table) * layer.linear.out_features for layer in norms(ours))
        assert all(len(layer.table) == 4 for layer in norms(ours)), "three timesteps and the row for all others"
    torch.testing.assert_close(one, forward(ours, kwargs, timestep=19), **EXACT)
    torch.testing.assert_close(forward(ours, kwargs), exact, rtol=0, atol=0)
    assert all(layer.table is None for layer in norms(ours))


def test_half_precision_loses_nothing():
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    exact = forward(ours, kwargs)
    half = {name: value.bfloat16() if name.endswith("hidden_states") else value for name, value in kwargs.items()}
    ours.bfloat16()
    plain = forward(ours, half) - exact
    with tabulated(ours, SCHEDULE):
        assert ours.transformer_blocks[0].norm1.table.dtype == torch.bfloat16
        assert (forward(ours, half) - exact).std() <= 1.02 * plain.std()


def test_other_timesteps_are_computed():
    ours, _ = tiny_twins("1.5-5b-i2v")
    kwargs = inputs(ours)
    with tabulated(ours, SCHEDULE, kwargs["ofs"]):
        for change in ({"timestep": 500}, {"timestep": torch.tensor([999, 998])}, {"ofs": torch.tensor([1.0])}):
            with_tables = forward(ours, kwargs, **change)
            ours.modulation, tables = None, ours.modulation
            torch.testing.assert_close(with_tables, forward(ours, kwargs, **change), rtol=0, atol=0)
            ours.modulation = tables
        with pytest.raises(ValueError, match="timestep has 3 values for a batch of 2"):
            forward(ours, kwargs, timestep=torch.tensor([999, 431, 19]))
        with pytest.raises(ValueError, match="needs ofs"):
            forward(ours, kwargs, ofs=None, timestep=5)


def test_without_weights_other_timesteps_are_refused():
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    exact, state = forward(ours, kwargs), copy.deepcopy(ours.state_dict())
    tables = released(ours)
    tables.enter()
    assert tables.released == sum(p.nbytes for layer in norms(ours) for p in layer.linear.parameters())
    assert all(p.isnan().all() and p.untyped_storage().nbytes() == 4 for layer in norms(ours) for p in layer.linear.parameters())
    torch.testing.assert_close(forward(ours, kwargs), exact, **EXACT)
    with pytest.raises(ValueError, match=r"timestep=\[500, 501\] is not in the schedule .* call transformer.release_modulation\(False\)"):
        forward(ours, kwargs, timestep=torch.tensor([500, 501]))
    tables.leave()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    torch.testing.assert_close(forward(ours, kwargs), exact, rtol=0, atol=0)


def test_gradients_come_from_the_layers_themselves():
    ours, _ = tiny_twins("5b")
    with tabulated(ours, SCHEDULE):
        ours(**inputs(ours))[0].square().mean().backward()
    assert all(layer.linear.weight.grad.any() for layer in norms(ours))


def test_too_long_a_schedule_and_other_models_have_no_tables():
    ours, stock = tiny_twins("5b")
    for model, steps in ((ours, torch.arange(33)), (stock, SCHEDULE)):
        with tabulated(model, steps) as tables:
            assert tables is None
    with tabulated(ours, torch.arange(32)) as tables:
        assert tables is not None


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    """A model with a LoRA on its modulation layers."""
    ours, _ = tiny_twins("5b")
    ours.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["norm1.linear", "norm_out.linear", "to_q"], init_lora_weights=False))
    return ours.eval()


def test_a_lora_acts_with_the_scale_of_the_call(adapted):
    kwargs = inputs(adapted)
    for options in (None, {"scale": 0.5}, {"scale": 0.0}):
        exact = forward(adapted, kwargs, attention_kwargs=options)
        with tabulated(adapted, SCHEDULE, attention_kwargs=options):
            torch.testing.assert_close(forward(adapted, kwargs, attention_kwargs=options), exact, **EXACT)
    full, none = forward(adapted, kwargs), forward(adapted, kwargs, attention_kwargs={"scale": 0.0})
    assert (full - none).abs().max() > 1e-2


@pytest.mark.parametrize("release", [False, True])
def test_tables_follow_a_lora_that_changes(adapted, release):
    kwargs = inputs(adapted)
    tables = ModulationTables(adapted, norms(adapted), SCHEDULE.unique(), None, release, None)
    tables.enter()
    first = [layer.table for layer in norms(adapted)]
    tables.refresh()
    assert all(layer.table is table for layer, table in zip(norms(adapted), first, strict=True)), "nothing changed"

    def rewrite():
        with torch.no_grad():
            adapted.transformer_blocks[0].norm1.linear.lora_B["default"].weight.mul_(2)

    changes = [lambda: adapted.set_adapters("default", 0.3), adapted.disable_lora, adapted.enable_lora]
    for change in changes if release else [*changes, rewrite, adapted.fuse_lora]:
        change()
        tables.refresh()
        with_tables = forward(adapted, kwargs)
        tables.leave()
        torch.testing.assert_close(with_tables, forward(adapted, kwargs), **EXACT)
        tables.enter()
    tables.leave()


# --- what else acts on the model --------------------------------------------------------------------------------------


def test_tables_inside_tables():
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    exact, other = forward(ours, kwargs), forward(ours, kwargs, timestep=7)
    outer = released(ours)
    outer.enter()
    with tabulated(ours, torch.tensor([7])):
        torch.testing.assert_close(forward(ours, kwargs, timestep=7), other, **EXACT)
    torch.testing.assert_close(forward(ours, kwargs), exact, **EXACT)
    assert outer.released
    outer.leave()


@pytest.mark.parametrize("how", ["block", "leaf", "sequential"])
def test_offloaded_layers_are_computed_one_at_a_time(how):
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    exact = forward(ours, kwargs)
    if how == "sequential":
        cpu_offload(ours, execution_device=torch.device("cpu"))
        assert ours.transformer_blocks[0].norm1.linear.weight.is_meta
    else:
        options = {"num_blocks_per_group": 1} if how == "block" else {}
        ours.enable_group_offload(onload_device=torch.device("cpu"), offload_type=f"{how}_level", **options)
    calls = []
    with tabulated(ours, SCHEDULE):
        for layer in norms(ours):
            layer.linear.register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(forward(ours, kwargs), exact, **EXACT)
    assert not calls


def test_a_feature_cache_and_tables():
    ours, _ = tiny_twins("5b", num_layers=3)
    kwargs = inputs(ours)
    exact = forward(ours, kwargs)
    ours.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with tabulated(ours, SCHEDULE), ours.cache_context("cond_uncond"):
        for _ in range(2):
            torch.testing.assert_close(forward(ours, kwargs), exact, **EXACT)


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_use_tables_and_are_compiled_once(whole, fresh_compiler):
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    steps = [torch.full((2,), step) for step in (999, 431)]
    exact = [forward(ours, kwargs, timestep=step) for step in steps]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    if whole:
        model = torch.compile(ours, fullgraph=True, backend=backend)
    else:
        model = ours
        ours.compile_repeated_blocks(fullgraph=True, backend=backend)
    for _ in range(2):
        with tabulated(model, SCHEDULE) as tables:
            assert tables is not None
            for step, expected in zip(steps, exact, strict=True):
                torch.testing.assert_close(forward(model, kwargs, timestep=step), expected, **EXACT)
            if whole:
                assert forward(model, kwargs, timestep=torch.full((2,), 500)).isnan().all()
    assert len(graphs) == 1


def test_what_is_put_aside_cannot_be_written_to():
    layer = torch.nn.Linear(3, 5)
    weight, aside = layer.weight.detach().clone(), SetAside(torch.device("cpu"))
    aside.take([layer])
    with torch.no_grad(), pytest.raises(RuntimeError, match="single memory location"):
        layer.weight.mul_(2)
    layer.half()  # moved or cast meanwhile
    aside.give_back()
    assert torch.equal(layer.weight, weight.half())
    assert aside.nbytes == 0
