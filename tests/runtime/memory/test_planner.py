"""The planner as a function: what grows with what, that plans keep to their budgets, and what it says when nothing fits."""

import dataclasses
import itertools
import json
import math
import re
from functools import cache

import pytest

from diffusers_cogvideox import PRESETS
from diffusers_cogvideox.runtime.memory.costs import PLACEMENTS, Costs
from diffusers_cogvideox.runtime.memory.facts import ModelFacts
from diffusers_cogvideox.runtime.memory.planner import make_plan, smallest_budget
from diffusers_cogvideox.runtime.memory.workload import MACHINES, Machine, Workload
from diffusers_cogvideox.runtime.quantisation import QUANTISATIONS

GB = 10**9
NATIVE = Workload(height=480, width=720, num_frames=49)
BUDGETS = [3.2, 4, 5, 8, 12, 16, 24, 32, 80]
WORKLOADS = [
    Workload(height=256, width=256, num_frames=9, guided=False),
    Workload(height=256, width=256, num_frames=9),
    Workload(height=480, width=480, num_frames=9),
    Workload(height=480, width=720, num_frames=9),
    Workload(height=480, width=720, num_frames=49),
    Workload(height=480, width=720, num_frames=49, encoded_frames=49),
    Workload(height=480, width=720, num_frames=49, encoded_frames=49, videos=2, prompts=2),
    Workload(height=768, width=1360, num_frames=81, encoded_frames=81, videos=2, prompts=2),
]


@cache
def facts(name="5b"):
    return ModelFacts.of_preset(PRESETS[name])


def planned(work=NATIVE, name="5b", **given):
    """The plan, or None where nothing fits."""
    try:
        return make_plan(facts(name), work, **given)
    except ValueError:
        return None


def seconds(plan):
    return float("inf") if plan is None else plan.seconds


@pytest.mark.parametrize("quantisation", [None, "int8"])
@pytest.mark.parametrize("ram", [None, 10 * GB])
@pytest.mark.parametrize("work", [WORKLOADS[1], NATIVE])
def test_more_memory_is_never_slower(work, ram, quantisation):
    plans = [planned(work, vram=int(size * GB), ram=ram, quantisation=quantisation) for size in BUDGETS]
    assert all(seconds(less) >= seconds(more) for less, more in itertools.pairwise(plans))
    assert plans[-1] is not None


def test_more_ram_is_never_slower():
    for vram in (4 * GB, 12 * GB, None):
        plans = [planned(vram=vram, ram=int(size * GB)) for size in (2, 3, 4, 8, 16, 24, 32, 64)]
        assert all(seconds(less) >= seconds(more) for less, more in itertools.pairwise(plans))
        assert plans[0] is None and plans[-1] is not None


@pytest.mark.parametrize("vram", [5, 12, 24, 80])
def test_a_larger_workload_is_never_faster(vram):
    plans = [planned(work, vram=vram * GB) for work in WORKLOADS]
    assert all(seconds(less) <= seconds(more) for less, more in itertools.pairwise(plans))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_larger_workload_never_takes_less_in_any_way(device):
    """Each option of each stage, and so the smallest budget."""
    for stage, placement in [
        ("denoise", "resident"),
        ("denoise", "disk"),
        ("text", "disk"),
        ("decode", "resident"),
        ("encode", "resident"),
    ]:
        for less, more in itertools.pairwise(WORKLOADS):
            found = []
            for work in (less, more):
                costs = Costs(facts=facts(), work=work, dtype="bfloat16", device=device, machine=MACHINES["cuda"])
                measures = {}
                for option in costs.options(stage, placement) if stage in dict(costs.stages) else []:
                    key = getattr(option.mode, "thrift", option.mode)
                    measures[key] = (option.device, option.host, option.seconds)
                found.append(measures)
            for key in set(found[0]) & set(found[1]):
                assert all(a <= b for a, b in zip(found[0][key], found[1][key], strict=True)), (stage, key, less, more)


def test_no_plan_is_above_its_budget():
    for work, vram, ram in itertools.product(WORKLOADS[1::2], BUDGETS[1::2], (8, 32)):
        plan = planned(work, vram=int(vram * GB), ram=ram * GB)
        if plan is not None:
            assert plan.device_peak <= vram * GB
            assert plan.host_peak <= ram * GB


@pytest.mark.parametrize("name", ["2b", "5b-i2v", "1.5-5b"])
def test_a_refusal_names_the_smallest_budget_that_works(name):
    preset = PRESETS[name]
    work = Workload(height=preset.height, width=preset.width, num_frames=preset.num_frames)
    with pytest.raises(ValueError, match=r"does not fit into 1\.00 GB of device memory") as refused:
        make_plan(facts(name), work, vram=GB)
    smallest = int(float(re.search(r"smallest budget that works is ([\d.]+) GB of device memory", str(refused.value))[1]) * GB + 0.5)
    assert planned(work, name, vram=smallest) is not None
    assert planned(work, name, vram=smallest - 20 * 10**6) is None


