"""The verb `plan`: how a model fits into memory, from its configs alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ..options import DEMO, DEMO_IMAGE, parse_size
from ..pipelines.folder import INDEX, component_names, read_json
from ..pipelines.windows import context_of, in_windows
from ..presets import PRESETS, Preset
from ..runtime.memory.available import free_ram, free_vram
from ..runtime.memory.facts import T5_XXL, ModelFacts
from ..runtime.memory.plan import Plan
from ..runtime.memory.planner import make_plan
from ..runtime.memory.workload import Workload, encoded_frames
from ..units import parse_memory
from .model_folder import ModelFolder, Recommended, source_of
from .plan_options import PlanOptions
from .settings import native_dtype

__all__ = ["plan_for", "plan_memory"]


def plan_memory(options: PlanOptions) -> str:
    """What `cogvideox plan` prints. Raises as `plan_for`."""
    plan = plan_for(options)
    return json.dumps(plan.to_json(), indent=2) if options.json else plan.table()


def plan_for(options: PlanOptions) -> Plan:
    """The plan that the options ask for.

    Raises:
        OSError: for a model that is not there, or whose configs cannot be read.
        ValueError: for sizes that the model cannot make, for budgets that are too small, and for quantisations that are not possible.
    """
    facts, best = _known(options.model)
    device = options.device or ("cuda" if options.vram or torch.cuda.is_available() else "cpu")
    height, width = parse_size(options.size) if options.size else (best.height, best.width)
    frames = options.frames or best.num_frames
    facts.geometry.padded_size(height, width)
    facts.geometry.padded_frames(frames)
    work = Workload(
        height=height,
        width=width,
        num_frames=frames,
        videos=options.videos,
        guided=options.guidance,
        steps=options.steps or best.num_inference_steps,
        text_tokens=best.max_sequence_length,
        encoded_frames=encoded_frames(facts.pipeline, frames),
    )
    work = in_windows(work, context_of(options.window), facts.geometry)
    vram = parse_memory(options.vram, "--vram") if options.vram else free_vram(device) if device != "cpu" else None
    ram = parse_memory(options.ram, "--ram") if options.ram else free_ram() if device == "cpu" else None
    dtype = options.dtype or native_dtype(best.dtype, device)
    return make_plan(facts, work, device=device, vram=vram, ram=ram, dtype=dtype, quantisation=options.quantisation)


def _known(model: str) -> tuple[ModelFacts, Recommended]:
    """Facts and recommendations of a release by its name or repository, or of what a folder's configs say."""
    preset = next((row for row in PRESETS.values() if model == row.name or model in row.repo_ids), None)
    if preset is not None and not Path(model).is_dir():
        return ModelFacts.of_preset(preset), _recommended(preset)
    try:
        folder = _configs(Path(source_of(model)), model) or ModelFolder.open(model)
    except FileNotFoundError as error:
        known = f"{', '.join(PRESETS)}, {DEMO} and {DEMO_IMAGE}"
        raise FileNotFoundError(f"{str(error).rstrip('.')}. Known by name are {known}.") from error
    if "transformer" not in folder.configs:
        raise ValueError(f"{model} has no transformer: name a pipeline folder, or that of a transformer.")
    released = folder.preset or PRESETS["5b"]
    facts = ModelFacts(
        name=model,
        pipeline=folder.pipeline or released.pipeline,
        transformer=folder.configs["transformer"],
        vae=folder.configs.get("vae", released.vae),
        text_encoder=folder.configs.get("text_encoder", T5_XXL if len(folder.configs) == 1 else None),
    )
    return facts, folder.recommended


def _configs(folder: Path, name: str) -> ModelFolder | None:
    """The configs of a pipeline folder; its weights may be missing."""
    if not (folder / INDEX).is_file():
        return None
    files = {part: folder / part / "config.json" for part in component_names(folder)}
    return ModelFolder(folder, {part: read_json(file) for part, file in files.items() if file.is_file()}, name=name)


def _recommended(preset: Preset) -> Recommended:
    return ModelFolder(Path(), {"transformer": preset.transformer, "vae": preset.vae}).recommended
