"""What speeds the shipped model's transformer up, and what that costs: feature caches, fewer steps, guidance in a part of the loop.

    cogvideox calibrate demo --prompts 24 --overwrite     # first: the caches' settings come from there
    python benchmarks/caches.py [--prompts 48] [--rows "8 steps" ...]    # every row of the table, or some
    python benchmarks/caches.py --bound [--prompts 50]    # whether cache="auto" keeps max_error

The first writes results/caches.json and .png: for every row the passes that were computed (a pass of both halves of the guidance counts
as 1), time in pairs with runs without any of it, prompt adherence on held-out prompts and its difference, prompt by prompt, from that
of 20 steps without a cache, PSNR and error against their videos. With --rows it writes the file of --output, by default
results/caches_adherence.json. The second writes results/caches_bound.json.

Batches of prompts are shared by --workers processes with a thread each, by default one for every core: passes and videos do not depend on
that, times do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common import RESULTS, write_result
from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.evaluation.detectors import detect, score
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.evaluation.report import paired_difference, tally
from diffusers_cogvideox.evaluation.shapes import ShapesPrompt, held_out_prompts
from diffusers_cogvideox.generation.calibrate import Passes
from diffusers_cogvideox.generation.settings import choose_settings
from diffusers_cogvideox.options import DEMO, EvaluateOptions
from diffusers_cogvideox.pipelines.caching import find_calibration
from diffusers_cogvideox.runtime.calibration import cache_config, latent_errors
from diffusers_cogvideox.runtime.effects import NoEffectError
from diffusers_cogvideox.video_io import to_uint8

BATCH = 8
REFERENCE = "20 steps"

Row = tuple[str, Any, dict[str, Any]]  # name, cache config or None, options of the call


@cache
def loaded() -> CogVideoXPipeline:
    """The shipped model, once in every process."""
    pipe = CogVideoXPipeline.from_pretrained(demo_model(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments() -> dict[str, Any]:
    """Those of the reference's call."""
    settings = choose_settings(EvaluateOptions(what="shapes"), DEMO)
    return {name: value for name, value in settings.call_arguments().items() if name not in ("cache", "max_error")}


def rows_of(pipe: CogVideoXPipeline, names: Sequence[str] | None) -> list[Row]:
    """All ways that are compared, or those of these names, after the reference. Raises ValueError for a name that there is not."""
    schedule = find_calibration(pipe).schedules[0]
    rows: list[Row] = [(f"{row.cache} {row.strength:g}", cache_config(row, schedule), {}) for row in schedule.measured]
    rows += [(f"{steps} steps", None, {"num_inference_steps": steps}) for steps in (15, 12, 10, 8)]
    half = {"guidance_interval": (0, 0.5)}
    rows += [("guided 0-0.5", None, half), ("12 steps, guided 0-0.5", None, {"num_inference_steps": 12, **half})]
    unknown = sorted(set(names or ()) - {name for name, _, _ in rows})
    if unknown:
        raise ValueError(f"--rows {unknown} are unknown: there are {', '.join(name for name, _, _ in rows)}.")
    return [(REFERENCE, None, {}), *(row for row in rows if names is None or row[0] in names)]


class Record(NamedTuple):
    """What one row made of one batch: for each video its error, PSNR and score; passes and seconds of all."""

    errors: list[float]
    psnrs: list[float]
    scores: list[dict[str, bool]]
    passes: float
    seconds: float


