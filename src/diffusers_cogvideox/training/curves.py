"""The training curves of one or several runs as one picture, from their metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import atomic_path

__all__ = ["plot_curves", "read_metrics"]

# What is worth a curve, if a run has it; all other figures stay in metrics.jsonl.
_PANELS = ("loss", "psnr", "accuracy")


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf8").splitlines()]


def _panels(name: str, lines: Sequence[Mapping[str, float]]) -> list[tuple[str, list[str]]]:
    """(title, figures) of every panel of one run; the losses of timestep ranges share one."""
    figures = lines[0].keys() if lines else ()
    panels = [(f"{name}: {figure}", [figure]) for figure in _PANELS if figure in figures]
    ranges = sorted({key for line in lines for key in line if key.startswith("loss_t")}, key=lambda key: int(key[6:]))
    return panels + ([(f"{name}: loss by timestep", ranges)] if ranges else [])


def plot_curves(folders: Sequence[str | Path], path: str | Path) -> Path:
    """Write a PNG with the curves of the runs in `folders`, one row per run; the x axis counts optimiser steps.

    Raises:
        ImportError: matplotlib is missing; it comes with the extra "train".
        OSError: a run has no metrics.jsonl, or `path` cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('curves need matplotlib: pip install "diffusers-cogvideox[train]"') from error
    runs = [(Path(folder).name, read_metrics(folder)) for folder in folders]
    rows = [_panels(name, lines) for name, lines in runs]
    columns = max(map(len, rows), default=1)
    figure = Figure(figsize=(5 * columns, 3 * len(rows)), layout="constrained")
    for row, ((_, lines), panels) in enumerate(zip(runs, rows, strict=True)):
        for column, (title, figures) in enumerate(panels):
            axes = figure.add_subplot(len(rows), columns, row * columns + column + 1, title=title, xlabel="step")
            for name in figures:
                points = [(line["step"], line[name]) for line in lines if name in line]
                axes.plot(*zip(*points, strict=True), linewidth=1, label=name)
            axes.set_yscale("log" if title.endswith(("loss", "timestep")) else "linear")
            if len(figures) > 1:
                axes.legend(fontsize="small")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=100)
    return Path(path)
