"""The VAE against diffusers' own: time, error, memory and multiplications.

    python benchmarks/vae.py [--only PART ...] [--device cuda] [--tiled] [--pairs 3]
    python benchmarks/vae.py --table

Both have the same random weights and the released widths. Times are taken in turn (A B A B ...) in one process; ratios are medians over the
pairs. Sizes at which no processor would finish are measured on the meta device, where tensors have sizes and no contents. Parts may be
measured one after the other: results are merged into results/vae.json, from which results/vae.png and the table are made.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import RESULTS, machine, measured, random_model, write_result
from diffusers_cogvideox.files import check_writable
from live_storages import live_peak
from vae_cases import DTYPES, build, cast, class_of, code, config_of, draw, hollow, input_shape, saving_of, setting, ways
from vae_report import markdown_table, plot

TIMED = tuple(f"{direction}-{dtype}" for direction in ("decode", "encode") for dtype in DTYPES)
LARGE = {"memory-480x720": (49, 480, 720), "memory-768x1360": (81, 768, 1360)}
PARTS = (*TIMED, "error", "used", *LARGE, "flops")
FIRST = 17  # frames that hold two chunks; the chunks behind the second take the same memory

Call = Callable[[], Tensor]


# --- what is measured -----------------------------------------------------------------------------------------------------


def paired_seconds(calls: dict[str, Call], pairs: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each of `pairs` rounds, after a round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pairs + 1):
        for name, call in calls.items():
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: [round(value, 4) for value in values[1:]] for name, values in seconds.items()}


def _synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_part(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """Seconds, and how many times as fast as stock we are."""
    direction, dtype = part.split("-")
    ours, stock = (cast(model, DTYPES[dtype]) for model in build(given))
    x = draw(direction, given).to(DTYPES[dtype])

    def call(name: str) -> Tensor:
        return code(setting(stock if "stock" in name else ours, name, given.height, given.width), direction, x)

    seconds = paired_seconds({name: functools.partial(call, name) for name in ways(given, direction)}, given.pairs, given.device)
    ratios = {
        f"{mine} against {theirs}": round(median(a / b for a, b in zip(seconds[theirs], seconds[mine], strict=True)), 3)
        for mine in seconds
        for theirs in seconds
        if "ours" in mine and "stock" in theirs
    }
    return {"pairs": given.pairs, "seconds": seconds, "ratio": ratios}


def error_part(given: argparse.Namespace) -> dict[str, Any]:
    """Ours against stock in float32; both in bfloat16 against stock in float32, and ours over stock's for each of some inputs."""
    ours, stock = build(given)
    inputs = {direction: [draw(direction, given, seed) for seed in range(1, given.inputs + 1)] for direction in ("decode", "encode")}
    truths = {direction: [code(stock, direction, x) for x in several] for direction, several in inputs.items()}
    result: dict[str, Any] = {direction: {} for direction in inputs}
    for name, way in {"float32": "ours", "float32, low-memory": "ours low-memory"}.items():
        for direction, row in result.items():
            found = code(setting(ours, way, given.height, given.width), direction, inputs[direction][0])
            row[name] = distance(found, truths[direction][0])
    ours.disable_tiling()
    for name, model in {"ours": cast(ours, torch.bfloat16), "stock": cast(stock, torch.bfloat16)}.items():
        for direction, row in result.items():
            rounded = [code(model, direction, x.bfloat16()).float() for x in inputs[direction]]
            row[f"bfloat16, {name}"] = [distance(*pair) for pair in zip(rounded, truths[direction], strict=True)]
    for row in result.values():
        pairs = zip(row["bfloat16, ours"], row["bfloat16, stock"], strict=True)
        row["bfloat16, ours over stock"] = [round(a["relative_rms"] / b["relative_rms"], 3) for a, b in pairs]
    return result


def distance(x: Tensor, truth: Tensor) -> dict[str, float]:
    """Largest difference, and root mean square of the difference relative to that of the truth."""
    difference = (x - truth).double()
    rms = difference.square().mean().sqrt() / truth.double().square().mean().sqrt()
    return {"max_abs": float(f"{difference.abs().max():.3g}"), "relative_rms": float(f"{rms:.3g}")}


def used_part(given: argparse.Namespace) -> dict[str, Any]:
    """GiB beside weights and input: the allocator's peak on a GPU, else what the resident set of a fresh process grows by."""
    names = [(direction, dtype, way) for direction in ("decode", "encode") for dtype in DTYPES for way in ways(given, direction)]
    if given.device == "cuda":
        return {", ".join(name): used_gib(name, given) for name in names}
    numbers = ("frames", "height", "width", "threads")
    options = [text for name in numbers for text in (f"--{name}", str(getattr(given, name)))]
    found = {}
    for name in names:
        command = [sys.executable, __file__, *options, "--widths", *map(str, given.widths), "--used", *name]
        found[", ".join(name)] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def used_gib(name: tuple[str, str, str], given: argparse.Namespace) -> float:
    """What one call takes beside weights and input, in GiB."""
    direction, dtype, way = name
    model = setting(random_model(class_of(way), config_of(given), DTYPES[dtype]).to(given.device), way, given.height, given.width)
    x = draw(direction, given).to(DTYPES[dtype])
    _, used = measured(lambda: code(model, direction, x), torch.device(given.device))
    return _gib((used.device if given.device == "cuda" else used.host) or 0)


