"""Model folders that this package and diffusers share: ours is built where a folder names diffusers' class, and the reverse is saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .folder import check_complete, check_folder

__all__ = ["SHARED_COMPONENTS", "PortablePipeline", "portable"]

PACKAGE = __name__.partition(".")[0]

SHARED_COMPONENTS = frozenset({"AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"})
"""Component classes that exist under one name, with one file format, in diffusers and here."""


def portable(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a model_index.json, with shared classes under diffusers' name: `("diffusers", N)`."""
    return {key: _moved(entry, "diffusers") for key, entry in entries.items()}


class PortablePipeline(DiffusionPipeline):
    """A pipeline whose `model_index.json` always names diffusers' classes, and which builds this package's from it."""

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Read `["diffusers", N]` of a model_index.json as ours: the one hook that every way of loading passes."""
        return super().extract_init_dict({key: _moved(entry, PACKAGE) for key, entry in config_dict.items()}, **kwargs)

    def register_to_config(self, **kwargs: Any) -> None:
        """Record our components as `("diffusers", N)`, so that diffusers alone loads what is saved."""
        super().register_to_config(**portable(kwargs))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load a pipeline from a folder or a hub repository; arguments as in `DiffusionPipeline.from_pretrained`.

        Raises:
            FileNotFoundError: for a folder that is not there, holds no pipeline, or lacks a file.
            OSError: for a file that cannot be read, or weights that leave part of a model random.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            _check_is_repository(str(pretrained_model_name_or_path))
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        check_folder(folder, passed=kwargs)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name, component in pipe.components.items():
            if isinstance(component, ModelMixin) and name not in kwargs and getattr(component, "hf_quantizer", None) is None:
                check_complete(folder / name, component)
        return pipe


def _moved(entry: Any, library: str) -> Any:
    """A model_index.json entry (library, class) of a shared class, under the given `library`; others as they are."""
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[1] not in SHARED_COMPONENTS:
        return entry
    return (library, entry[1]) if str(entry[0]).partition(".")[0] in ("diffusers", PACKAGE) else entry


def _check_is_repository(name: str) -> None:
    if name.startswith((".", "~", "/")) or "\\" in name or name.count("/") != 1:
        raise FileNotFoundError(
            f"There is no folder {name!r}. Give the folder that holds model_index.json, or a hub repository as owner/name."
        )
