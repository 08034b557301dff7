"""The figures of benchmarks/vae.py as a Markdown table and as a picture, with the targets that were set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusers_cogvideox.files import atomic_path

__all__ = ["markdown_table", "plot"]

Parts = dict[str, dict[str, Any]]
"""device -> part -> what was found."""

# Times as fast as stock, by device and part; GiB, by part.
SPEED_TARGETS = {"cpu": {"decode-float32": 2.3, "decode-bfloat16": 1.8, "encode-float32": 1.8}, "cuda": {"decode-bfloat16": 1.8}}
MEMORY_TARGETS = {"memory-480x720": 2.5, "memory-768x1360": 7.0}
COLOURS = {"stock": "tab:grey", "stock tiled": "silver", "ours": "tab:blue", "ours low-memory": "tab:green"}


def markdown_table(parts: Parts) -> str:
    """What is measured, stock, ours, and the target, a row each."""
    rows = [("measured", "stock", "stock tiled", "ours", "ours, low memory", "target")]
    rows += [_speed_row(device, part, found) for device, part, found in _timed(parts)]
    for part, found in _large(parts):
        for direction in ("decode", "encode"):
            peaks = {name.partition(", ")[2]: f"{value['measured']:.2f}" for name, value in found["peak_gib"].items() if direction in name}
            size = " x ".join(map(str, found["size"]))
            target = f"<= {MEMORY_TARGETS[part]}" if direction == "decode" else ""
            rows.append((f"{direction} {size} bfloat16: peak, GiB", *(peaks.get(way, "") for way in COLOURS), target))
    if "flops" in parts.get("meta", {}):
        found = parts["meta"]["flops"]
        for direction in ("decode", "encode"):
            counts = {name: str(value) for name, value in found["tflop"].items() if direction in name}
            ours = [counts.get(f"{direction}, ours, {dtype}", "") for dtype in ("float32", "bfloat16")]
            size = " x ".join(map(str, found["size"]))
            stock = (counts.get(f"{direction}, {way}", "") for way in ("stock", "stock tiled"))
            rows.append((f"{direction} {size}: TFLOP", *stock, f"{ours[0]} (bfloat16 {ours[1]})", "", ""))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _timed(parts: Parts) -> list[tuple[str, str, dict[str, Any]]]:
    return [(device, part, found) for device in parts for part, found in sorted(parts[device].items()) if "seconds" in found]


def _large(parts: Parts) -> list[tuple[str, dict[str, Any]]]:
    return [(part, found) for part, found in sorted(parts.get("meta", {}).items()) if "peak_gib" in found]


def _speed_row(device: str, part: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Seconds of stock, and how many times as fast the others are."""
    seconds = {name: sorted(values)[len(values) // 2] for name, values in found["seconds"].items()}
    ratios = {name.partition(" against ")[0]: value for name, value in found["ratio"].items() if name.endswith(" against stock")}
    size = f"{found['frames']} x {found['height']} x {found['width']}"
    name = f"{part.replace('-', ', ')}, {device.upper()}, {size}: seconds (times as fast)"
    target = SPEED_TARGETS.get(device, {}).get(part)
    cells = [f"{seconds[way]:.2f}" + (f" ({ratios[way]:.2f}x)" if way in ratios else "") if way in seconds else "" for way in COLOURS]
    return (name, *cells, f">= {target}x" if target else "")


def plot(parts: Parts, path: Path) -> None:
    """Times as fast as stock, and peak memory, with the targets as lines."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_speed(left, parts)
    _plot_memory(right, parts)
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=100)


def _plot_speed(axes: Axes, parts: Parts) -> None:
    axes.set_title("Times as fast as diffusers' whole-frame")
    labels = []
    for place, (device, part, found) in enumerate(_timed(parts)):
        labels.append(f"{part.replace('-', chr(10))}\n{device}")
        for index, way in enumerate(("ours", "ours low-memory")):
            axes.bar(place + 0.4 * (index - 0.5), found["ratio"][f"{way} against stock"], 0.36, color=COLOURS[way])
        target = SPEED_TARGETS.get(device, {}).get(part)
        if target:
            axes.plot([place - 0.45, place + 0.45], [target, target], color="black")
    axes.axhline(1, color=COLOURS["stock"], linestyle=":")
    axes.set_xticks(range(len(labels)), labels)


def _plot_memory(axes: Axes, parts: Parts) -> None:
    axes.set_title("Peak of live memory, bfloat16, GiB")
    for way, colour in COLOURS.items():
        axes.bar([0], [0], color=colour, label=way)
    labels = []
    for part, found in _large(parts):
        for direction in ("decode", "encode"):
            place = len(labels)
            labels.append(f"{direction}\n{' x '.join(map(str, found['size']))}")
            for index, way in enumerate(COLOURS):
                axes.bar(place + 0.2 * (index - 1.5), found["peak_gib"][f"{direction}, {way}"]["measured"], 0.18, color=COLOURS[way])
            if direction == "decode":
                axes.plot([place - 0.45, place + 0.45], [MEMORY_TARGETS[part]] * 2, color="black", label="target" if not place else None)
    axes.set_xticks(range(len(labels)), labels)
    axes.legend()