def make(pipe: CogVideoXPipeline, prompts: Sequence[str], first: int, config: Any, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """Latents of one batch, and the seconds that they took."""
    generators = [torch.Generator().manual_seed(first + number) for number in range(len(prompts))]
    started = time.perf_counter()
    try:
        latents = pipe(prompt=list(prompts), generator=generators, cache=config, output_type="latent", **options).frames
    except NoEffectError as error:  # a cache that spared nothing in this batch
        latents = error.latents
    return latents, time.perf_counter() - started


def measured(prompts: Sequence[ShapesPrompt], first: int, names: Sequence[str] | None) -> dict[str, Record]:
    """All rows of one batch, whose prompts are those from number `first` on."""
    torch.set_num_threads(1)
    pipe, call, found = loaded(), arguments(), {}
    exact: Any = None
    for name, config, options in rows_of(pipe, names):
        with Passes(pipe.transformer).counting() as passes:
            latents, seconds = make(pipe, [prompt.text for prompt in prompts], first, config, call | options)
        frames = to_uint8(pipe.decode_frames(latents, output_type="np"))
        exact = exact or (latents, frames)
        found[name] = Record(
            errors=latent_errors(latents, exact[0]),
            psnrs=[psnr(video, other, 255) for video, other in zip(frames, exact[1], strict=True)],
            scores=[score(detect(video), prompt.wanted) for video, prompt in zip(frames, prompts, strict=True)],
            passes=passes.total / 2,
            seconds=seconds,
        )
    return found


def to_json(records: Sequence[Record], references: Sequence[Record]) -> dict[str, Any]:
    """A row from what it made of all batches, and the reference of the same."""
    scores, exact = ([score for record in several for score in record.scores] for several in (records, references))
    errors = [error for record in records for error in record.errors]
    finite = [value for record in records for value in record.psnrs if np.isfinite(value)]
    rates = tally(scores)
    difference, interval = paired_difference([score["all"] for score in exact], [score["all"] for score in scores])
    return {
        "passes": round(sum(record.passes for record in records) / len(scores), 2),
        "speed_up": round(statistics.median(one.seconds / own.seconds for one, own in zip(references, records, strict=True)), 3),
        "all_correct": round(rates["all"].share, 4),
        "interval": [round(value, 4) for value in rates["all"].interval()],
        "points": round(100 * difference, 2),
        "points_interval": [round(100 * value, 2) for value in interval],
        "psnr": round(float(np.mean(finite)), 2) if finite else None,
        "error": round(float(np.mean(errors)), 4),
        "largest_error": round(max(errors), 4),
    }


def compare(prompts: Sequence[ShapesPrompt], names: Sequence[str] | None, workers: int, path: Path) -> dict[str, Any]:
    """The table; it is written after each batch."""
    done: dict[int, dict[str, Record]] = {}
    table: dict[str, Any] = {}
    for first, found in _batches(prompts, names, workers):
        done[first] = found
        batches = [done[number] for number in sorted(done)]
        table = {name: to_json([batch[name] for batch in batches], [batch[REFERENCE] for batch in batches]) for name in found}
        videos = sum(len(batch[REFERENCE].errors) for batch in batches)
        print(videos, "videos of each row", flush=True)
        write_result(path, {"prompts": videos, "batch": BATCH, "workers": workers, "fronts": fronts(table), "rows": table})
    return table


def _batches(prompts: Sequence[ShapesPrompt], names: Sequence[str] | None, workers: int) -> Iterator[tuple[int, dict[str, Record]]]:
    """(number of the first prompt, records) of each batch, as they come."""
    parts = {first: prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)}
    if workers == 1:
        yield from ((first, measured(part, first, names)) for first, part in parts.items())
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(measured, part, first, names): first for first, part in parts.items()}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


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
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.bound:
        prompts = held_out_prompts(options.first + (options.prompts or 50))[options.first :]
        found = [bound(loaded(), prompts, arguments(), max_error) for max_error in options.max_error]
        write_result(
            Path(options.output or RESULTS / "caches_bound.json"), {"prompts": len(prompts), "first": options.first, "rows": found}
        )
        for row in found:
            print({key: value for key, value in row.items() if key != "errors"})
        return
    rows_of(loaded(), options.rows)  # an unknown one is told before the work begins
    path = Path(options.output or RESULTS / ("caches_adherence.json" if options.rows else "caches.json"))
    table = compare(held_out_prompts(options.prompts or 48), options.rows, options.workers, path)
    if not options.rows:
        plot(table, path.with_suffix(".png"))
    for name, row in table.items():
        print(f"{name:<26}", row)
    print(fronts(table))


if __name__ == "__main__":
    main()