def test_too_little_ram_is_told_as_such():
    with pytest.raises(
        ValueError, match=r"into 24.0 GB of device memory and 1.00 GB of RAM. The smallest budget that works is [\d.]+ GB of RAM"
    ):
        make_plan(facts(), NATIVE, vram=24 * GB, ram=GB)
    with pytest.raises(ValueError, match=r"works is [\d.]+ GB of device memory with [\d.]+ GB of RAM"):
        make_plan(facts(), NATIVE, vram=GB, ram=GB)
    with pytest.raises(ValueError, match="need less"):
        make_plan(facts(), NATIVE, device="cpu", ram=GB)


def test_without_limits_everything_is_resident():
    plan = make_plan(facts(), NATIVE)
    assert set(plan.placements.values()) == {"resident"}
    assert plan.slow_down == 0
    assert not any(dataclasses.astuple(plan.transformer))


def test_a_processor_keeps_all_or_reads_from_disk():
    plan = make_plan(facts(), NATIVE, device="cpu", ram=64 * GB)
    assert (set(plan.placements.values()), plan.device_peak) == ({"resident"}, 0)
    plan = make_plan(facts(), NATIVE, device="cpu", ram=9 * GB)
    assert plan.placements["transformer"] == "disk"
    assert planned(device="cpu", ram=9 * GB, from_disk=False) is None
    with pytest.raises(ValueError, match="no meaning on a CPU"):
        make_plan(facts(), NATIVE, device="cpu", vram=GB)


SLOW = Machine(compute=1e15, link=2e9, disk=1e8)  # nothing hides the transfer: a fast device behind a slow link


def test_quantisations_are_taken_only_when_they_are_allowed_and_help():
    exact = make_plan(facts(), NATIVE, vram=11 * GB, machine=SLOW)
    allowed = make_plan(facts(), NATIVE, vram=11 * GB, machine=SLOW, quantisation="int8")
    assert (exact.transformer.quantisation, allowed.transformer.quantisation) == (None, "int8")
    assert allowed.seconds < 0.9 * exact.seconds
    assert "quantised to int8 (lossy)" in allowed.table() and f"velocity {100 * QUANTISATIONS['int8'].error:.2g} %" in allowed.table()
    # Where all is as fast without, the result stays what it is, and the plan says that, too.
    for given in ({"machine": SLOW}, {"vram": 8 * GB}):
        plenty = make_plan(facts(), NATIVE, quantisation="int8", **given)
        assert plenty.transformer.quantisation is None and "int8 is not used" in plenty.table()


def test_a_slow_plan_names_the_quantisation_that_would_help():
    slow = make_plan(facts(), NATIVE, vram=11 * GB, machine=SLOW)
    (advice,) = [reason for reason in slow.reasons if "quantisation" in reason]
    share = int(re.search(r"With quantisation 'int8' it would take (\d+) % of the time", advice)[1])
    allowed = make_plan(facts(), NATIVE, vram=11 * GB, machine=SLOW, quantisation="int8")
    assert share == pytest.approx(100 * allowed.seconds / slow.seconds, abs=0.51)
    assert not [reason for reason in make_plan(facts(), NATIVE, vram=8 * GB).reasons if "quantisation" in reason]


