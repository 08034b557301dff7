"""What speeds the shipped model's transformer up, and what that costs: feature caches, fewer steps, guidance in a part of the loop.

    cogvideox calibrate demo --prompts 24 --overwrite     # first: the caches' settings come from there
    python benchmarks/caches.py [--prompts 48] [--rows "8 steps" ...]    # every row of the table, or some
    python benchmarks/caches.py --bound [--prompts 50]    # whether cache="auto" keeps max_error

The first writes results/caches.json and .png: for every row the passes that were computed (a pass of both halves of the guidance counts
as 1), time in pairs with runs without any of it, prompt adherence on held-out prompts, PSNR and error against the video of 20 steps without
a cache. The second writes results/caches_bound.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, write_result
from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.evaluation.detectors import detect, score
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.evaluation.report import tally
from diffusers_cogvideox.evaluation.shapes import ShapesPrompt, held_out_prompts
from diffusers_cogvideox.generation.calibrate import Passes
from diffusers_cogvideox.generation.settings import choose_settings
from diffusers_cogvideox.options import DEMO, EvaluateOptions
from diffusers_cogvideox.pipelines.caching import find_calibration
from diffusers_cogvideox.runtime.calibration import cache_config, latent_errors
from diffusers_cogvideox.runtime.effects import NoEffectError
from diffusers_cogvideox.video_io import to_uint8

BATCH = 8
EVERY = 5  # rows between two runs of the reference, with which times are paired
REFERENCE = "20 steps"

Row = tuple[str, Any, dict[str, Any]]  # name, cache config or None, options of the call


def rows_of(pipe: CogVideoXPipeline) -> list[Row]:
    """All ways that are compared."""
    schedule = find_calibration(pipe).schedules[0]
    caches = [(f"{row.cache} {row.strength:g}", cache_config(row, schedule), {}) for row in schedule.measured]
    taylor = [config for name, config, _ in caches if name == "taylor 3"]
    fewer = [(f"{steps} steps", None, {"num_inference_steps": steps}) for steps in (15, 12, 10, 8)]
    parts = [(f"guided {start:g}-{stop:g}", None, {"guidance_interval": (start, stop)}) for start, stop in ((0, 0.5), (0.1, 0.6))]
    both = {"num_inference_steps": 12, "guidance_interval": (0, 0.5)}
    mixed: list[Row] = [("12 steps, guided 0-0.5", None, both)]
    mixed += [("taylor 3, guided 0-0.5", config, {"guidance_interval": (0, 0.5)}) for config in taylor]
    return [*caches, *fewer, *parts, *mixed]


def make(pipe: CogVideoXPipeline, prompts: Sequence[str], first: int, config: Any, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Latents of one batch, and the seconds that they took."""
    generators = [torch.Generator().manual_seed(first + number) for number in range(len(prompts))]
    started = time.perf_counter()
    try:
        latents = pipe(prompt=list(prompts), generator=generators, cache=config, output_type="latent", **options).frames
    except NoEffectError as error:  # a cache that spared nothing in this batch
        latents = error.latents
    return latents, time.perf_counter() - started


class Tally:
    """What is known of one row."""

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.errors: list[float] = []
        self.psnrs: list[float] = []
        self.scores: list[dict[str, bool]] = []
        self.passes = 0.0

    def add(
        self, latents: torch.Tensor, frames: np.ndarray, exact: tuple[torch.Tensor, np.ndarray], prompts: Sequence[ShapesPrompt]
    ) -> None:
        """One batch."""
        self.errors += latent_errors(latents, exact[0])
        self.psnrs += [psnr(video, other, 255) for video, other in zip(frames, exact[1], strict=True)]
        self.scores += [score(detect(video), prompt.wanted) for video, prompt in zip(frames, prompts, strict=True)]

    def to_json(self, videos: int) -> dict[str, Any]:
        """The row."""
        rates = tally(self.scores)
        finite = [value for value in self.psnrs if np.isfinite(value)]
        return {
            "passes": round(self.passes / videos, 2),
            "speed_up": round(statistics.median(self.ratios), 3) if self.ratios else 1.0,
            "all_correct": round(rates["all"].share, 4),
            "interval": [round(value, 4) for value in rates["all"].interval()],
            "psnr": round(float(np.mean(finite)), 2) if finite else None,
            "error": round(float(np.mean(self.errors)), 4),
            "largest_error": round(max(self.errors), 4),
        }


