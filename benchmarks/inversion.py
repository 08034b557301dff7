"""Is a video the same after DDIM inversion and sampling? PSNR of held-out clips after the round trip, by predictions per step.

    python benchmarks/inversion.py [--model FOLDER] [--clips 8] [--steps 20]

The clips are drawn, and encoded by the model's VAE; there is no guidance. What the VAE alone keeps is the most that can be reached.
Writes results/inversion.json and results/inversion.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, write_result
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.evaluation.shapes import held_out_prompts, reconstructed_videos, rendered_videos
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.generation.model_folder import ModelFolder
from diffusers_cogvideox.generation.settings import choose_settings, load_pipeline
from diffusers_cogvideox.options import DEMO, EvaluateOptions
from diffusers_cogvideox.video_io import contact_sheet, to_uint8, write_image

ITERATIONS = (1, 2, 3, 5, 10)
SEED = 0


def round_trip(pipe: Any, prompts: list[str], clips: Sequence[np.ndarray], steps: int, iterations: int) -> np.ndarray:
    """The clips (uint8, B of (F, H, W, 3)) after inversion and sampling, uint8 (B, F, H, W, 3)."""
    found = pipe.invert(prompts, video=np.stack(clips), num_inference_steps=steps, iterations=iterations)
    frames, height, width = clips[0].shape[:3]
    given = {"latents": found.latents, "timesteps": found.timesteps, "guidance_scale": 1.0, "output_type": "np"}
    return to_uint8(pipe(prompts, num_frames=frames, height=height, width=width, **given).frames)


def mean_psnr(videos: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> float:
    """Mean over the videos, dB."""
    return round(float(np.mean([psnr(video, original, 255) for video, original in zip(videos, originals, strict=True)])), 2)


def main() -> None:
    """Measure every number of iterations and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "inversion.json")
    given = parser.parse_args()
    check_writable(given.output)
    settings = choose_settings(EvaluateOptions("shapes", given.model, sampler="ddim"), given.model)
    pipe = load_pipeline(settings)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)

    prompts = held_out_prompts(given.clips, SEED)
    texts, clips = [prompt.text for prompt in prompts], list(rendered_videos(settings, prompts, SEED))
    rebuilt = list(reconstructed_videos(pipe, iter(clips)))
    rows: list[dict[str, Any]] = []
    shown = [clips[0], rebuilt[0]]
    for iterations in ITERATIONS:
        started = time.perf_counter()
        videos = round_trip(pipe, texts, clips, given.steps, iterations)
        seconds = round((time.perf_counter() - started) / len(clips), 2)
        row = {"iterations": iterations, "psnr": mean_psnr(videos, clips), "psnr_to_reconstruction": mean_psnr(videos, rebuilt)}
        rows.append(row | {"seconds_per_clip": seconds})
        shown.append(videos[0])
        print(rows[-1], flush=True)

    facts = {"model": ModelFolder.open(given.model).fingerprint(), "dtype": settings.dtype, "clips": given.clips, "steps": given.steps}
    write_result(given.output, {**facts, "psnr_of_reconstruction": mean_psnr(rebuilt, clips), "round_trips": rows})
    labels = ["drawn", "VAE alone", *(f"after the round trip, {n} prediction(s) per step" for n in ITERATIONS)]
    write_image(given.output.with_suffix(".png"), contact_sheet(shown, labels=labels))


if __name__ == "__main__":
    main()
