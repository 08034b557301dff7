"""What a pipeline did to fit into memory, what each stage took, and what had been predicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ...units import in_words
from ..effects import Finding
from ..quantisation import quantisation_of
from ..streaming import is_streamed
from .plan import Plan
from .usage import StageUsage

__all__ = ["Report", "active_measures"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Of the last call of a pipeline.

    Args:
        plan: that it followed, None without.
        active: what was done to save memory or time, in words.
        stages: what each stage took.
        effects: of each optimisation that is on, what it did (`effects.summary`).
    """

    plan: Plan | None
    active: tuple[str, ...]
    stages: dict[str, StageUsage]
    effects: tuple[Finding, ...] = ()

    def predicted(self, stage: str) -> tuple[int | None, int | None]:
        """Bytes on the device and in host memory that the plan expects of a stage."""
        found = [planned for planned in (self.plan.stages if self.plan else ()) if planned.name == stage]
        return (found[0].device or None, found[0].host) if found else (None, None)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        stages = {}
        for name, usage in self.stages.items():
            device, host = self.predicted(name)
            measured = {**asdict(usage), "seconds": round(usage.seconds, 3)}
            stages[name] = {**measured, "predicted_device": device, "predicted_host": host}
        effects = [asdict(finding) for finding in self.effects]
        return {"plan": self.plan.to_json() if self.plan else None, "active": list(self.active), "effects": effects, "stages": stages}

    def __str__(self) -> str:
        lines = [f"active: {'; '.join(self.active) or 'nothing'}", *map(str, self.effects)]
        for name, usage in self.stages.items():
            device, host = self.predicted(name)
            peaks = [
                f"{in_words(measured)} {where}{f' ({in_words(planned)} predicted)' if planned else ''}"
                for measured, planned, where in ((usage.device, device, "on the device"), (usage.host, host, "of RAM"))
                if measured is not None
            ]
            lines.append(f"{name:<8}  {usage.seconds:8.2f} s  {', '.join(peaks)}")
        return "\n".join(lines)


def active_measures(pipe: Any) -> Iterator[str]:
    """What is on in a pipeline, in words; each is read from where it acts."""
    transformer, vae = pipe.transformer, pipe.vae
    for name in ("text_encoder", "transformer"):
        model = getattr(pipe, name)
        if model is not None and is_streamed(model):
            yield f"{name} streamed"
        elif hasattr(model, "_hf_hook"):
            yield f"{name} offloaded"
    if quantised := _quantised(transformer):
        yield f"quantised to {quantised}"
    block: Any = transformer.transformer_blocks[0] if transformer is not None else None
    if getattr(block, "one_by_one", False):
        yield "samples one by one in each block"
    if getattr(block, "ff_tokens", None):
        yield f"feed-forward network {block.ff_tokens} tokens at a time"
    if getattr(transformer, "releases_modulation", False):
        yield "modulation weights put aside"
    if getattr(transformer, "is_cache_enabled", False):
        yield "feature cache"
    saving = getattr(vae, "saving", None)
    if getattr(vae, "use_tiling", False) or (saving is not None and saving.lean):
        yield "VAE in its low-memory mode"


def _quantised(transformer: Any) -> str | None:
    """Name of the transformer's quantisation, None without."""
    try:
        return None if transformer is None else quantisation_of(transformer)
    except ValueError:
        return "another format"
