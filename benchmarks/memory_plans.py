"""The tables of docs/memory.md: how every released model fits into what consumers have. Plans only; nothing is run.

python benchmarks/memory_plans.py [--check]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from diffusers_cogvideox import PRESETS
from diffusers_cogvideox.files import atomic_path
from diffusers_cogvideox.generation.memory_plan import plan_for
from diffusers_cogvideox.generation.plan_options import PlanOptions
from diffusers_cogvideox.runtime.memory.plan import Plan

__all__ = ["DOCUMENT", "with_tables"]

DOCUMENT = Path(__file__).parents[1] / "docs" / "memory.md"
BUDGETS = (24, 16, 12, 8, 6, 5)
BEGIN, END = "<!-- plans: begin -->", "<!-- plans: end -->"
_SHORT = {"resident": "resident", "staged": "staged", "streamed": "streamed", "disk": "from disk"}


def tables() -> str:
    """One table for each release, as Markdown."""
    return "\n\n".join("\n".join(_table(name)) for name in PRESETS)


def _table(name: str) -> Iterator[str]:
    preset = PRESETS[name]
    yield f"**{name}**, {preset.num_frames} frames of {preset.height}x{preset.width}, {preset.dtype}"
    yield ""
    yield "| GB | text encoder | transformer | VAE | text | loop | decode | RAM | longer by |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for budget in BUDGETS:
        yield _row(name, budget)


def _row(name: str, budget: int) -> str:
    try:
        plan = plan_for(PlanOptions(name, vram=f"{budget}GB", device="cuda"))
    except ValueError as error:
        smallest = str(error).partition("smallest budget that works is ")[2].partition(" of device memory")[0]
        return f"| {budget} | does not fit: {smallest} would |" + " |" * 7
    peaks = {stage.name: f"{stage.device / 1e9:.1f}" for stage in plan.stages}
    cells = [str(budget), *_places(plan), peaks["text"], peaks["denoise"], peaks["decode"]]
    return f"| {' | '.join(cells)} | {plan.host_peak / 1e9:.0f} | {100 * plan.slow_down:.0f} % |"


def _places(plan: Plan) -> Iterator[str]:
    """How each part is kept, and what else is done."""
    mode = plan.transformer
    measures = [
        words
        for active, words in (
            (mode.split_batch, "split"),
            (mode.ff_tokens, f"feed-forward by {mode.ff_tokens}"),
            (mode.release_modulation, "tables"),
        )
        if active
    ]
    yield _SHORT[plan.placements["text_encoder"]]
    yield ", ".join([_SHORT[plan.placements["transformer"]], *measures])
    yield _SHORT[plan.placements["vae"]] + (", low-memory" if plan.coding["decode"].lean else "")


def with_tables(text: str) -> str:
    """A document with the tables of today between its two marks."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write the tables into the document, or only check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the document has other tables")
    given = parser.parse_args()
    text = DOCUMENT.read_text(encoding="utf-8")
    if given.check:
        raise SystemExit(0 if with_tables(text) == text else f"{DOCUMENT} is out of date: run this script without --check")
    with atomic_path(DOCUMENT) as partial:
        partial.write_text(with_tables(text), encoding="utf-8")


if __name__ == "__main__":
    main()
