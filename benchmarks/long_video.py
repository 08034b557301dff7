"""Do long videos have seams? Context windows against independent clips cut together, and against one pass over the whole length.

    python benchmarks/long_video.py [--model FOLDER] [--prompts 8] [--clips 4]

Each video is `--clips` times as long as the model was trained for. Its seam ratio (evaluation/seams.py; 1 = no seam) is taken at the frames
where clips would be joined, and as the worst of all frames. Writes results/long_video.json and results/long_video.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, write_result
from diffusers_cogvideox import ContextWindows
from diffusers_cogvideox.evaluation.seams import frame_changes, seam_ratios, worst_ratio
from diffusers_cogvideox.evaluation.shapes import held_out_prompts, rendered_videos
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.generation.model_folder import ModelFolder
from diffusers_cogvideox.generation.settings import choose_settings, load_pipeline
from diffusers_cogvideox.options import DEMO, EvaluateOptions
from diffusers_cogvideox.video_io import contact_sheet, to_uint8, write_image

Make = Callable[[str, int], np.ndarray]
"""(prompt, seed) -> uint8 (F, H, W, 3)."""


def ways_to_make(pipe: Any, settings: Any, clips: int) -> dict[str, Make]:
    """The ways to make a long video that are compared, by name."""
    native = settings.num_frames
    length = clips * (native - 1) + 1
    common = settings.call_arguments() | {"output_type": "np"}

    def call(prompt: str, seed: int, **options: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return to_uint8(pipe(prompt, generator=generator, **{**common, **options}).frames[0])

    def pasted(prompt: str, seed: int) -> np.ndarray:
        return np.concatenate([call(prompt, seed + 1000 * part)[part > 0 :] for part in range(clips)])

    def windowed(**options: Any) -> Make:
        return lambda prompt, seed: call(prompt, seed, num_frames=length, context=ContextWindows(frames=native, **options))

    return {
        "cut and paste": pasted,
        "one pass": lambda prompt, seed: call(prompt, seed, num_frames=length),
        "windows, static": windowed(schedule="static"),
        "windows, uniform": windowed(),
        "windows, uniform, shuffled noise": windowed(shuffle_noise=True),
    }


def measure(videos: list[np.ndarray], joins: list[int]) -> dict[str, float]:
    """Medians over the videos: seam ratio at the joins (the largest of a video), the worst of all frames, and the change per frame."""
    at_joins = [max(seam_ratios(video, joins)) for video in videos] if joins else []
    figures = {"seam_ratio": at_joins, "worst_ratio": [worst_ratio(video) for video in videos]}
    figures["change_per_frame"] = [float(frame_changes(video).mean()) for video in videos]
    return {name: round(float(np.median(values)), 3) for name, values in figures.items() if values}


def main() -> None:
    """Make the videos in every way, measure them, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS / "long_video.json")
    given = parser.parse_args()
    check_writable(given.output)
    settings = choose_settings(EvaluateOptions("shapes", given.model), given.model)
    pipe = load_pipeline(settings)
    pipe.set_progress_bar_config(disable=True)

    prompts = held_out_prompts(given.prompts)
    rows: dict[str, Any] = {"drawn clips of native length": measure(list(rendered_videos(settings, prompts, 0)), [])}
    joins = [part * (settings.num_frames - 1) + 1 for part in range(1, given.clips)]
    shown, labels = [], []
    for name, make in ways_to_make(pipe, settings, given.clips).items():
        started = time.perf_counter()
        videos = [make(prompt.text, seed) for seed, prompt in enumerate(prompts)]
        rows[name] = measure(videos, joins) | {"seconds_per_video": round((time.perf_counter() - started) / len(videos), 2)}
        shown += videos[:2]
        labels += [f"{name}: {prompt.text}" for prompt in prompts[:2]]
        print(name, rows[name], flush=True)
    facts = {"model": ModelFolder.open(given.model).fingerprint(), "prompts": given.prompts, "frames": len(shown[0]), "joins": joins}
    write_result(given.output, {**facts, "videos": rows})
    write_image(given.output.with_suffix(".png"), contact_sheet(shown, columns=16, labels=labels))


if __name__ == "__main__":
    main()
