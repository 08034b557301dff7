"""What tensors do not tell: from the configs beside them, from the transformer beside a VAE, or from the option `--like`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.architecture import VAE_FAMILY, family_of
from ..pipelines.folder import INDEX, component_names, read_json
from ..presets import PRESETS, Preset
from ..tasks import PIPELINES, tasks_of
from .detect import Group
from .parts import Part, transformer_part, vae_part
from .sources import Source, open_source

__all__ = ["Hints", "hints_for", "parts_of", "pipeline_class"]

Config = Mapping[str, Any]

_STRUCTURE = ("use_rotary_positional_embeddings", "use_learned_positional_embeddings", "patch_size_t")


@dataclass(frozen=True)
class Hints:
    """Configs by component, and the release that was named, if one was."""

    configs: Mapping[str, Config] = field(default_factory=dict)
    family: Preset | None = None

    @property
    def transformer(self) -> Config | None:
        """What decides about the transformer."""
        if self.family is None:
            return self.configs.get("transformer")
        return {key: self.family.transformer.get(key) for key in _STRUCTURE}


def hints_for(source: Source, like: str | None) -> Hints:
    """The configs beside the tensors, under those that `like` names: a release, a config.json, or a folder with configs.

    Raises:
        FileNotFoundError: `like` is none of these.
        OSError: a config that is no JSON object.
    """
    if like is None:
        return Hints(source.configs)
    if like in PRESETS:
        return Hints(source.configs, PRESETS[like])
    place = Path(like)
    if place.is_file():
        config = read_json(place)
        return Hints({**source.configs, "vae" if "latent_channels" in config else "transformer": config})
    if (place / "config.json").is_file() and not (place / INDEX).is_file():
        return hints_for(source, str(place / "config.json"))
    if not (place / INDEX).is_file():
        raise FileNotFoundError(
            f"--like {like} names no release ({', '.join(PRESETS)}), and there is no config.json or model folder {like}."
        )
    configs = {name: read_json(file) for name in component_names(place) if (file := place / name / "config.json").is_file()}
    return Hints({**source.configs, **configs})


def parts_of(source: Source, hints: Hints) -> tuple[dict[str, Part], list[str]]:
    """The transformer and the VAE of a source as far as it has them, and what the user should know about how they were understood."""
    parts: dict[str, Part] = {}
    notes: list[str] = []
    if group := source.groups.get("transformer"):
        parts["transformer"] = transformer_part(group, hints.transformer)
    if group := source.groups.get("vae"):
        parts["vae"] = _vae(group, source, hints, parts.get("transformer"), notes)
    return parts, notes


def _vae(group: Group, source: Source, hints: Hints, transformer: Part | None, notes: list[str]) -> Part:
    beside = transformer.config if transformer else _transformer_beside(source.path)
    part = vae_part(group, transformer=beside, like=hints.configs.get("vae"), family=hints.family)
    if beside is None and hints.family is None and "vae" not in hints.configs:
        notes.append(
            f"assumed: scaling_factor {part.config['scaling_factor']}, that of {VAE_FAMILY}. Tensors of a VAE do not tell it, and there "
            "is no transformer beside it. For CogVideoX-2B pass --like 2b; for the image-to-video model of 1.5 pass --like 1.5-5b-i2v."
        )
    return part


def _transformer_beside(path: Path) -> Config | None:
    """Config of the transformer in the folder transformer/ beside a VAE's file or folder, or beside its folder."""
    place = next((folder / "transformer" for folder in path.resolve().parents[:2] if (folder / "transformer").is_dir()), None)
    if place is None:
        return None
    source = open_source(place)
    return (
        transformer_part(source.groups["transformer"], source.configs.get("transformer")).config if "transformer" in source.groups else None
    )


def pipeline_class(part: Part, hints: Hints, named: str | None) -> str:
    """Class name of the pipeline that samples from a transformer.

    Args:
        part: the transformer.
        hints: a release that was named decides.
        named: what the folder that it comes from says.

    Raises:
        ValueError: it reads a number of channels that fits no task, or could be for several.
    """
    tasks = tasks_of(part.config)
    of_tasks = {PIPELINES[task].split(" or ")[0] for task in tasks}
    preset = family_of(part.config)
    for name in (named, hints.family and hints.family.pipeline, preset.pipeline):
        if name in of_tasks or (name == named and named is not None):
            return str(name)
    if len(of_tasks) == 1:
        return of_tasks.pop()
    if not of_tasks:
        raise ValueError(
            f"{part.source} reads {part.config['in_channels']} channels and predicts {part.config['out_channels']}, which fits no task of "
            "the family, so no pipeline can be made around it. Convert the transformer alone: --only transformer."
        )
    if part.group.layout == "sat":  # the original code has no control models
        return PIPELINES["image"]
    raise ValueError(f"{part.source} may be an image-to-video or a control model: say which with --like 5b-i2v or --like fun-5b-control.")
