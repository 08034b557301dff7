"""Whole calls of a pipeline against diffusers' own: step time, call time and memory, in turn (A B A B ...), and plans at several budgets.

    python benchmarks/pipeline.py [--presets 2b 5b] [--layers 2] [--pairs 3] [--device cpu] [--output FILE.json]

Real widths with few blocks and random weights in bfloat16 on a processor; all blocks on a GPU with --layers 0. Random embeddings take the
place of the text encoder. Beside that, at full size and on the meta device: what a pass of the transformer keeps alive, and what the plans
for several budgets take. Step times of a GPU are measured only where there is one.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler as StockScheduler
from diffusers import CogVideoXPipeline as StockPipeline
from diffusers.models import AutoencoderKLCogVideoX as StockVAE
from diffusers.models import CogVideoXTransformer3DModel as StockTransformer

from common import RESULTS, measured, random_model, timed_call, write_result
from diffusers_cogvideox import PRESETS, AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.files import atomic_path, check_writable
from diffusers_cogvideox.models.rope import rope_for
from diffusers_cogvideox.runtime.memory.facts import ModelFacts
from diffusers_cogvideox.runtime.memory.planner import make_plan
from diffusers_cogvideox.runtime.memory.workload import Workload
from live_storages import fused_attention, live_peak

BUDGETS = (24, 16, 12, 8, 6, 5)
NAMES = ("stock", "ours")


def pipelines(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Stock's and ours, with the same weights."""
    preset = PRESETS[name]
    config = preset.transformer | ({"num_layers": options.layers} if options.layers else {})
    scheduler = StockScheduler(**preset.scheduler)
    parts = {
        "transformer": random_model(StockTransformer, config, torch.bfloat16),
        "vae": random_model(StockVAE, preset.vae, torch.bfloat16),
    }
    own = {}
    for part, cls in (("transformer", CogVideoXTransformer3DModel), ("vae", AutoencoderKLCogVideoX)):
        with torch.device("meta"):
            own[part] = cls.from_config(parts[part].config)
        own[part].load_state_dict(parts[part].state_dict(), assign=True)
    text = {"tokenizer": None, "text_encoder": None, "scheduler": scheduler}
    made = {
        "stock": StockPipeline(**parts, **text),
        "ours": CogVideoXPipeline(**{part: model.eval() for part, model in own.items()}, **text),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return {which: pipe.to(options.device) for which, pipe in made.items()}


def run(pipe: Any, options: argparse.Namespace) -> tuple[dict[str, float], torch.Tensor]:
    """One call: seconds of a step (the median) and of all, on a GPU the bytes that it took at its peak beyond what there was; its video.

    The memory of a process that has run before does not tell what a call takes: `live` counts that.
    """
    device = torch.device(options.device)
    (video, steps), used = measured(lambda: timed_call(pipe, options, "pt"), device)
    found = {"step": statistics.median(steps[1:] or steps), "call": used.seconds}
    return found | ({"bytes": used.device or 0} if device.type == "cuda" else {}), video


def paired(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both in turn; medians, and the median of the paired ratios stock / ours."""
    pipes = pipelines(name, options)
    videos = {which: run(pipe, options)[1] for which, pipe in pipes.items()}  # warms up, too
    found: dict[str, list[dict[str, float]]] = {which: [] for which in NAMES}
    for _ in range(options.pairs):
        for which in NAMES:
            found[which].append(run(pipes[which], options)[0])
    medians = {which: {key: statistics.median(one[key] for one in found[which]) for key in found["stock"][0]} for which in NAMES}
    ratios = {
        key: statistics.median(a[key] / b[key] for a, b in zip(found["stock"], found["ours"], strict=True)) for key in ("step", "call")
    }
    difference = (videos["ours"].float().cpu() - videos["stock"].float().cpu()).abs().mean().item()
    return {"medians": medians, "stock_over_ours": ratios, "runs": found, "mean_difference_of_pixels": difference}


def live(name: str) -> dict[str, int]:
    """Bytes that a guided pass at the native size keeps alive, counted on two blocks: stock's, ours, and ours in its thriftier ways."""
    preset = PRESETS[name]
    config = preset.transformer | {"num_layers": 2}
    facts = ModelFacts.of_preset(preset)
    frames, height, width = Workload(height=preset.height, width=preset.width, num_frames=preset.num_frames).latents(facts.geometry)
    latents = torch.empty(2, frames, config["in_channels"], height, width, dtype=torch.bfloat16, device="meta")
    text = torch.empty(2, config["max_text_seq_length"], config["text_embed_dim"], dtype=torch.bfloat16, device="meta")
    rotary = rope_for(config, frames, height, width, "meta") or ()
    ofs = {"ofs": torch.full((1,), 2.0, device="meta")} if config.get("ofs_embed_dim") else {}
    found = {}
    for which, cls, prepare in (
        ("stock", StockTransformer, lambda _: None),
        ("ours", CogVideoXTransformer3DModel, lambda _: None),
        ("ours, split", CogVideoXTransformer3DModel, lambda model: model.split_batch()),
    ):
        with torch.device("meta"):
            model = torch.nn.Module.to(cls(**config), torch.bfloat16).eval()
        prepare(model)

        def call(latents: torch.Tensor, text: torch.Tensor, *rotary: torch.Tensor, model: Any = model) -> Any:
            timestep = torch.empty(2, device="meta")
            return model(latents, text, timestep, image_rotary_emb=rotary or None, return_dict=False, **ofs)

        with fused_attention():
            found[which] = live_peak(call, latents, text, *rotary, model=model)
    return found


def plans(name: str) -> dict[str, Any]:
    """Predicted peaks on a GPU at several budgets, and the expected slow-down; None where nothing fits."""
    preset, found = PRESETS[name], {}
    work = Workload(height=preset.height, width=preset.width, num_frames=preset.num_frames)
    for budget in BUDGETS:
        try:
            plan = make_plan(ModelFacts.of_preset(preset), work, vram=budget * 10**9)
        except ValueError:
            found[str(budget)] = None
        else:
            found[str(budget)] = {"device_peak": plan.device_peak, "host_peak": plan.host_peak, "slow_down": plan.slow_down}
    return found


def plot(parts: dict[str, Any], path: Path) -> None:
    """Step and call time, stock over ours; live memory of a pass."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for place, part in enumerate(parts.values()):
        named = not place
        for offset, key in enumerate(("step", "call")):
            ratio = part["pairs"]["stock_over_ours"][key]
            left.bar(place + 0.4 * offset - 0.2, ratio, 0.38, color=f"C{offset}", label=key if named else None)
        for offset, (way, size) in enumerate(part["live_bytes_of_a_pass"].items()):
            right.bar(place + 0.27 * offset - 0.27, size / 2**30, 0.25, color=f"C{offset}", label=way if named else None)
    for axes, title in ((left, "time, stock / ours (above 1: ours is faster)"), (right, "live memory of a guided pass, GiB")):
        axes.set_xticks(range(len(parts)), list(parts))
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
    left.axhline(1, color="grey", linewidth=0.8)
    with atomic_path(path) as partial:
        figure.savefig(partial, format="png", dpi=110, bbox_inches="tight")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=("2b", "5b", "1.5-5b"), default=["2b", "5b"])
    parser.add_argument("--layers", type=int, default=2, help="blocks; 0 for all")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--width", type=int, default=288)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "pipeline.json")
    return parser.parse_args()


def main() -> None:
    """Measure, write the results and draw them."""
    options = parse()
    torch.set_num_threads(options.threads)
    check_writable(options.output)
    parts = {}
    for name in options.presets:
        parts[name] = {"pairs": paired(name, options), "live_bytes_of_a_pass": live(name), "plans_by_gb": plans(name)}
        print(name, parts[name]["pairs"]["stock_over_ours"], parts[name]["live_bytes_of_a_pass"], flush=True)
    video = {key: getattr(options, key) for key in ("frames", "height", "width", "steps", "layers", "device")}
    write_result(options.output, {"what": "random weights, bfloat16, guidance on", "video": video, "parts": parts})
    plot(parts, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