def compare(
    pipe: CogVideoXPipeline, prompts: Sequence[ShapesPrompt], call: dict[str, Any], rows: Sequence[Row], path: Path
) -> dict[str, Any]:
    """The table, batch by batch, so that all rows see the same noise of the machine; it is written after each."""
    tallies = {name: Tally() for name, _, _ in [(REFERENCE, None, {}), *rows]}
    for first in range(0, len(prompts), BATCH):
        part = prompts[first : first + BATCH]
        texts = [prompt.text for prompt in part]
        exact: Any = None
        for number, (name, config, options) in enumerate(rows):
            if number % EVERY == 0:
                with Passes(pipe.transformer).counting() as passes:
                    latents, reference = make(pipe, texts, first, None, call)
                if exact is None:
                    exact = latents, to_uint8(pipe.decode_frames(latents, output_type="np"))
                    tallies[REFERENCE].add(*exact, exact, part)
                    tallies[REFERENCE].passes += passes.total / 2
            with Passes(pipe.transformer).counting() as passes:
                latents, seconds = make(pipe, texts, first, config, call | options)
            tallies[name].ratios.append(reference / seconds)
            tallies[name].passes += passes.total / 2
            tallies[name].add(latents, to_uint8(pipe.decode_frames(latents, output_type="np")), exact, part)
        done = first + len(part)
        print(done, "videos of each row", flush=True)
        table = {name: found.to_json(done) for name, found in tallies.items()}
        write_result(path, {"prompts": done, "batch": BATCH, "fronts": fronts(table), "rows": table})
    return table


def front(table: dict[str, Any], key: str) -> list[str]:
    """Rows that no other one beats in passes and in `key` (of equals, the one closest to the reference), few passes first."""
    known = [(name, row) for name, row in table.items() if row[key] is not None]
    best: list[str] = []
    for name, row in sorted(known, key=lambda pair: (pair[1]["passes"], -pair[1][key], pair[1]["error"])):
        if not best or row[key] > table[best[-1]][key]:
            best.append(name)
    return best


def fronts(table: dict[str, Any]) -> dict[str, list[str]]:
    """By adherence, where another video of the prompt is as good, and by PSNR, where it must be the same one."""
    return {key: front(table, key) for key in ("all_correct", "psnr")}


def plot(table: dict[str, Any], path: Path) -> None:
    """Adherence and PSNR against passes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), layout="constrained")
    titles = {"all_correct": "all correct", "psnr": "PSNR to 20 steps without a cache, dB"}
    for place, (key, best) in enumerate(fronts(table).items()):
        axes = figure.add_subplot(1, 2, place + 1, xlabel="computed passes", ylabel=titles[key])
        for number, (name, row) in enumerate(table.items()):
            if row[key] is not None:
                axes.plot(row["passes"], row[key], "o", color="C3" if name in best else "C0")
                offset = (4, 4 + 9 * (number % 3))
                axes.annotate(name, (row["passes"], row[key]), fontsize=7, xytext=offset, textcoords="offset points")
        axes.plot([table[name]["passes"] for name in best], [table[name][key] for name in best], color="C3", linewidth=1)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


def bound(pipe: CogVideoXPipeline, prompts: Sequence[ShapesPrompt], call: dict[str, Any], max_error: float) -> dict[str, Any]:
    """The error of cache="auto" on prompts that the calibration has not seen, one video at a time."""
    errors: list[float] = []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(10_000 + number)
        options = {"cache": "auto", "max_error": max_error, "measure_error": True, "output_type": "latent", **call}
        pipe(prompt=prompt.text, generator=generator, **options)
        report = pipe.cache_report
        errors += report.measured
    found = {"cache": report.name, "strength": report.strength, "passes": report.passes, "of": report.steps, "predicted": report.predicted}
    errors_found = {"mean": float(np.mean(errors)), "largest": max(errors), "kept": max(errors) <= max_error}
    return {"max_error": max_error, **found, **errors_found, "errors": [round(error, 5) for error in errors]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--bound", action="store_true")
    parser.add_argument("--first", type=int, default=50, help="with --bound: the first of the held-out prompts")
    parser.add_argument("--max-error", type=float, nargs="+", default=[0.05])
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--output")
    options = parser.parse_args()
    pipe = CogVideoXPipeline.from_pretrained(demo_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    settings = choose_settings(EvaluateOptions(what="shapes"), DEMO)
    call = {name: value for name, value in settings.call_arguments().items() if name not in ("cache", "max_error")}
    if options.bound:
        prompts = held_out_prompts(options.first + (options.prompts or 50))[options.first :]
        found = [bound(pipe, prompts, call, max_error) for max_error in options.max_error]
        write_result(
            Path(options.output or RESULTS / "caches_bound.json"), {"prompts": len(prompts), "first": options.first, "rows": found}
        )
        for row in found:
            print({key: value for key, value in row.items() if key != "errors"})
        return
    prompts = held_out_prompts(options.prompts or 48)
    path = Path(options.output or RESULTS / "caches.json")
    rows = [row for row in rows_of(pipe) if options.rows is None or row[0] in options.rows]
    table = compare(pipe, prompts, call, rows, path)
    plot(table, path.with_suffix(".png"))
    for name, row in table.items():
        print(f"{name:<26}", row)
    print(fronts(table))


if __name__ == "__main__":
    main()
