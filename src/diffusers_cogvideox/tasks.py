"""Which task a transformer was made for, told from its config: how many channels it reads, and what goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .presets import match_preset

__all__ = ["Task", "check_task", "tasks_of"]

Task = Literal["text", "image", "control", "inpaint"]
"""What a transformer reads beside the noisy latents: nothing, an image, a control video, or a mask with a masked video."""

PIPELINES: dict[Task, str] = {
    "text": "CogVideoXPipeline or CogVideoXVideoToVideoPipeline",
    "image": "CogVideoXImageToVideoPipeline",
    "control": "CogVideoXFunControlPipeline",
    "inpaint": "CogVideoXFunInpaintPipeline",
}
"""The pipelines that sample from a transformer of each task."""

_NAMES: dict[Task, str] = {"text": "text-to-video", "image": "image-to-video", "control": "control", "inpaint": "inpainting"}


def tasks_of(config: Mapping[str, Any], pipeline: str | None = None) -> frozenset[Task]:
    """The tasks that a transformer with this config.json can have; empty for a number of channels that fits none.

    With C output channels a model reads C (text), 2C (image, control) or 2C + 1 channels (inpaint). Of the two with 2C, image
    models are known by learned positions (CogVideoX-5B-I2V) or by `ofs_embed_dim` (1.5), control models by their preset.
    Other configs with 2C channels may be either, unless the `pipeline` that their folder names (its model_index.json) settles it.

    >>> sorted(tasks_of({"in_channels": 16, "out_channels": 16}))
    ['text']
    """
    channels = config["in_channels"]
    latents = config.get("out_channels") or channels
    if channels == latents:
        return frozenset({"text"})
    if channels == 2 * latents + 1:
        return frozenset({"inpaint"})
    if channels != 2 * latents:
        return frozenset()
    if config.get("use_learned_positional_embeddings") or config.get("ofs_embed_dim"):
        return frozenset({"image"})
    preset = match_preset(config)
    if preset is not None and preset.pipeline == PIPELINES["control"]:
        return frozenset({"control"})
    either: frozenset[Task] = frozenset({"image", "control"})
    return frozenset(task for task in either if PIPELINES[task] == pipeline) or either


def check_task(config: Mapping[str, Any], wanted: Task) -> None:
    """Raise ValueError, naming the pipeline to use, when a transformer with this config was not made for the `wanted` task."""
    tasks = tasks_of(config)
    if wanted in tasks:
        return
    channels = config["in_channels"]
    extra = channels - (config.get("out_channels") or channels)
    remedy = " or ".join(PIPELINES[task] for task in sorted(tasks)) or "the pipeline of its task"
    raise ValueError(
        f"This transformer reads {channels} channels, {extra or 'none'} more than the latents of a video have: it is not "
        f"{'an' if wanted in ('image', 'inpaint') else 'a'} {_NAMES[wanted]} model. Use {remedy}."
    )
