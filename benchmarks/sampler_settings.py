"""Which sampler settings suit a model of moving shapes: what its videos show, and the time that takes, over a grid of settings.

    python benchmarks/sampler_settings.py [--model FOLDER] [--prompts 48]

The prompts are held out from training and the same for all settings. Writes results/sampler_settings.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from diffusers_cogvideox.evaluation.shapes import evaluate_shapes
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.generation.model_folder import ModelFolder
from diffusers_cogvideox.generation.settings import choose_settings, load_pipeline
from diffusers_cogvideox.options import DEMO, EvaluateOptions

# (sampler, steps, guidance scale): steps at one guidance, then guidance at one number of steps.
GRID: list[tuple[Any, int, float]] = [
    ("ddim", 10, 4.0),
    ("ddim", 20, 4.0),
    ("ddim", 40, 4.0),
    ("ddim", 20, 2.0),
    ("ddim", 20, 6.0),
    ("dpm", 20, 4.0),
]


def main() -> None:
    """Evaluate every setting and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--output", type=Path, default=RESULTS / "sampler_settings.json")
    given = parser.parse_args()
    check_writable(given.output)
    rows, pipe = [], None
    for sampler, steps, scale in GRID:
        options = EvaluateOptions(
            "shapes", given.model, prompts=given.prompts, sampler=sampler, steps=steps, guidance_scale=scale, baselines=False
        )
        pipe = pipe or load_pipeline(choose_settings(options, given.model))
        report = evaluate_shapes(pipe, options)
        shares = {name: round(rate.share, 4) for name, rate in report.rows["generated"].rates.items()}
        rows.append({"sampler": sampler, "steps": steps, "guidance_scale": scale, "seconds_per_video": report.seconds_per_video, **shares})
        print(rows[-1], flush=True)
    write_result(given.output, {"model": ModelFolder.open(given.model).fingerprint(), "prompts": given.prompts, "settings": rows})


if __name__ == "__main__":
    main()
