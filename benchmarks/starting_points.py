"""Do videos that start from a picture or a video show both it and the prompt? Held-out scenes, shipped models.

    python benchmarks/starting_points.py [--prompts 48] [--inpaint runs/shapes/inpaint/pipeline]

"image to video" is given the first frame of a drawn clip of each scene; measured are the PSNR of the video's first frame against
it, and what the whole video shows. "video to video" is given a drawn clip of the scene in another colour, to be repainted as the prompt
says. "text to video" has the prompt alone. With --inpaint, "first frame" and "interpolation" are made by the pipeline there, which
examples/shapes/inpaint.yaml trains: given are the first frame, or the first and the last one. Writes results/starting_points.json and .png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, write_result
from diffusers_cogvideox import (
    CogVideoXFunInpaintPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from diffusers_cogvideox.data.scenes import COLORS
from diffusers_cogvideox.demo import demo_image_model, demo_model
from diffusers_cogvideox.evaluation.detectors import detect, score
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.evaluation.report import tally
from diffusers_cogvideox.evaluation.shapes import ShapesPrompt, held_out_prompts, rendered_videos
from diffusers_cogvideox.generation.settings import Settings, choose_settings
from diffusers_cogvideox.options import DEMO, EvaluateOptions
from diffusers_cogvideox.video_io import contact_sheet, to_uint8, write_image

STRENGTH = 0.8
BATCH = 8


def recoloured(prompt: ShapesPrompt) -> ShapesPrompt:
    """The same scene with its shape in another colour."""
    colors, spec = list(COLORS), prompt.scene.shapes[0]
    other = colors[(colors.index(str(spec.color)) + 3) % len(colors)]
    return replace(prompt, scene=replace(prompt.scene, shapes=(replace(spec, color=other),)))


def batches(count: int) -> Iterator[slice]:
    """Parts of `count` prompts that are made at once."""
    return (slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH))


def make(pipe: Any, prompts: Sequence[ShapesPrompt], options: dict[str, Any], **sources: np.ndarray) -> np.ndarray:
    """A video (F, H, W, 3) for every prompt and source, from seed 0, 1, ..."""
    pipe.set_progress_bar_config(disable=True)
    made = []
    for part in batches(len(prompts)):
        texts = [prompt.text for prompt in prompts[part]]
        generators = [torch.Generator().manual_seed(part.start + number) for number in range(len(texts))]
        given = {name: list(values[part]) for name, values in sources.items()}
        made.append(to_uint8(pipe(prompt=texts, generator=generators, output_type="np", **given, **options).frames))
    return np.concatenate(made)


def compare(settings: Settings, prompts: Sequence[ShapesPrompt], inpaint: str | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Figures and videos of every way to start."""
    clips = np.stack(list(rendered_videos(settings, prompts, 0)))
    others = np.stack(list(rendered_videos(settings, [recoloured(prompt) for prompt in prompts], 0)))
    text = CogVideoXPipeline.from_pretrained(demo_model(), dtype=torch.float32)
    image = CogVideoXImageToVideoPipeline.from_pretrained(demo_image_model(), dtype=torch.float32)
    video = CogVideoXVideoToVideoPipeline(**text.components)
    call = settings.call_arguments()
    repaint = {name: value for name, value in call.items() if name != "num_frames"} | {"strength": STRENGTH}
    ways: dict[str, Callable[[], np.ndarray]] = {
        "text to video": lambda: make(text, prompts, call),
        "image to video": lambda: make(image, prompts, call, image=clips[:, 0]),
        "video to video": lambda: make(video, prompts, repaint, video=others),
    }
    known: dict[str, dict[str, int]] = {"image to video": {"first_frame": 0}}  # frames that were given
    if inpaint is not None:
        fun = CogVideoXFunInpaintPipeline.from_pretrained(inpaint, dtype=torch.float32)
        known |= {"first frame": {"first_frame": 0}, "interpolation": {"first_frame": 0, "last_frame": -1}}
        ways["first frame"] = lambda: make(fun, prompts, call, image=clips[:, 0])
        ways["interpolation"] = lambda: make(fun, prompts, call, image=clips[:, 0], last_image=clips[:, -1])
    rows, videos = {}, {}
    for name, way in ways.items():
        started = time.perf_counter()
        videos[name] = way()
        rates = tally(score(detect(made), prompt.wanted) for made, prompt in zip(videos[name], prompts, strict=True))
        rows[name] = {kind: round(rate.share, 4) for kind, rate in rates.items()}
        rows[name]["seconds_per_video"] = round((time.perf_counter() - started) / len(prompts), 2)
        rows[name] |= kept(videos[name], clips, known.get(name, {}))
        print(name, rows[name], flush=True)
    return rows, videos


def kept(videos: np.ndarray, clips: np.ndarray, known: dict[str, int]) -> dict[str, float]:
    """PSNR (dB) of given frames, on average and the least."""
    found = {name: [psnr(made[at], clip[at], 255) for made, clip in zip(videos, clips, strict=True)] for name, at in known.items()}
    means = {f"{name}_psnr": round(float(np.mean(values)), 2) for name, values in found.items()}
    return means | {f"{name}_psnr_least": round(min(values), 2) for name, values in found.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--inpaint", help="pipeline of the inpainting sibling")
    parser.add_argument("--output", default=str(RESULTS / "starting_points.json"))
    options = parser.parse_args()
    prompts = held_out_prompts(options.prompts)
    settings = choose_settings(EvaluateOptions(what="shapes"), DEMO)
    rows, videos = compare(settings, prompts, options.inpaint)
    path = Path(options.output)
    write_result(path, {"prompts": options.prompts, "strength": STRENGTH, "rows": rows})
    shown = [(f"{prompt.text} | {name}", videos[name][number]) for number, prompt in enumerate(prompts[:6]) for name in videos]
    write_image(path.with_suffix(".png"), contact_sheet([clip for _, clip in shown], labels=[label for label, _ in shown]))
    print(rows["image to video"], path)


if __name__ == "__main__":
    main()
