"""One video to make as a value: all that it depends on, its files, and the recipe from which it can be made again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..pipelines.folder import read_json
from .settings import Settings
from .sources import Sources

__all__ = ["Job", "companions", "library_versions"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video: what it depends on, and where it goes. `title` says which line of a file asked for it."""

    prompt: str
    seed: int
    settings: Settings
    sources: Sources = field(default_factory=Sources)
    output: Path
    title: str = ""

    @property
    def companions(self) -> list[Path]:
        """All files of the video: itself, the contact sheet, the recipe."""
        return companions(self.output)

    @property
    def latents(self) -> Path:
        """What the video is decoded from, when that is kept."""
        return self.output.with_suffix(".latents.safetensors")

    @property
    def preview(self) -> Path:
        """The picture of the video while it is in the making."""
        return self.output.with_suffix(".preview.png")

    @property
    def journal(self) -> Path:
        """The state of an interrupted run."""
        return self.output.with_suffix(".resume")

    def recipe(self) -> dict[str, Any]:
        """All that the video depends on, for a JSON file."""
        return {"prompt": self.prompt, "seed": self.seed, "settings": asdict(self.settings), "sources": self.sources.to_json()}

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], output: Path) -> Job:
        """The inverse of `recipe`. Raises KeyError, TypeError or ValueError for anything else."""
        settings, sources = Settings.from_json(recipe["settings"]), Sources.from_json(recipe.get("sources", {}))
        return cls(prompt=str(recipe["prompt"]), seed=int(recipe["seed"]), settings=settings, sources=sources, output=output)

    @property
    def identity(self) -> str:
        """A text that two jobs share when they make the same video."""
        return hashlib.sha256(json.dumps(self.recipe(), sort_keys=True).encode()).hexdigest()

    def is_finished(self) -> bool:
        """Whether all files of this very video are there."""
        if not all(path.is_file() for path in self.companions):
            return False
        try:
            return Job.from_recipe(read_json(self.companions[-1]), self.output) == replace(self, title="")
        except (OSError, KeyError, TypeError, ValueError):
            return False  # somebody else's file


def companions(video: Path) -> list[Path]:
    """A video file and what stands beside it: the contact sheet and the JSON file."""
    return [video, video.with_suffix(".png"), video.with_suffix(".json")]


def library_versions() -> dict[str, str]:
    """Versions of this package and of the libraries that its results depend on."""
    names = ("diffusers-cogvideox", "torch", "diffusers", "transformers")
    return {name: importlib.metadata.version(name) for name in names}
