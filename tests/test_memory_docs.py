"""docs/memory.md says what the planner says today."""

from diffusers_cogvideox import PRESETS
from memory_plans import DOCUMENT, with_tables


def test_the_document_holds_the_planners_tables():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python benchmarks/memory_plans.py"
    assert all(f"**{name}**" in text for name in PRESETS)
