"""Can this machine run CogVideoX-2B? Full-size models with random weights in bfloat16 make a short video; time and memory by stage.

    python benchmarks/full_size_2b.py [--tiny] [--steps 2] [--output FILE.json]

Random prompt embeddings take the place of the T5-XXL text encoder, which runs before and apart from all this. Nothing is ever held in
float32: weights are made in their final precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from common import RESULTS, Stages, random_model, timed_call, write_result
from diffusers_cogvideox import PRESETS, AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.files import check_writable

PRESET = PRESETS["2b"]
TINY_TRANSFORMER = {"num_layers": 2, "num_attention_heads": 2, "text_embed_dim": 32, "time_embed_dim": 32}
TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}


def build(tiny: bool, dtype: torch.dtype) -> CogVideoXPipeline:
    """The text-to-video pipeline without text encoder, of released or tiny widths."""
    transformer = random_model(CogVideoXTransformer3DModel, PRESET.transformer | (TINY_TRANSFORMER if tiny else {}), dtype)
    vae = random_model(AutoencoderKLCogVideoX, PRESET.vae | (TINY_VAE if tiny else {}), dtype)
    scheduler = CogVideoXDDIMScheduler(**PRESET.scheduler)
    return CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)


def run(pipe: CogVideoXPipeline, options: argparse.Namespace, stages: Stages) -> list[float]:
    """Make one video; returns the seconds of each denoising step, guidance included."""
    pipe.set_progress_bar_config(disable=True)
    with stages.stage("denoise"):
        latents, seconds = timed_call(pipe, options, "latent")
    with stages.stage("decode"), torch.no_grad():
        video = pipe.decode_latents(latents)
    if video.shape != (1, 3, options.frames, options.height, options.width) or not torch.isfinite(video).all():
        raise RuntimeError(f"the video is wrong: shape {tuple(video.shape)}, finite: {bool(torch.isfinite(video).all())}")
    return [round(one, 3) for one in seconds]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--height", type=int, default=240)
    parser.add_argument("--width", type=int, default=240)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS / "full_size_2b.json")
    return parser.parse_args()


def main() -> None:
    """Measure and write the result."""
    options, stages = parse(), Stages()
    check_writable(options.output)
    with stages.stage("build"):
        pipe = build(options.tiny, torch.bfloat16)
    steps = run(pipe, options, stages)
    result = {
        "what": "CogVideoX-2B architecture" + (", tiny widths" if options.tiny else "") + ", random weights, bfloat16, guidance on",
        "parameters": {name: sum(p.numel() for p in getattr(pipe, name).parameters()) for name in ("transformer", "vae")},
        "video": {name: getattr(options, name) for name in ("frames", "height", "width", "steps")},
        "seconds": stages.seconds,
        "seconds_per_step": steps,
        "peak_gib": stages.peak_gib["decode"],
        "peak_gib_after": stages.peak_gib,
    }
    write_result(options.output, result)
    print(f"{sum(stages.seconds.values()):.0f} s, peak {result['peak_gib']} GiB: {options.output}")


if __name__ == "__main__":
    main()
