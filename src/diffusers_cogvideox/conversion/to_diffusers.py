"""The files of a pipeline or component folder that `from_pretrained` loads, here and in diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch

from ..checkpoints.architecture import family_of
from ..pipelines.folder import INDEX, read_json
from ..pipelines.portability import SHARED_COMPONENTS
from ..presets import Preset
from ..schedulers.scheduler import CogVideoXDDIMScheduler
from .parts import Part, model_on_meta
from .plan import Output, Weights
from .text_encoder import copy_tokenizer, encoder_config, encoder_tensors

__all__ = ["class_named_in", "component", "pipeline"]

_PACKAGE = __name__.partition(".")[0]
_STEM = "diffusion_pytorch_model"


def component(part: Part, place: str = "") -> Output:
    """A transformer or a VAE: its shards in a folder `place` of the output, and its config.json."""
    model: Any = model_on_meta(part.kind, part.config)
    return Output(weights=[Weights(place, part.tensors, stem=_STEM)], others=[lambda root: model.save_config(root / place)])


def pipeline(
    parts: Mapping[str, Part],
    text: tuple[Path, Path],
    class_name: str,
    scheduler: Mapping[str, Any] | None,
    family: Preset | None,
    dtype: torch.dtype | None,
) -> Output:
    """A whole pipeline.

    Args:
        parts: transformer and vae.
        text: folders of the text encoder and of the tokenizer.
        class_name: of the pipeline.
        scheduler: content of its config file; None is the release's.
        family: the release that was named; None is the transformer's.
        dtype: of the text encoder; None keeps its own.
    """
    output = Output()
    for name, part in parts.items():
        output += component(part, name)
    tensors = encoder_tensors(text[0], dtype)
    output.weights.append(Weights("text_encoder", tensors, stem="model"))
    output.texts["text_encoder/config.json"] = encoder_config(text[0], tensors)
    output.others.append(partial(_tokenizer, text[1]))
    scheduler = dict(scheduler) if scheduler else _scheduler(family or family_of(parts["transformer"].config))
    output.texts["scheduler/scheduler_config.json"] = _as_json(scheduler)
    output.texts[INDEX] = _as_json(_index(class_name, scheduler["_class_name"]))
    return output


def class_named_in(index: Path) -> str | None:
    """The pipeline class that a model_index.json names."""
    return read_json(index).get("_class_name")


def _tokenizer(source: Path, root: Path) -> None:
    (root / "tokenizer").mkdir()
    copy_tokenizer(source, root / "tokenizer")


def _scheduler(preset: Preset) -> dict[str, Any]:
    """The scheduler_config.json of a release."""
    config: Any = CogVideoXDDIMScheduler(**preset.scheduler)
    return json.loads(config.to_json_string())


def _index(pipeline: str, scheduler: str) -> dict[str, Any]:
    """The model_index.json of a pipeline of the family."""
    return {
        "_class_name": pipeline,
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers" if scheduler in SHARED_COMPONENTS else _PACKAGE, scheduler],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
