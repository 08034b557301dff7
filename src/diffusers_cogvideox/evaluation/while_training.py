"""Evaluation of a model that is still in training: the callback that a training run is handed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..generation.assemble import assemble
from ..generation.settings import choose_settings, load_pipeline
from ..options import EvaluateOptions
from .shapes import evaluate_shapes

__all__ = ["evaluate_checkpoints"]

logger = logging.getLogger(__name__)


def evaluate_checkpoints(
    run: str | Path, *, prompts: int, vae: str, text_encoder: str, scheduler: Mapping[str, Any]
) -> Callable[[int, nn.Module], None]:
    """A callback f(step, transformer) that measures how well the transformer, as it is then, shows held-out prompts.

    It writes the pipeline as it stands to <run>/pipeline, the report to <run>/evaluations/step-<step>.json and .png, and a line with
    the rates to <run>/evaluations.jsonl.

    Args:
        run: folder of the training run.
        prompts: number of held-out prompts.
        vae, text_encoder: folders of the other parts.
        scheduler: config keys of the noise schedule where they differ from CogVideoX-5B's.
    """
    folder = Path(run)

    def evaluate(step: int, transformer: nn.Module) -> None:
        pipeline = assemble(folder / "pipeline", transformer=transformer, vae=vae, text_encoder=text_encoder, scheduler=scheduler)
        options = EvaluateOptions(what="shapes", model=str(pipeline), prompts=prompts, baselines=False)
        report = evaluate_shapes(load_pipeline(choose_settings(options, options.model)), options)
        report.save(folder / "evaluations", f"step-{step}")
        rates = {name: round(rate.share, 4) for name, rate in report.rows["generated"].rates.items()}
        with (folder / "evaluations.jsonl").open("a", encoding="utf8") as file:
            file.write(json.dumps({"step": step, "prompts": prompts} | rates) + "\n")
        logger.info("after step %d: %s", step, ", ".join(f"{name} {100 * share:.0f} %" for name, share in rates.items()))

    return evaluate
