"""The planner: a pure function from sizes and budgets to the fastest plan that fits; or an error that names the smallest budget.

What may be combined does not depend on the budgets, and what each combination takes grows with the workload. So more budget never gives a
slower plan, and a larger workload never a faster one or a smaller budget that is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from ...units import in_words
from ..quantisation import QUANTISATIONS, check_planned
from .costs import PARTS, Costs, Option, Placement
from .explain import explain, stage_in_words
from .facts import WIDTHS, ModelFacts
from .plan import Plan, StagePlan
from .workload import MACHINES, Machine, Workload

__all__ = ["PROCESS", "make_plan", "smallest_budget"]

PROCESS = {"cpu": 0.5e9, "cuda": 2.5e9}
"""Bytes that the process itself takes in host memory: Python, the libraries (measured on Linux), with a GPU its driver, too (assumed)."""

_SHARE = 0.95
"""Of a budget of device memory that is planned with; the rest is for gaps between the allocator's blocks."""

_STEP = 10**7  # smallest budgets are rounded up to this
_MOST = 10**18  # bytes; what does not work with these works with nothing
_SLOW = 0.1  # slow-down from which a quantisation is worth a word, and how much of the time it has to save


@dataclass(frozen=True)
class _Candidate:
    """Where the parts' weights are, and the options of each stage with what they take in all: (bytes on device, bytes on host, option)."""

    placements: dict[str, Placement]
    quantisation: str | None
    load: int
    stages: dict[str, list[tuple[int, int, Option]]]

    def best(self, vram: float, ram: float) -> dict[str, tuple[int, int, Option]] | None:
        """The fastest option of each stage that fits, of equally fast ones the plainest; None if one stage has none."""
        if self.load > ram:
            return None
        chosen = {}
        for stage, options in self.stages.items():
            fitting = [option for option in options if option[0] <= vram and option[1] <= ram]
            if not fitting:
                return None
            chosen[stage] = min(fitting, key=lambda found: (found[2].seconds, found[2].measures, found[0]))
        return chosen


def make_plan(
    facts: ModelFacts,
    work: Workload,
    *,
    device: str = "cuda",
    vram: int | None = None,
    ram: int | None = None,
    dtype: str = "bfloat16",
    quantisation: str | None = None,
    from_disk: bool = True,
    machine: Machine | None = None,
) -> Plan:
    """The fastest way to make the videos of `work` within the budgets.

    Args:
        facts: of the model. One that is quantised already stays so.
        work: sizes of the call.
        device: kind of device, such as "cuda" or "cpu".
        vram: bytes that PyTorch may allocate on the device, None for no limit.
        ram: bytes that the process may take in the memory of the host, None for no limit.
        dtype: "float32", "bfloat16" or "float16".
        quantisation: one of QUANTISATIONS that may be used, where the result cannot stay the same as fast; by default none.
        from_disk: whether weights may be read from disk while they are used.
        machine: speeds, by default those of `MACHINES`.

    Raises:
        ValueError: when nothing fits, naming the smallest budget that would; for an unknown precision, for `vram` on a processor, and
            for quantisations that are not possible (`check_planned`).
    """
    for name in filter(None, (quantisation, facts.quantised)):
        check_planned(name, device)
    if dtype not in WIDTHS:
        raise ValueError(f"dtype={dtype!r} is unknown: it must be one of {', '.join(WIDTHS)}.")
    if device == "cpu" and vram is not None:
        raise ValueError(f"a budget of {in_words(vram)} of device memory has no meaning on a CPU: give the budget as ram.")
    costs = Costs(
        facts=facts,
        work=work,
        dtype=dtype,
        device=device,
        machine=machine or MACHINES.get(device, MACHINES["cuda"]),
        quantisation=quantisation,
        attention="fused" if device in ("cpu", "cuda") else "math",
    )
    candidates = list(_candidates(costs, from_disk))
    limits = (math.inf if vram is None else _SHARE * vram, math.inf if ram is None else ram)
    found = _fastest(candidates, *limits)
    if found is None:
        raise ValueError(_refusal(costs, candidates, vram, ram) + _advice(costs, limits, math.inf))
    unlimited = _fastest(candidates, math.inf, math.inf) or found
    plan = _finished(costs, found, unlimited, vram, ram)
    advice = _advice(costs, limits, plan.seconds) if plan.slow_down > _SLOW else ""
    return replace(plan, reasons=(*plan.reasons, *filter(None, [advice.strip()])))


def smallest_budget(refused: Callable[[int], object], above: int = 0) -> int:
    """The smallest number of bytes, in steps of 10 MB, for which `refused(bytes)` raises no ValueError.

    Raises ValueError where it raises one for more than any machine has, too.
    """
    low, high = above // _STEP, 1
    while not _works(refused, high * _STEP):
        if high * _STEP > _MOST:
            raise ValueError(f"no budget works, not even {in_words(_MOST)}: memory is not what is missing.")
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _works(refused, middle * _STEP) else (middle, high)
    return high * _STEP


def _works(call: Callable[[int], object], size: int) -> bool:
    try:
        call(size)
    except ValueError:
        return False
    return True


# --- what can be combined ---------------------------------------------------------------------------------------------------


