"""A model folder as data: its configs, what it recommends for sampling, and what is in its weight files. Nothing is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..demo import demo_image_model, demo_model
from ..geometry import Geometry
from ..options import DEMO, DEMO_IMAGE
from ..pipelines.folder import INDEX, check_folder, component_names, read_json
from ..presets import PRESETS, Preset, match_preset
from .json_types import type_mistakes

__all__ = ["RECOMMENDATIONS", "ModelFolder", "Recommended", "is_main_variant", "source_of", "weight_files"]

RECOMMENDATIONS = "cogvideox.json"
"""A file in a model folder that says how to sample from it: any of the fields of `Recommended`, and a map for previews."""

_CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
_SHIPPED = {DEMO: demo_model, DEMO_IMAGE: demo_image_model}
_PREVIEW = "preview"  # key of that map
_SAMPLED = 2**20  # bytes of each weight file that enter the fingerprint


@dataclass(frozen=True, kw_only=True)
class Recommended:
    """How a model wants to be sampled. The defaults are for a model that says nothing."""

    height: int  # pixels
    width: int  # pixels
    num_frames: int
    fps: int = 8
    sampler: str = "ddim"  # "ddim" or "dpm"
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    use_dynamic_cfg: bool = False
    max_sequence_length: int = 226  # text tokens
    dtype: str = "float32"


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline folder, or the folder of one component, and the configs in it by the component's name."""

    path: Path
    configs: Mapping[str, Mapping[str, Any]]
    revision: str | None = None  # commit of a hub repository
    name: str = ""  # under which it can be opened again: that of a shipped model or a repository, or an absolute path

    @classmethod
    def open(cls, model: str | os.PathLike[str]) -> ModelFolder:
        """Read the configs of a folder, of a hub repository (only its small files are fetched), or of a shipped model.

        Raises:
            FileNotFoundError: for a folder that is not there, or holds neither a pipeline nor a component.
            OSError: for a file that is not valid JSON, or a repository that cannot be reached.
        """
        path, revision = _locate(str(model))
        title = str(path.resolve()) if Path(model).is_dir() and model not in _SHIPPED else str(model)
        config = path / "config.json"
        if config.is_file() and not (path / INDEX).is_file():
            name = next((name for name, known in _CLASSES.items() if read_json(config).get("_class_name") == known), path.name)
            return cls(path, {name: read_json(config)}, name=title)
        if revision is None:
            check_folder(path)
        elif not (path / INDEX).is_file():
            raise FileNotFoundError(
                f"the repository {model} holds no {INDEX}, so it is not a pipeline. Of a LoRA, name the file: {model}/FILE.safetensors."
            )
        files = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
        return cls(path, {name: read_json(path / name / files.get(name, "config.json")) for name in component_names(path)}, revision, title)

    def folder(self, component: str) -> Path:
        """Folder of one component."""
        return self.path if len(self.configs) == 1 else self.path / component

    @cached_property
    def pipeline(self) -> str | None:
        """Class name of the pipeline that model_index.json names."""
        index = self.path / INDEX
        return read_json(index).get("_class_name") if index.is_file() else None

    @cached_property
    def preset(self) -> Preset | None:
        """The release that this is, if it is one."""
        return match_preset(self.configs["transformer"]) if "transformer" in self.configs else None

    @cached_property
    def geometry(self) -> Geometry:
        """Size rules; a transformer or a VAE alone counts as part of a released model."""
        released = PRESETS["2b"]
        return Geometry.from_configs(self.configs.get("vae", released.vae), self.configs.get("transformer", released.transformer))

    @cached_property
    def recommended(self) -> Recommended:
        """The release's recommendations, or those of the configs; then whatever the folder's cogvideox.json says.

        Raises:
            ValueError: for an unknown key in that file, and for a value of the wrong type.
        """
        known = {field.name for field in fields(Recommended)}
        preset = self.preset
        base = Recommended(**{name: getattr(preset, name) for name in known}) if preset else self._read_from_configs()
        if unknown := sorted(set(self._own) - known - {_PREVIEW}):
            raise ValueError(f"{self.path / RECOMMENDATIONS} holds unknown keys {unknown}: known are {sorted({*known, _PREVIEW})}.")
        own = {name: value for name, value in self._own.items() if name != _PREVIEW}
        if mistakes := list(type_mistakes(Recommended, own)):
            raise ValueError(f"{self.path / RECOMMENDATIONS}: {' '.join(mistakes)}")
        return replace(base, **own)

    @property
    def preview(self) -> dict[str, Any] | None:
        """The numbers of a `preview.PreviewMap`, where the folder's cogvideox.json has them."""
        return self._own.get(_PREVIEW)

    @cached_property
    def _own(self) -> dict[str, Any]:
        file = self.path / RECOMMENDATIONS
        return read_json(file) if file.is_file() else {}

    def _read_from_configs(self) -> Recommended:
        config = self.configs["transformer"]
        height, width = self.geometry.pixel_size(config["sample_height"], config["sample_width"])
        scheduler = self.configs.get("scheduler", {}).get("_class_name", "")
        return Recommended(
            height=height,
            width=width,
            num_frames=config["sample_frames"],
            max_sequence_length=config["max_text_seq_length"],
            sampler="dpm" if "DPM" in scheduler else "ddim",
        )

    def fingerprint(self) -> str:
        """Hexadecimal digits that change with any config and, practically, with any retraining.

        A hash of all configs and of name, size and last MiB of every weight file: quick for files of any size. The commit, for a
        repository.
        """
        return self.revision or self._digest

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.configs, sort_keys=True).encode())
        for component in sorted(self.configs):
            for file in weight_files(self.folder(component)):
                digest.update(f"{file.name} {file.stat().st_size}".encode())
                with file.open("rb") as stream:
                    stream.seek(-min(_SAMPLED, file.stat().st_size), os.SEEK_END)
                    digest.update(stream.read())
        return digest.hexdigest()[:16]


def is_main_variant(name: str) -> bool:
    """Whether a file name is that of weights in their main variant, whole or a shard; "name.fp16.safetensors" is not."""
    return re.fullmatch(r"[^.]+\.safetensors", name) is not None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component in its main variant."""
    return sorted(file for file in folder.iterdir() if is_main_variant(file.name)) if folder.is_dir() else []


def source_of(model: str) -> str:
    """What `from_pretrained` takes in place of the name of a model: the folder of a shipped one, else the name itself."""
    return str(_SHIPPED[model]()) if model in _SHIPPED else model


def _locate(model: str) -> tuple[Path, str | None]:
    """The folder of a model and None; for a hub repository, the cached folder of its small files, and its commit."""
    folder = Path(source_of(model))
    if folder.is_dir():
        return folder, None
    reason = "repositories are named owner/name"
    if model.count("/") == 1:
        try:
            snapshot = Path(snapshot_download(model, allow_patterns=["*.json"]))
            return snapshot, snapshot.name
        except (OSError, HFValidationError) as error:
            reason = str(error).splitlines()[0]
    raise FileNotFoundError(f"there is no folder {model!r}, and no such repository on the hub ({reason}).")