def test_a_refusal_names_the_quantisation_that_would_fit():
    """On a processor whose models cannot be read from disk meanwhile; loading takes as much as before."""
    small = {"device": "cpu", "from_disk": False}
    loading = make_plan(facts(), NATIVE, **small).stages[0].host
    least = dataclasses.replace(NATIVE, height=64, width=64, num_frames=9)
    exact = make_plan(facts(), least, **small).host_peak
    with pytest.raises(ValueError, match=r"RAM; fewer frames .* need less\. With quantisation 'int8' it would fit \(weights in int8"):
        make_plan(facts(), least, ram=(loading + exact) // 2, **small)
    assert planned(least, ram=(loading + exact) // 2, quantisation="int8", **small).transformer.quantisation == "int8"
    with pytest.raises(ValueError, match=r"need less\.$"):
        make_plan(facts(), least, ram=loading - 1, **small)


def test_a_model_that_is_quantised_stays_so():
    for name in ("int8", "fp8-cast", "nf4"):
        there = dataclasses.replace(facts(), quantised=name)
        plan = make_plan(there, NATIVE)
        assert plan.transformer.quantisation == name
        assert plan.stages[0].host < make_plan(facts(), NATIVE, quantisation=name).stages[0].host
        places = {make_plan(there, NATIVE, vram=size * GB).placements["transformer"] for size in (8, 12)}
        assert places <= ({"resident"} if name == "nf4" else {"resident", "streamed"})
    adapted = dataclasses.replace(facts(), adapters=10**8)
    told = make_plan(adapted, NATIVE, vram=11 * GB, machine=SLOW, quantisation="int8")
    assert told.transformer.quantisation is None and "int8 is not used: it comes before LoRAs" in told.table()


def test_quantisations_that_plans_do_not_know_are_refused():
    for name, device, message in [
        ("int3", "cuda", "'int3' is unknown: use one of int8, "),
        ("int4", "cuda", "'int4' is not offered: .* 1068 s"),
        ("nf4", "cpu", "'nf4' does not run on cpu"),
        ("int8-dynamic", "cuda", "slower than bfloat16 until the blocks are compiled, which a memory plan does not do: use 'int8'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_plan(facts(), NATIVE, device=device, quantisation=name)
        with pytest.raises(ValueError, match=message):
            make_plan(dataclasses.replace(facts(), quantised=name), NATIVE, device=device)


def test_streaming_hides_where_computing_takes_longer():
    """performance.md: 9.5 GB of blocks at 25 GB/s come in 0.38 s, while a step of 664 TFLOP takes 4.4 s at 150 TFLOP/s."""
    costs = Costs(facts=facts(), work=NATIVE, dtype="bfloat16", device="cuda", machine=MACHINES["cuda"])
    assert costs.operations == pytest.approx(664e12, rel=0.02)
    assert costs.facts.transformer_part.blocks * costs.block("transformer") == pytest.approx(9.5e9, rel=0.01)
    resident, streamed = (min(o.seconds for o in costs.options("denoise", place)) for place in ("resident", "streamed"))
    assert streamed < 1.01 * resident
    slow = dataclasses.replace(costs, machine=dataclasses.replace(MACHINES["cuda"], link=1e9))
    assert min(o.seconds for o in slow.options("denoise", "streamed")) > 2 * resident


@pytest.mark.parametrize("budget", [24, 16, 12, 8, 6, 5])
def test_the_5b_model_fits_into_what_consumers_have(budget):
    plan = make_plan(facts(), NATIVE, vram=budget * GB)
    assert plan.slow_down < 0.1
    assert plan.transformer.quantisation is None


def test_a_plan_tells_what_it_does_and_why():
    plan = make_plan(facts("5b-i2v"), dataclasses.replace(NATIVE, encoded_frames=1), vram=8 * GB, ram=64 * GB)
    text = plan.table()
    for words in ("budget: 8.00 GB of device memory and 64.0 GB of RAM", "encode", "text", "denoise", "decode", "streamed", "not measured"):
        assert words in text
    told = json.loads(json.dumps(plan.to_json()))
    assert told["device_peak"] == plan.device_peak
    assert [stage["name"] for stage in told["stages"]] == ["load", "encode", "text", "denoise", "decode"]


def test_workloads_cover_each_other():
    small = Workload(height=64, width=96, num_frames=9)
    assert NATIVE.covers(small) and not small.covers(NATIVE)
    wide = dataclasses.replace(small, width=2000)
    assert not NATIVE.covers(wide)
    assert NATIVE.joined(wide).covers(wide) and NATIVE.joined(wide).covers(NATIVE)
    assert NATIVE.covers(dataclasses.replace(NATIVE, sequential=True))
    assert not dataclasses.replace(NATIVE, sequential=True).covers(NATIVE)
    assert not dataclasses.replace(NATIVE, seen_frames=25).covers(NATIVE)
    with pytest.raises(ValueError, match="videos=0"):
        dataclasses.replace(NATIVE, videos=0)


def test_every_part_has_its_places():
    costs = Costs(facts=facts(), work=NATIVE, dtype="bfloat16", device="cuda", machine=MACHINES["cuda"])
    assert costs.possible("transformer") == list(PLACEMENTS)
    for part, place in itertools.product(("text_encoder", "transformer"), PLACEMENTS):
        assert costs.on_device(part, place) <= costs.weights(part)


def test_the_smallest_budget_is_found():
    def at_least(limit):
        def check(size):
            if size < limit:
                raise ValueError

        return check

    for limit in (10**7, 123_456_789, 4 * GB):
        assert 0 <= smallest_budget(at_least(limit)) - limit < 10**7
    with pytest.raises(ValueError, match=r"no budget works, not even .*: memory is not what is missing"):
        smallest_budget(at_least(math.inf))