def _candidates(costs: Costs, from_disk: bool) -> Iterator[_Candidate]:
    """Every combination of places; the ways inside a stage do not depend on those of the others."""
    parts = [part for part in PARTS if part != "text_encoder" or costs.facts.text_part is not None]
    process = int(PROCESS.get(costs.device, PROCESS["cuda"]))
    known: dict[tuple[str, Placement, str | None], list[Option]] = {}
    for quantisation, places in _combined(costs, parts, from_disk):
        placements = dict(zip(parts, places, strict=True))

        def of(part: str, name: str | None = quantisation) -> str | None:
            return name if part == "transformer" else None

        weights = {part: costs.weights(part, of(part)) for part in parts}
        stays = {part: weights[part] if placements[part] == "resident" else 0 for part in parts}
        host = process + sum(costs.in_host_memory(part, placements[part], of(part)) for part in parts)
        stages = {}
        for stage, part in costs.stages:
            key = (stage, placements[part], of(part))
            if key not in known:
                known[key] = costs.options(*key)
            beside = sum(size for other, size in stays.items() if other != part)
            stages[stage] = [_in_all(costs, option, beside, host) for option in known[key]]
        # What is quantised by a plan is loaded as it is on disk.
        loaded = sum(costs.weights(part, costs.facts.quantised and of(part)) for part in parts if placements[part] != "disk")
        yield _Candidate(placements, quantisation, process + loaded, stages)


def _combined(costs: Costs, parts: list[str], from_disk: bool) -> Iterator[tuple[str | None, tuple[Placement, ...]]]:
    """Every quantisation of the transformer with the places that it leaves."""
    for name in costs.quantisations:
        possible = [costs.possible(part, name) if part == "transformer" and name else costs.possible(part) for part in parts]
        for places in product(*possible):
            if from_disk or "disk" not in places:
                yield name, places


def _in_all(costs: Costs, option: Option, beside: int, host: int) -> tuple[int, int, Option]:
    """Bytes on the device and on the host with what the other parts take; a processor has one memory."""
    if costs.device == "cpu":
        return 0, host + beside + option.device + option.host, option
    return beside + option.device, host + option.host, option


_Found = tuple[_Candidate, dict[str, tuple[int, int, Option]]]


def _fastest(candidates: list[_Candidate], vram: float, ram: float) -> _Found | None:
    fitting = [(candidate, best) for candidate in candidates if (best := candidate.best(vram, ram))]

    def order(found: _Found) -> tuple[float, int, int]:
        options = found[1].values()
        seconds = math.fsum(option.seconds for _, _, option in options)
        return seconds, sum(option.measures for _, _, option in options), max(device + host for device, host, _ in options)

    return min(fitting, key=order, default=None)


# --- what comes out ---------------------------------------------------------------------------------------------------------


def _refusal(costs: Costs, candidates: list[_Candidate], vram: int | None, ram: int | None) -> str:
    """What fails, and the smallest budget that would do."""

    def check(device: float, host: float) -> None:
        if _fastest(candidates, _SHARE * device, host) is None:
            raise ValueError

    given = [f"{in_words(size)} of {name}" for size, name in ((vram, "device memory"), (ram, "RAM")) if size is not None]
    text = f"{costs.facts.name} ({costs.work}, {costs.dtype}) does not fit into {' and '.join(given)}. "
    limit = math.inf if ram is None else ram
    if vram is not None and _works(lambda size: check(math.inf, size), int(min(limit, _MOST))):
        enough = smallest_budget(lambda size: check(size, limit))
        text += f"The smallest budget that works is {in_words(enough)} of device memory"
    else:
        device = math.inf if vram is None else max(vram, smallest_budget(lambda size: check(size, math.inf)))
        more = "" if vram is None or device == vram else f"{in_words(device)} of device memory with "
        text += f"The smallest budget that works is {more}{in_words(smallest_budget(lambda size: check(device, size)))} of RAM"
    return f"{text}; fewer frames or a smaller size need less."


def _advice(costs: Costs, limits: tuple[float, float], seconds: float) -> str:
    """A sentence on the most exact quantisation that would fit in clearly less time; nothing where one is allowed, or none would."""
    if costs.quantisations != (None,) or costs.quantisation or costs.facts.adapters:
        return ""
    ways = [(way.error, name) for name, way in QUANTISATIONS.items() if way.error and not way.compiled and costs.device in way.devices]
    for _, name in sorted(ways):
        found = _fastest(list(_candidates(replace(costs, quantisation=name), from_disk=False)), *limits)
        needed = math.inf if found is None else math.fsum(option.seconds for _, _, option in found[1].values())
        if found and found[0].quantisation and needed < (1 - _SLOW) * seconds:
            saved = "fit" if math.isinf(seconds) else f"take {100 * needed / seconds:.0f} % of the time"
            return f" With quantisation {name!r} it would {saved} ({QUANTISATIONS[name].in_words()})."
    return ""


def _finished(costs: Costs, found: _Found, unlimited: _Found, vram: int | None, ram: int | None) -> Plan:
    candidate, chosen = found
    stages = [StagePlan(name="load", part="", how=("weights are read",), device=0, host=candidate.load, seconds=0.0)]
    parts = dict(costs.stages)
    for name, (device, host, option) in chosen.items():
        how = stage_in_words(costs.device, candidate.placements[parts[name]], option)
        stages.append(StagePlan(name=name, part=parts[name], how=how, device=device, host=host, seconds=option.seconds))
    fastest = math.fsum(option.seconds for _, _, option in unlimited[1].values())
    plan = Plan(
        model=costs.facts.name,
        dtype=costs.dtype,
        device=costs.device,
        work=costs.work,
        vram=vram,
        ram=ram,
        placements=candidate.placements,
        transformer=chosen["denoise"][2].mode,  # type: ignore[arg-type]
        coding={name: option.mode.saving for name, (_, _, option) in chosen.items() if name in ("encode", "decode")},  # type: ignore[union-attr]
        stages=tuple(stages),
        fastest=fastest,
        machine=costs.machine,
    )
    return explain(plan, costs)
