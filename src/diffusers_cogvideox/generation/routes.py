"""Which pipeline makes a video from what a user has: the files to start from and the model decide together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from ..options import DEMO, DEMO_IMAGE
from ..pipelines.base import CogVideoXPipelineBase
from ..pipelines.continuation import CogVideoXContinuationPipeline
from ..pipelines.fun_control import CogVideoXFunControlPipeline
from ..pipelines.fun_inpaint import CogVideoXFunInpaintPipeline
from ..pipelines.image_to_video import CogVideoXImageToVideoPipeline
from ..pipelines.pipeline import CogVideoXPipeline
from ..pipelines.video_to_video import CogVideoXVideoToVideoPipeline
from ..tasks import Task, tasks_of

__all__ = ["ARGUMENTS", "PIPELINES", "ROUTES", "choose_pipeline", "takes_frames"]

Pipeline = type[CogVideoXPipelineBase]

ROUTES: dict[tuple[str, ...], dict[Task, Pipeline]] = {
    (): {"text": CogVideoXPipeline, "inpaint": CogVideoXFunInpaintPipeline},
    ("image",): {"image": CogVideoXImageToVideoPipeline, "inpaint": CogVideoXFunInpaintPipeline},
    ("last_image",): {"inpaint": CogVideoXFunInpaintPipeline},
    ("image", "last_image"): {"inpaint": CogVideoXFunInpaintPipeline},
    ("video",): {"text": CogVideoXVideoToVideoPipeline},
    ("video", "mask"): {"inpaint": CogVideoXFunInpaintPipeline},
    ("control",): {"control": CogVideoXFunControlPipeline},
    ("extend",): {"text": CogVideoXContinuationPipeline, "image": CogVideoXContinuationPipeline},
}
"""For each of `options.COMBINATIONS` of files, the pipeline by what the transformer was trained for."""

PIPELINES: dict[str, Pipeline] = {pipeline.__name__: pipeline for row in ROUTES.values() for pipeline in row.values()}
"""All pipelines of ROUTES by name."""

ARGUMENTS = {"mask": "mask_video", "control": "control_video", "extend": "video"}
"""The argument of the pipelines' `__call__` behind an option, where it has another name."""

_MODELS: dict[Task, str] = {
    "text": f"a text-to-video model (such as {DEMO} or zai-org/CogVideoX-2b)",
    "image": f"an image-to-video model (such as {DEMO_IMAGE} or zai-org/CogVideoX-5b-I2V)",
    "control": "a Fun Control model (such as alibaba-pai/CogVideoX-Fun-V1.1-5b-Control)",
    "inpaint": "a Fun InP model (such as alibaba-pai/CogVideoX-Fun-V1.1-5b-InP)",
}


def choose_pipeline(config: Mapping[str, Any], model: str, files: Sequence[str] = (), named: str | None = None) -> Pipeline:
    """The pipeline for the `files` (one of `options.COMBINATIONS`) and a transformer with this config.json.

    `named` is the pipeline that the model's folder names; it counts where the config fits two tasks.

    Raises:
        ValueError: when the model, called `model`, was not trained for that; the message names what is needed.
    """
    tasks, row = tasks_of(config, named), ROUTES[tuple(files)]
    fitting = [row[task] for task in sorted(tasks) if task in row]
    if fitting:
        return fitting[0]
    given = " with ".join(f"--{name.replace('_', '-')}" for name in files) or "A prompt alone"
    known = " or ".join(_MODELS[task].partition(" (")[0] for task in sorted(tasks)) or "a model of an unknown task"
    raise ValueError(f"{given} needs {' or '.join(_MODELS[task] for task in row)}; {model} is {known}{_remedy(tasks)}.")


def _remedy(tasks: frozenset[Task]) -> str:
    """What a model of these tasks does take."""
    sets = [files for files, row in ROUTES.items() if tasks & set(row)]
    named = [" and ".join(f"--{name.replace('_', '-')}" for name in files) or "a prompt alone" for files in sets]
    return f", which takes {', '.join(named)}" if named else ""


def takes_frames(pipeline: Pipeline) -> bool:
    """Whether a pipeline can be told the number of frames: not where that is the source video's."""
    return "num_frames" in inspect.signature(pipeline.__call__).parameters
