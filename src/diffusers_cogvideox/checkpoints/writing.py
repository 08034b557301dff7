"""Tensor files of any size written one tensor at a time: safetensors in shards, and pickles of PyTorch that the original code reads."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .lazy import LazyTensor

__all__ = ["parse_bytes", "write_pickle", "write_safetensors", "write_shards"]

Step = Callable[[int], Any]
"""Called with the number of bytes that were just written."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_ALIGNMENT = 64  # bytes, of tensors in both kinds of files


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "5GB", in diffusers' units of 1000.

    Raises:
        ValueError: another spelling, or less than one byte.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{text!r} is not a size: write a number with KB, MB or GB, such as 5GB.") from error
    if size < 1:
        raise ValueError(f"{text!r} is not possible as a size: it must be positive.")
    return size


def _bytes(tensor: LazyTensor) -> memoryview:
    """The values in row-major order; made here, and free again when the caller lets go of them."""
    values = tensor.make().detach().contiguous()
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


# --- safetensors --------------------------------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], step: Step = lambda _: None) -> None:
    """Write a safetensors file: the length of a JSON header, the header, and the values one after another.

    Args:
        path: the file.
        tensors: by name, any shapes.
        metadata: strings of the header.
        step: called after each tensor.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # as the library does, for aligned values
    end = 0
    for name, tensor in ordered:
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            stream.write(_bytes(tensor))
            step(tensor.nbytes)


def write_shards(folder: Path, stem: str, tensors: Mapping[str, LazyTensor], max_bytes: int, step: Step = lambda _: None) -> list[Path]:
    """Write a model's weights as diffusers names them: one file, or numbered shards of at most `max_bytes` and an index.

    Args:
        folder: exists already.
        stem: beginning of the file names, such as "diffusion_pytorch_model".
        tensors: by name, any shapes. A tensor above `max_bytes` gets a shard of its own.
        max_bytes: of the values in one file.
        step: called after each tensor.

    Returns:
        the weight files.
    """
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > max_bytes:
            shards.append({})
        shards[-1][name] = tensor
    count = len(shards)
    names = [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)] if count > 1 else [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, {"format": "pt"}, step)
    if count > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": dict(sorted(where.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [folder / name for name in names]


# --- pickles of PyTorch -------------------------------------------------------------------------------------------------


class _Storage:
    """The storage of one tensor, in the place of PyTorch's own."""

    def __init__(self, key: int, tensor: LazyTensor) -> None:
        self.identity = ("storage", _STORAGES[tensor.dtype], str(key), "cpu", tensor.meta.numel())


class _Pickler(pickle.Pickler):
    """Writes lazy tensors as PyTorch writes tensors: a call that rebuilds each on a storage of its own."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: list[LazyTensor] = []

    def persistent_id(self, obj: Any) -> Any:
        """What stands for a storage: its type, its file in the archive, device and number of elements."""
        return obj.identity if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        """The call that makes a tensor when the file is loaded."""
        if not isinstance(obj, LazyTensor):
            return NotImplemented
        self.tensors.append(obj)
        storage = _Storage(len(self.tensors) - 1, obj)
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, obj.meta.stride(), False, OrderedDict())


def write_pickle(path: Path, content: Any, step: Step = lambda _: None) -> None:
    """Write what `torch.save` writes, with every lazy tensor in `content` made only when it is its turn.

    Args:
        path: the file.
        content: dictionaries, lists and plain values with lazy tensors of any shape in them.
        step: called after each tensor.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        root = path.stem
        for name, text in (
            ("data.pkl", stream.getvalue()),
            (".format_version", b"1"),
            (".storage_alignment", b"64"),
            ("byteorder", b"little"),
        ):
            _add(archive, f"{root}/{name}", text)
        for key, tensor in enumerate(pickler.tensors):
            _add(archive, f"{root}/data/{key}", _bytes(tensor))
            step(tensor.nbytes)
        _add(archive, f"{root}/version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Add a file whose content begins at a multiple of the alignment, so that it can be mapped."""
    entry = zipfile.ZipInfo(name)
    entry.file_size = len(content)
    fixed = 30 + len(name.encode()) + 4  # local header, name, head of the padding
    start = archive.start_dir + fixed + (20 if entry.file_size * 1.05 > zipfile.ZIP64_LIMIT else 0)
    padding = -start % _ALIGNMENT
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(entry, "w") as target:
        target.write(content)
