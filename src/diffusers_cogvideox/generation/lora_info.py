"""What a LoRA file is, for the verb `info`: layout, ranks, alphas, targets, precision, and the releases that it fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.layers import fitting_presets
from ..pipelines.folder import INDEX
from ..pipelines.lora_files import WEIGHTS, fetch_lora, has_lora_file, open_lora
from .model_folder import source_of

__all__ = ["describe_lora", "is_lora_place", "lora_as_text"]


def is_lora_place(model: str) -> bool:
    """Whether `model` is a file, here or on the hub (owner/name/FILE), or a folder that holds no model but a file of a LoRA."""
    path = Path(source_of(model))
    if path.is_dir():
        return not (path / INDEX).is_file() and not (path / "config.json").is_file() and has_lora_file(path)
    return path.is_file() or (model.count("/") > 1 and model.endswith(WEIGHTS))


def describe_lora(model: str) -> dict[str, Any]:
    """All facts about a LoRA file, or the folder of one.

    Keys: lora (file), layout, ranks, alphas (None when the file does not say), dora, targets (kind of layer -> how many), layers,
    blocks, parameters, dtypes, fits (names of releases). Raises what `fetch_lora` and `open_lora` raise.
    """
    lora = open_lora(fetch_lora(model))
    layers = lora.layers.values()
    tensors = [tensor for layer in layers for tensor in layer.tensors.values()]
    alphas = {layer.alpha for layer in layers if layer.alpha is not None}
    return {
        "lora": lora.source,
        "layout": lora.layout.name,
        "ranks": sorted({layer.rank for layer in layers}),
        "alphas": sorted(alphas) or None,
        "dora": lora.is_dora,
        "targets": dict(Counter(re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in lora.layers)),
        "layers": len(lora.layers),
        "blocks": len({name.split(".")[1] for name in lora.layers if name.startswith("transformer_blocks.")}),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "fits": fitting_presets(lora.shapes),
    }


def lora_as_text(facts: Mapping[str, Any]) -> str:
    """The facts of `describe_lora` in two aligned columns."""
    alphas = facts["alphas"]
    rows = {
        "lora": facts["lora"],
        "layout": facts["layout"] + (", DoRA" if facts["dora"] else ""),
        "rank": _numbers(facts["ranks"]),
        "alpha": _numbers(alphas) if alphas else "not in the file: give it as --lora-alpha, in Python lora_alpha=...",
        "targets": ", ".join(facts["targets"]),
        "layers": f"{facts['layers']} in {facts['blocks']} blocks",
        "parameters": f"{facts['parameters']:,} ({', '.join(facts['dtypes'])})",
        "fits": ", ".join(facts["fits"]) or "none of the released models",
    }
    return "\n".join(f"{title:<13}{text}" for title, text in rows.items())


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)
