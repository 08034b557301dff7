"""Where the tensors of a model folder lie on disk, and reading one of them into memory that is there already.

Files are read, not mapped: pages of a mapping count as memory of the process for as long as it is there, and come in when they are computed
with, not before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["StoredTensor", "stored_tensors"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names of dtypes in the header of a safetensors file."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Args:
        path: the file.
        offset: of its first byte.
        shape, dtype: of the tensor.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, out: Tensor) -> None:
        """Fill `out`, a contiguous tensor of this shape on the CPU; another dtype rounds.

        Raises:
            OSError: the file is shorter than it was.
        """
        place = out if out.dtype == self.dtype else torch.empty(self.shape, dtype=self.dtype)
        view = memoryview(place.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise OSError(f"{self.path} ends too early: it has changed since it was opened. Copy or download it again.")
                view = view[count:]
        if place is not out:
            out.copy_(place)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of the safetensors files in a folder by name; files of other precisions (`*.fp16.safetensors`) are left out.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: one is corrupt.
    """
    files = sorted(path for path in folder.glob("*.safetensors") if path.name.count(".") == 1)
    if not files:
        raise FileNotFoundError(f"there is no .safetensors file in {folder}: give the folder of one model, such as MODEL/transformer.")
    return {name: tensor for path in files for name, tensor in _read_header(path).items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """A header is its length in 8 bytes and JSON; offsets in it count from its end."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        try:
            header: dict[str, Any] = json.loads(file.read(length)) if length <= size else {}
            header.pop("__metadata__", None)
            found = {name: _entry(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OSError(f"{path} is corrupt or no safetensors file ({error}). Copy or download it again.") from error
    if not found or any(stored.offset + _bytes(stored) > size for stored in found.values()):
        raise OSError(f"{path} is corrupt or was not copied completely. Copy or download it again.")
    return found


def _entry(path: Path, start: int, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    stored = StoredTensor(path, start + begin, tuple(entry["shape"]), DTYPES[entry["dtype"]])
    if end - begin != _bytes(stored):
        raise ValueError(f"a tensor of shape {stored.shape} is said to have {end - begin} bytes")
    return stored


def _bytes(stored: StoredTensor) -> int:
    return torch.Size(stored.shape).numel() * stored.dtype.itemsize
