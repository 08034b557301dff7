"""Latents on disk: what a video is decoded from, with all that its other files say; and latents that come from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files import atomic_path
from ..options import Layout
from ..pipelines.decoding import Extent

__all__ = ["SavedLatents", "identity_of", "read_latents", "with_layout"]

_FORMAT = "diffusers-cogvideox latents"


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedLatents:
    """The latents of one video, and what is needed to finish it.

    Args:
        latents: (1, f, C, h, w), multiplied by the scaling factor.
        scaling_factor: of the VAE.
        extent: how much of what they decode to is the video.
        identity: of the job (`Job.identity`).
        video: file name of the video.
        content: what the JSON file beside the video will hold besides versions: the recipe, the scheduler, seconds so far.
    """

    latents: Tensor
    scaling_factor: float
    extent: Extent
    identity: str
    video: str
    content: Mapping[str, Any]

    def save(self, path: Path) -> None:
        """Write everything to a safetensors file, whole or not at all. Raises OSError for a place that cannot be written."""
        numbers = {"scaling_factor": self.scaling_factor, **asdict(self.extent)}
        words = {"layout": "videos, frames, channels, height, width", "identity": self.identity, "video": self.video}
        metadata = {"format": _FORMAT, **words, **{name: repr(value) for name, value in numbers.items()}}
        with atomic_path(path) as partial:
            # `save_file` would make a file that nobody else may read.
            partial.write_bytes(save({"latents": self.latents.contiguous()}, metadata | {"content": json.dumps(self.content)}))


def read_latents(path: Path) -> SavedLatents | dict[str, Tensor]:
    """What a safetensors file holds: the latents that `SavedLatents.save` wrote, or tensors by name.

    Raises FileNotFoundError, and OSError for a file that is damaged or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        if metadata.get("format") != _FORMAT:
            return tensors
        return SavedLatents(
            latents=tensors["latents"],
            scaling_factor=float(metadata["scaling_factor"]),
            extent=Extent(*(int(metadata[name]) for name in ("num_frames", "height", "width"))),
            identity=metadata["identity"],
            video=Path(metadata["video"]).name,
            content=json.loads(metadata["content"]),
        )
    except (SafetensorError, KeyError, ValueError) as error:
        raise OSError(f"{path} is not a file of latents (.safetensors), or is damaged: {error}.") from error


def identity_of(path: Path) -> str | None:
    """The identity of the job whose latents a file holds; None for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("identity")
    except (SafetensorError, OSError):
        return None


def with_layout(tensors: Mapping[str, Tensor], channels: int, layout: Layout | None = None) -> tuple[Tensor, Layout]:
    """The only tensor of a file as latents (B, f, C, h, w), and the layout that it has.

    Args:
        tensors: of a file.
        channels: C, of the VAE's latents.
        layout: "pipeline" for (B, f, C, h, w), "vae" for (B, C, f, h, w); None finds the axis that is C long.

    Raises:
        ValueError: for several tensors, another number of axes, and where no axis, or each of the two, may be that of the channels.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if [len(shape) for shape in shapes.values()] != [5]:
        raise ValueError(f"one tensor of five axes is needed, but the file holds {shapes or 'none'}.")
    (tensor,), (shape,) = tensors.values(), shapes.values()
    axes: dict[Layout, int] = {"pipeline": 2, "vae": 1}
    fitting = [name for name, axis in axes.items() if shape[axis] == channels and layout in (None, name)]
    if not fitting:
        raise ValueError(f"latents of shape {shape} are not those of this model: {_rule(channels, layout)}")
    if len(fitting) > 1:
        raise ValueError(f"latents of shape {shape} may be of either layout: say --layout pipeline or --layout vae.")
    return (tensor.transpose(1, 2) if fitting[0] == "vae" else tensor), fitting[0]


def _rule(channels: int, layout: Layout | None) -> str:
    place = {"pipeline": "third", "vae": "second"}[layout] if layout else "third or second"
    return f"its {channels} channels must be the {place} axis."
