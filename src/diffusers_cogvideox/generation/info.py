"""The verb `info`: what a checkpoint is, read from its configs and the headers of its weight files, or what a LoRA file is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from math import prod
from typing import Any

from huggingface_hub import HfApi, parse_safetensors_file_metadata

from ..options import InfoOptions
from ..pipelines.folder import StoredTensor, read_header
from .lora_info import describe_lora, is_lora_place, lora_as_text
from .model_folder import ModelFolder, is_main_variant, weight_files

__all__ = ["describe", "info"]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "F8_E4M3": "float8_e4m3fn"}
_LISTED = 4  # legal frame counts that are named, around the native one
_SCHEDULER = ("prediction_type", "timestep_spacing", "rescale_betas_zero_snr", "snr_shift_scale", "num_train_timesteps")


def info(options: InfoOptions) -> str:
    """What `cogvideox info` prints. Raises OSError for a model that is not there or not whole, ValueError for a file without a LoRA."""
    is_lora = is_lora_place(options.model)
    facts = describe_lora(options.model) if is_lora else describe(options.model)
    if options.json:
        return json.dumps(facts, indent=2)
    return lora_as_text(facts) if is_lora else _as_text(facts)


def describe(model: str) -> dict[str, Any]:
    """All facts about a pipeline folder, a component folder, a hub repository or a shipped model.

    Keys: model, variant (None when it is not a released architecture), pipeline, components (class, parameters and dtypes of
    each), and as far as the configs tell: geometry, recommended, scheduler. Raises OSError for a model that is not there or not whole.
    """
    folder = ModelFolder.open(model)
    facts: dict[str, Any] = {
        "model": str(folder.path) if folder.revision is None else f"{model} at {folder.revision}",
        "variant": folder.preset.name if folder.preset else None,
        "pipeline": folder.pipeline,
        "components": {name: found for name in folder.configs if (found := _component(folder, model, name))},
    }
    if {"transformer", "vae"} & set(folder.configs):
        geometry = folder.geometry
        facts["geometry"] = {"size_multiple": geometry.pixel_multiple, "frame_step": geometry.frame_step, **asdict(geometry)}
    if "transformer" in folder.configs:
        facts["recommended"] = asdict(folder.recommended)
        facts["legal_frames"] = _legal_frames(folder)
    if "scheduler" in folder.configs:
        config = folder.configs["scheduler"]
        facts["scheduler"] = {"class": config.get("_class_name"), **{key: config.get(key) for key in _SCHEDULER}}
    return facts


def _legal_frames(folder: ModelFolder) -> list[int]:
    """Some legal frame counts: a still image, the shortest, and those around the native one."""
    step, native = folder.geometry.frame_step, folder.recommended.num_frames
    counts = range(1, native + 2 * step, step)
    return sorted({*counts[:2], *counts[-_LISTED:]})


def _component(folder: ModelFolder, model: str, name: str) -> dict[str, Any] | None:
    """Class, parameters and dtypes of one component; None for one without weights."""
    if folder.revision:
        tensors = list(_stored_on_hub(model, folder.revision, name))
    else:
        tensors = [tensor for file in weight_files(folder.folder(name)) for tensor in read_header(file)]
    if not tensors:
        return None
    config = folder.configs[name]
    return {
        "class": config.get("_class_name") or config.get("architectures", [None])[0],
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "tensors": len(tensors),
        "dtypes": sorted({_DTYPES.get(tensor.dtype, tensor.dtype) for tensor in tensors}),
    }


def _stored_on_hub(repository: str, revision: str, name: str) -> Iterator[StoredTensor]:
    """All tensors of a component in a repository; only the headers of its files are fetched."""
    for file in HfApi().list_repo_files(repository, revision=revision):
        if file.startswith(f"{name}/") and is_main_variant(file.rpartition("/")[2]):
            for key, tensor in parse_safetensors_file_metadata(repository, file, revision=revision).tensors.items():
                yield StoredTensor(key, tensor.dtype, tuple(tensor.shape))


# --- as text ------------------------------------------------------------------------------------------------------------


def _as_text(facts: Mapping[str, Any]) -> str:
    """The facts in two aligned columns, the components below."""
    rows = [("model", facts["model"]), ("variant", facts["variant"] or "not one of the released architectures"), *_sampling_rows(facts)]
    lines = [f"{title:<13}{text}" for title, text in rows]
    lines += ["", f"{'component':<13}{'parameters':>15}  {'on disk':<18}class"]
    components = facts["components"]
    for name, part in components.items():
        lines.append(f"{name:<13}{part['parameters']:>15,}  {', '.join(part['dtypes']):<18}{part['class']}")
    if len(components) > 1:
        lines.append(f"{'all':<13}{sum(part['parameters'] for part in components.values()):>15,}")
    return "\n".join(lines)


def _sampling_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, text) of everything about sizes and sampling that is known."""
    if facts["pipeline"]:
        yield "pipeline", facts["pipeline"]
    if "recommended" in facts:
        best = facts["recommended"]
        yield "native", f"{best['height']}x{best['width']} pixels (height x width), {best['num_frames']} frames at {best['fps']} fps"
    if "geometry" in facts:
        yield "legal sizes", f"multiples of {facts['geometry']['size_multiple']} pixels"
    if "recommended" in facts:
        yield "legal frames", f"{facts['geometry']['frame_step']}k+1: {', '.join(map(str, facts['legal_frames']))}, ..."
        guidance = f"guidance {best['guidance_scale']}" + (" (dynamic)" if best["use_dynamic_cfg"] else "")
        yield "recommended", f"{best['dtype']}, sampler {best['sampler']}, {best['num_inference_steps']} steps, {guidance}"
    if "scheduler" in facts:
        given = {key: value for key, value in facts["scheduler"].items() if value is not None}
        yield "scheduler", f"{given.pop('class', 'unknown')}: " + ", ".join(f"{key} {value}" for key, value in given.items())
