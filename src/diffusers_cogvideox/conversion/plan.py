"""What a conversion will write: every file's content as lazy tensors or text, its size known before anything is made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..checkpoints.lazy import LazyTensor
from ..checkpoints.writing import write_pickle, write_safetensors, write_shards

__all__ = ["Output", "Weights"]

Step = Callable[[int], Any]

_SPARE = 50 * 2**20  # bytes for headers and small files


@dataclass(frozen=True)
class Weights:
    """The weights of one component.

    Args:
        place: folder of shards, or file of a pickle or of one safetensors file, relative to the output.
        tensors: by their names in the file.
        stem: beginning of the names of shards.
        wrapper: key under which a pickle holds the tensors.
        metadata: header of a single safetensors file.
    """

    place: str
    tensors: dict[str, LazyTensor]
    stem: str | None = None
    wrapper: str | None = None
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def write(self, root: Path, max_bytes: int, step: Step) -> None:
        """Write the files below an existing folder."""
        target = root / self.place
        (target if self.stem else target.parent).mkdir(parents=True, exist_ok=True)
        if self.stem:
            write_shards(target, self.stem, self.tensors, max_bytes, step)
        elif self.wrapper:
            write_pickle(target, {self.wrapper: self.tensors}, step)
        else:
            write_safetensors(target, self.tensors, self.metadata, step)


@dataclass
class Output:
    """All files of an output folder: weights, then what is written by functions, then texts, the last of which make it look finished."""

    weights: list[Weights] = field(default_factory=list)
    others: list[Callable[[Path], Any]] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what the user should know

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(weights.nbytes for weights in self.weights)

    def __iadd__(self, other: Output) -> Output:
        """Add the files of another output."""
        self.weights += other.weights
        self.others += other.others
        self.texts |= other.texts
        self.notes += other.notes
        return self

    def check_space(self, folder: Path) -> None:
        """Raise OSError when the disk of an existing folder has less room than this needs."""
        free = shutil.disk_usage(folder).free
        if free < self.nbytes + _SPARE:
            raise OSError(
                f"the result needs {(self.nbytes + _SPARE) / 1e9:.1f} GB, but {folder} has only {free / 1e9:.1f} GB free. "
                "Choose another disk."
            )

    def write(self, root: Path, max_bytes: int) -> None:
        """Write everything below an existing, empty folder, with a progress bar on stderr."""
        with tqdm(total=self.nbytes, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
            for weights in self.weights:
                weights.write(root, max_bytes, bar.update)
        for write in self.others:
            write(root)
        for name, text in self.texts.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text, encoding="utf-8")
