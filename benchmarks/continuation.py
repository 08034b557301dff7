"""Does a continued video go on? Drawn clips of held-out scenes, cut in the middle and continued with their prompts.

    python benchmarks/continuation.py [--model FOLDER] [--prompts 24]

The first frames of each clip are given, the rest is made. Measured: what the whole video shows (the detectors of the evaluation), the
change at the seam in units of the clip's own median change from frame to frame, the seam ratio (evaluation/seams.py), and the distance
to the true rest. "cut and paste" puts the end of an independent text-to-video clip behind the given frames; "VAE" the true rest after the
VAE has encoded and decoded the clip, the least change that any continuation can have. Writes results/continuation.json and .png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, write_result
from diffusers_cogvideox import CogVideoXContinuationPipeline
from diffusers_cogvideox.evaluation.detectors import detect, score
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.evaluation.report import tally
from diffusers_cogvideox.evaluation.seams import frame_changes, seam_ratio
from diffusers_cogvideox.evaluation.shapes import ShapesPrompt, held_out_prompts, reconstructed_videos, rendered_videos
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.generation.model_folder import ModelFolder
from diffusers_cogvideox.generation.settings import Settings, choose_settings, load_pipeline, make_videos
from diffusers_cogvideox.options import DEMO, EvaluateOptions
from diffusers_cogvideox.video_io import contact_sheet, to_uint8, write_image

MOVING = 1.0  # of 255: clips that change less from frame to frame have no measure for a seam
BATCH = 8


def continued(pipe: Any, settings: Settings, prompts: Sequence[ShapesPrompt], clips: np.ndarray, given: int) -> np.ndarray:
    """The first `given` frames of each clip (B, F, H, W, 3) and as many new ones as it had, from seed 0, 1, ..."""
    options = settings.call_arguments() | {"num_frames": clips.shape[1] - given, "output_type": "np", "overlap_frames": given}
    made = []
    for start in range(0, len(prompts), BATCH):
        texts = [prompt.text for prompt in prompts[start : start + BATCH]]
        generators = [torch.Generator().manual_seed(start + number) for number in range(len(texts))]
        made.append(to_uint8(pipe(clips[start : start + BATCH, :given], texts, generator=generators, **options).frames))
    return np.concatenate(made)


def pasted(pipe: Any, settings: Settings, prompts: Sequence[ShapesPrompt], clips: np.ndarray, given: int) -> np.ndarray:
    """The first `given` frames of each clip, and the rest of a video that was made without knowing them."""
    made = [make_videos(pipe, [prompt.text], [seed], settings)[0] for seed, prompt in enumerate(prompts)]
    return np.concatenate([clips[:, :given], np.stack(made)[:, given:]], axis=1)


def measure(videos: np.ndarray, clips: np.ndarray, prompts: Sequence[ShapesPrompt], given: int) -> dict[str, Any]:
    """What the videos show, how they go on, and how near the rest is to that of the clips."""
    usual = np.array([np.median(frame_changes(clip)) for clip in clips])
    moving = [number for number, change in enumerate(usual) if change > MOVING]
    changes = [frame_changes(videos[number])[given - 1] / usual[number] for number in moving]
    nearness = float(np.mean([psnr(video[given:], clip[given:], 255) for video, clip in zip(videos, clips, strict=True)]))
    rates = tally(score(detect(video), prompt.wanted) for video, prompt in zip(videos, prompts, strict=True))
    return {
        "seam_over_real_change": round(float(np.median(changes)), 3),
        "seam_ratio": round(float(np.median([seam_ratio(videos[number], given) for number in moving])), 3),
        "psnr_of_the_rest": None if np.isinf(nearness) else round(nearness, 2),
        "shares": {name: round(rate.share, 4) for name, rate in rates.items()},
    }


def compare(pipe: Any, settings: Settings, prompts: Sequence[ShapesPrompt], given: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures and videos of every way to make the rest of the clips."""
    longer = CogVideoXContinuationPipeline(**pipe.components)
    for each in (pipe, longer):
        each.set_progress_bar_config(disable=True)
    clips = np.stack(list(rendered_videos(settings, prompts, 0)))

    def rebuilt() -> np.ndarray:
        videos = np.stack(list(reconstructed_videos(pipe, iter(clips))))
        return np.concatenate([clips[:, :given], videos[:, given:]], axis=1)

    ways: dict[str, Callable[[], np.ndarray]] = {
        "true clip": lambda: clips,
        "VAE": rebuilt,
        "continued": lambda: continued(longer, settings, prompts, clips, given),
        "cut and paste": lambda: pasted(pipe, settings, prompts, clips, given),
    }
    rows, videos = {}, {}
    for name, make in ways.items():
        started = time.perf_counter()
        videos[name] = make()
        seconds = round((time.perf_counter() - started) / len(prompts), 2)
        rows[name] = measure(videos[name], clips, prompts, given) | {"seconds_per_video": seconds}
        print(name, rows[name], flush=True)
    return rows, videos


def main() -> None:
    """Continue the clips, measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--output", type=Path, default=RESULTS / "continuation.json")
    options = parser.parse_args()
    check_writable(options.output)
    settings = choose_settings(EvaluateOptions("shapes", options.model), options.model)
    pipe, prompts = load_pipeline(settings), held_out_prompts(options.prompts)
    given = pipe.geometry.frame_step + 1
    rows, videos = compare(pipe, settings, prompts, given)
    facts = {"model": ModelFolder.open(options.model).fingerprint(), "prompts": len(prompts)}
    write_result(options.output, {**facts, "frames": settings.num_frames, "given_frames": given, "videos": rows})
    shown = [(name, number) for number in range(min(4, len(prompts))) for name in ("true clip", "continued", "cut and paste")]
    labels = [f"{name}, from frame {given + 1}: {prompts[number].text}" for name, number in shown]
    write_image(
        options.output.with_suffix(".png"), contact_sheet([videos[name][number] for name, number in shown], columns=9, labels=labels)
    )


if __name__ == "__main__":
    main()