def memory_part(size: tuple[int, int, int], given: argparse.Namespace) -> dict[str, Any]:
    """GiB alive at once in bfloat16 at a released size, and what `estimate_peak` says."""
    found: dict[str, Any] = {}
    for direction in ("decode", "encode"):
        for way in ("stock", "stock tiled", "ours", "ours low-memory"):
            found[f"{direction}, {way}"] = live_gib(direction, way, size, given)
            print(direction, way, found[f"{direction}, {way}"], flush=True)
    what = f"bfloat16; ours: {FIRST} frames measured, the bytes of the other frames' result added; caches in host memory not counted"
    return {"size": size, "what": what, "peak_gib": found}


def live_gib(direction: str, way: str, size: tuple[int, int, int], given: argparse.Namespace) -> dict[str, float]:
    """Measured on the meta device, and for ours as estimated."""
    frames, height, width = size
    if "stock" in way:
        stock = setting(hollow(way, given), way, height, width)
        x = torch.empty(input_shape(direction, *size), dtype=torch.bfloat16, device="meta")
        return {"measured": _gib(live_peak(functools.partial(code, stock, direction), x, model=stock))}
    ours: Any = hollow(way, given)
    ours.saving = saving_of(ours, way, height, width)
    start = torch.empty(input_shape(direction, FIRST, height, width), dtype=torch.bfloat16, device="meta")
    peak = live_peak(functools.partial(code, ours, direction), start, model=ours)
    # What is made of the other frames; the joined result beside its pieces is much smaller than what a chunk takes.
    other = 3 * (frames - FIRST) * height * width if direction == "decode" else 32 * (frames - FIRST) // 4 * height * width // 64
    return {"measured": _gib(peak + 2 * other), "estimated": _gib(ours.estimate_peak(input_shape(direction, *size), direction))}


def _gib(size: int) -> float:
    return round(size / 2**30, 3)


def flops_part(given: argparse.Namespace) -> dict[str, Any]:
    """TFLOP of matrix products and convolutions, a multiplication and an addition each counted, at 49 x 480 x 720, as on an accelerator."""
    found = {}
    size = LARGE["memory-480x720"]
    for direction in ("decode", "encode"):
        for way, dtype in [("stock", "float32"), ("stock tiled", "float32"), ("ours", "float32"), ("ours", "bfloat16")]:
            model = setting(cast(hollow(way, given), DTYPES[dtype]), way, *size[1:])
            first, two = (_flops(model, direction, (frames, *size[1:]), DTYPES[dtype]) for frames in (FIRST - 8, FIRST))
            total = two + (size[0] - FIRST) // 8 * (two - first)  # the chunks behind the second take as many
            found[f"{direction}, {way}" + (f", {dtype}" if way == "ours" else "")] = round(total / 1e12, 1)
    return {"size": size, "tflop": found}


def _flops(model: nn.Module, direction: str, size: tuple[int, int, int], dtype: torch.dtype) -> int:
    with FlopCounterMode(display=False) as counter:
        code(model, direction, torch.empty(input_shape(direction, *size), dtype=dtype, device="meta"))
    return counter.get_total_flops()


# --- the command ----------------------------------------------------------------------------------------------------------


def measure(part: str, given: argparse.Namespace) -> dict[str, Any]:
    """One part, with the settings that it depends on."""
    if part in LARGE:
        found = memory_part(LARGE[part], given)
    elif part == "flops":
        found = flops_part(given)
    else:
        small = {name: getattr(given, name) for name in ("frames", "height", "width")}
        parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {"error": error_part, "used": used_part}
        found = small | (parts[part](given) if part in parts else time_part(part, given))
    return {"widths": given.widths, **found}


def merge(path: Path, part: str, found: dict[str, Any], device: str) -> dict[str, Any]:
    """Put a part into the JSON file, beside those that are there; returns all of them."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    where = "meta" if part in LARGE or part == "flops" else device
    machines = {**known.get("machine", {}), where: machine()}
    parts = known.get("parts", {})
    parts[where] = {**parts.get(where, {}), part: found}
    result = {"machine": machines, "parts": parts}
    write_result(path, result)
    return result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--inputs", type=int, default=3, help="how many inputs errors are told of")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--widths", type=int, nargs=4, default=[128, 256, 256, 512], help="others, to try the script")
    parser.add_argument("--tiled", action="store_true", help="measure stock's tiled decoding too")
    parser.add_argument("--table", action="store_true", help="measure nothing; print the results as Markdown")
    parser.add_argument("--used", nargs=3, help=argparse.SUPPRESS)  # one measurement of used_part
    parser.add_argument("--output", type=Path, default=RESULTS / "vae.json")
    return parser.parse_args()


def main() -> None:
    """Measure, write the results and draw them."""
    given = parse()
    if given.table:
        print(markdown_table(json.loads(given.output.read_text(encoding="utf-8"))["parts"]))
        return
    torch.set_num_threads(given.threads)
    if given.used:
        print(used_gib(tuple(given.used), given))
        return
    check_writable(given.output)
    for part in given.only:
        found = measure(part, given)
        print(part, json.dumps(found), flush=True)
        plot(merge(given.output, part, found, given.device)["parts"], given.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
