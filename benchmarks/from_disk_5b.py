"""CogVideoX-5B at full size on a machine that cannot hold it: weights read from disk while they are used, one step, peak memory.

    python benchmarks/from_disk_5b.py --directory /tmp/weights [--tiny] [--keep] [--output FILE.json]

Writes 11 GB of random weights in bfloat16 under the directory, and removes them at the end. Random prompt embeddings take the place of
the text encoder. What the plan predicted stands beside what the system says that the process held.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common import RESULTS, random_model, timed_call, write_result
from diffusers_cogvideox import PRESETS, AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.files import check_writable

PRESET = PRESETS["5b"]
TINY = {"num_layers": 3, "num_attention_heads": 4, "text_embed_dim": 32}
TINY_VAE = {"block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}


@torch.no_grad()
def write_weights(folder: Path, tiny: bool) -> None:
    """A pipeline folder without text encoder; never more than one block of the transformer is in memory."""
    config = PRESET.transformer | (TINY if tiny else {})
    pool = torch.randn(2**26, generator=torch.Generator().manual_seed(0)).bfloat16()  # numbers to cut weights from
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**config)
    model.save_config(folder / "transformer")
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        parts = name.split(".")
        shards.setdefault(parts[1] if parts[0] == "transformer_blocks" else "rest", []).append(name)
    index: dict[str, str] = {}
    start = 0
    for number, names in enumerate(shards.values(), start=1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            shape = model.state_dict()[name].shape
            start = (start + 7919) % (len(pool) - math.prod(shape))
            values = pool[start : start + math.prod(shape)].reshape(shape)
            scale = math.prod(shape[1:]) ** -0.5
            if len(shape) == 1:  # norms begin as the identity, biases as zeros
                values = torch.full(shape, float("norm" in name and name.endswith("weight"))).bfloat16()
            tensors[name] = values * scale
        save_file(tensors, folder / "transformer" / file)
        index |= dict.fromkeys(names, file)
    content = {"metadata": {}, "weight_map": index}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))
    random_model(AutoencoderKLCogVideoX, PRESET.vae | (TINY_VAE if tiny else {}), torch.bfloat16).save_pretrained(folder / "vae")
    CogVideoXDDIMScheduler(**PRESET.scheduler).save_pretrained(folder / "scheduler")
    library = {"vae": "AutoencoderKLCogVideoX", "transformer": "CogVideoXTransformer3DModel", "scheduler": "CogVideoXDDIMScheduler"}
    entries = {name: ["diffusers", cls] for name, cls in library.items()}
    entries |= {name: [None, None] for name in ("text_encoder", "tokenizer")}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "CogVideoXPipeline", **entries}))


def run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One call under a plan; the plan, seconds and peaks."""
    sizes = {"num_frames": options.frames, "height": options.height, "width": options.width}
    memory = {"ram": options.ram, "device": "cpu", "steps": options.steps, **sizes}
    start = time.perf_counter()
    parts = {"text_encoder": None, "tokenizer": None}
    pipe = CogVideoXPipeline.from_pretrained(folder, dtype=torch.bfloat16, memory=memory, **parts)
    loading = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    video, _ = timed_call(pipe, options, "pt")
    if video.shape != (1, options.frames, 3, options.height, options.width) or not torch.isfinite(video).all():
        raise RuntimeError(f"the video is wrong: shape {tuple(video.shape)}")
    report = pipe.report()
    print(report.plan.table(), report, sep="\n\n")
    predicted = report.plan.host_peak
    measured = max(usage.host for usage in report.stages.values())
    return {
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "video": {**sizes, "steps": options.steps},
        "loading_seconds": round(loading, 3),
        "predicted_peak_bytes": predicted,
        "measured_peak_bytes": measured,
        "measured_over_predicted": round(measured / predicted, 3),
        **report.to_json(),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where the weights go, in a folder of their own")
    parser.add_argument("--ram", default="3GB", help="budget")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--keep", action="store_true", help="leave the weights where they are, and take those that are there")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)  # in a process of its own, whose memory does not count
    parser.add_argument("--output", type=Path, default=RESULTS / "from_disk_5b.json")
    return parser.parse_args()


def main() -> None:
    """Write weights, measure, write the result, remove the weights."""
    options = parse()
    folder = options.directory / "cogvideox-5b-random"
    if options.write:
        write_weights(folder, options.tiny)
        return
    check_writable(options.output)
    torch.set_num_threads(options.threads)
    if not (options.keep and folder.is_dir()):
        folder.mkdir(parents=True)
    try:
        if not (folder / "model_index.json").is_file():
            for part in ("transformer", "vae", "scheduler"):
                (folder / part).mkdir()
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--write"], check=True)
        what = "CogVideoX-5B architecture" + (", tiny widths" if options.tiny else "") + ", random weights, bfloat16, guidance on"
        write_result(options.output, {"what": what, **run(folder, options)})
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
