"""What an evaluation found: rates with their uncertainty, as a table for people, as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data.scenes import Scene
from ..files import atomic_path
from ..video_io import contact_sheet, write_image
from .detectors import Detection

__all__ = ["Rate", "Row", "Sample", "ShapesReport", "paired_difference", "tally"]

_Z = 1.96  # standard deviations of a 95 % interval


class Rate(NamedTuple):
    """`right` of `asked` answers were right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Right answers per question."""
        return self.right / self.asked

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the share (Wilson 1927): (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
        p, n = self.share, self.asked
        centre, spread = p + _Z**2 / (2 * n), _Z * (p * (1 - p) / n + _Z**2 / (4 * n**2)) ** 0.5
        return (centre - spread) / (1 + _Z**2 / n), (centre + spread) / (1 + _Z**2 / n)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, tuple[float, float]]:
    """How much larger the share of right answers is in `after` than in `before`, to the same questions, and its 95 % confidence interval.

    With b answers that were right only before and c that are right only after, of n, the difference is (c - b) / n; its interval is
    Wald's with half an answer more in each cell of the table (Agresti and Min 2005), which holds for small n, too.

    Raises ValueError for other than one answer each to the same questions.
    """
    if not before or len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} answers are not to the same questions: pass as many, and at least one.")
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    won = sum(new and not old for old, new in zip(before, after, strict=True))
    b, c, n = lost + 0.5, won + 0.5, len(before) + 2
    centre, spread = (c - b) / n, _Z * (b + c - (c - b) ** 2 / n) ** 0.5 / n
    return (won - lost) / len(before), (centre - spread, centre + spread)


def tally(scores: Iterable[Mapping[str, bool]]) -> dict[str, Rate]:
    """Rates by attribute from the scores of many videos; a video counts for the attributes that its prompt asks for."""
    counts: dict[str, Rate] = {}
    for score in scores:
        for name, right in score.items():
            before = counts.get(name, Rate(0, 0))
            counts[name] = Rate(before.right + right, before.asked + 1)
    return counts


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: videos of one origin."""

    rates: dict[str, Rate]
    psnr: float | None = None
    """Mean over the videos, dB, of reconstructions."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; rates rounded to 4 digits, with their interval."""
        rates = {
            name: {
                "right": rate.right,
                "asked": rate.asked,
                "share": round(rate.share, 4),
                "interval": [round(p, 4) for p in rate.interval()],
            }
            for name, rate in self.rates.items()
        }
        return {"rates": rates} | ({} if self.psnr is None else {"psnr": round(self.psnr, 3)})


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generated video: what was asked, what was found, and per attribute whether that is right."""

    prompt: str
    seed: int
    wanted: Scene
    found: Detection
    score: dict[str, bool]
    video: np.ndarray | None = field(default=None, repr=False, compare=False)
    """uint8 (F, H, W, 3), kept of the first few."""

    @property
    def label(self) -> str:
        """Prompt, finding and verdict in one line."""
        shapes = [f"{spec.color} {spec.shape or 'something'} {spec.motion}" for spec in self.found.shapes]
        wrong = [name for name, right in self.score.items() if not right and name != "all"]
        verdict = "right" if self.score.get("all") else f"wrong: {', '.join(wrong) or 'number of shapes'}"
        return f"{self.prompt} | found: {' and '.join(shapes) or 'no shape'} on {self.found.background} | {verdict}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the video."""
        found = {"background": self.found.background, "shapes": [asdict(spec) for spec in self.found.shapes]}
        return {"prompt": self.prompt, "seed": self.seed, "wanted": asdict(self.wanted), "found": found, "score": self.score}


@dataclass(frozen=True, kw_only=True)
class ShapesReport:
    """The result of `evaluate shapes`."""

    settings: dict[str, Any]
    """How the videos were made, see generation.settings.Settings."""
    options: dict[str, Any]
    """What was asked for, see options.EvaluateOptions."""
    versions: dict[str, str]
    seconds_per_video: float
    """Making and measuring one of the videos, in batches."""
    rows: dict[str, Row]
    """By origin of the videos, the model's own ("generated") first."""
    samples: Sequence[Sample]
    """One per prompt, in order."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for json.dumps."""
        plain = {name: getattr(self, name) for name in ("settings", "options", "versions", "seconds_per_video")}
        rows = {name: row.to_json() for name, row in self.rows.items()}
        return {**plain, "rows": rows, "samples": [sample.to_json() for sample in self.samples]}

    def table(self) -> str:
        """Percentages by row and attribute, each with its 95 % interval."""
        names = list(next(iter(self.rows.values())).rates)
        lines = [f"{'':<15}{'videos':>7}" + "".join(f"{name:>16}" for name in names) + f"{'PSNR':>10}"]
        for title, row in self.rows.items():
            videos = max((rate.asked for rate in row.rates.values()), default=0)
            quality = "" if row.psnr is None else f"{row.psnr:>7.1f} dB"
            lines.append(f"{title:<15}{videos:>7}" + "".join(_percent(row.rates.get(name)) for name in names) + quality)
        return "\n".join(lines)

    def save(self, folder: Path, name: str = "shapes") -> list[Path]:
        """Write <name>.json, and <name>.png with the videos that were kept, whole or not at all. Returns the paths."""
        files = [folder / f"{name}.json", folder / f"{name}.png"]
        shown = [sample for sample in self.samples if sample.video is not None]
        sheet = contact_sheet([sample.video for sample in shown if sample.video is not None], labels=[sample.label for sample in shown])
        with atomic_path(files[0]) as report:
            report.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
            write_image(files[1], sheet)
        return files


def _percent(rate: Rate | None) -> str:
    """A cell of the table, such as "93.3 (88-96)": the share and its 95 % interval in percent."""
    if rate is None:
        return f"{'':>16}"
    low, high = rate.interval()
    cell = f"{100 * rate.share:.1f} ({100 * low:.0f}-{100 * high:.0f})"
    return f"{cell:>16}"
