"""A plan in words: what is done in each stage, and why, with the figures that decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...units import in_words
from ..quantisation import QUANTISATIONS
from .costs import WINDOW, Costs, Option, Placement, TransformerMode
from .plan import Plan
from .vae import Coding

__all__ = ["explain", "in_short", "stage_in_words"]

_IN_MEMORY = "in memory throughout"
_PLACES = {
    "resident": "on the device throughout",
    "staged": "on the device for this stage, in host memory otherwise",
    "streamed": f"streamed from host memory, {WINDOW} blocks on the device",
    "disk": f"read from disk block by block, {WINDOW} at a time",
}


def stage_in_words(device: str, placement: Placement, option: Option) -> tuple[str, ...]:
    """What is done in a stage, on a kind of device."""
    mode, place = option.mode, _IN_MEMORY if device == "cpu" and placement == "resident" else _PLACES[placement]
    if isinstance(mode, TransformerMode):
        found = (
            (mode.quantisation, f"quantised to {mode.quantisation} (lossy)"),
            (mode.split_batch, "samples one by one in each block"),
            (mode.ff_tokens, f"feed-forward network {mode.ff_tokens} tokens at a time"),
            (mode.release_modulation, "modulation weights in host memory, tables in their place"),
        )
        return (place, *(words for active, words in found if active))
    if isinstance(mode, Coding) and mode.saving.lean:
        caches = ", caches in host memory" if mode.saving.offload else ""
        rows = mode.saving.bands.rows
        return place, f"low-memory mode{f', bands of {rows} rows' if mode.thrift > 1 else ''}{caches}"
    return (place,)


def explain(plan: Plan, costs: Costs) -> Plan:
    """The plan with its reasons."""
    return replace(plan, reasons=tuple(_reasons(plan, costs)))


def in_short(plan: Plan) -> str:
    """The plan in one line."""
    peaks = [(plan.device_peak, "on the device"), (plan.host_peak, "of RAM")]
    sizes = " and ".join(f"{in_words(size)} {where}" for size, where in peaks if size)
    hows = "; ".join(f"{stage.name}: {', '.join(stage.how)}" for stage in plan.stages if stage.part)
    return f"memory: {sizes} at the peak ({hows})."


def _reasons(plan: Plan, costs: Costs) -> Iterator[str]:
    if plan.placements["transformer"] in ("streamed", "disk"):
        yield _overlap(plan, costs)
    away = [part.replace("_", " ") for part, place in plan.placements.items() if place == "staged"]
    if away:
        size = in_words(sum(costs.weights(part.replace(" ", "_")) for part in away))
        yield f"Weights of the {' and the '.join(away)} ({size}) are on the device only while they are used: room for the rest."
    if plan.transformer.quantisation:
        yield f"{plan.transformer.quantisation}: {QUANTISATIONS[plan.transformer.quantisation].in_words()}."
    elif costs.quantisation and costs.quantisation not in costs.quantisations:
        yield f"{costs.quantisation} is not used: it comes before LoRAs are loaded, and there is one."
    elif costs.quantisation:
        yield f"{costs.quantisation} is not used: the result stays the same without, in about the same time."
    if plan.slow_down > 0.005:
        yield f"Expected to take {100 * plan.slow_down:.0f} % longer than with no limit on memory."
    else:
        yield "Expected to take no longer than with no limit on memory."
    yield f"Times assume {plan.machine}; they were not measured."


def _overlap(plan: Plan, costs: Costs) -> str:
    """Whether a block's weights are there when the block before it has been computed."""
    mode, machine = plan.transformer, plan.machine
    blocks = costs.facts.transformer_part.blocks
    size = blocks * costs.block("transformer", mode.quantisation)
    source, speed = ("disk", machine.disk) if plan.placements["transformer"] == "disk" else ("host memory", machine.link)
    arrival, computing = size / speed, costs.operations / machine.compute
    what = f"{in_words(size)} of weights come from {source} in each pass, in {arrival:.2f} s at {speed / 1e9:g} GB/s"
    if arrival <= computing:
        return f"{what}, while {computing:.2f} s are computed: streaming hides behind the arithmetic."
    return f"{what}, and only {computing:.2f} s are computed meanwhile: the weights are waited for."
