"""Files of llama.cpp (GGUF), in which diffusers' transformers are passed on with quantised weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from diffusers.utils import is_gguf_available

from ..checkpoints.lazy import LazyTensor, combine

__all__ = ["read_gguf"]


def read_gguf(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file by name; quantised ones become float32 when they are needed.

    Raises:
        OSError: the package `gguf` is not installed, or the file cannot be read.
    """
    if not is_gguf_available():
        raise OSError(f"{path} is a GGUF file, for which another package is needed: pip install gguf.")
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

    def _whole(tensor: torch.Tensor) -> torch.Tensor:
        return dequantize_gguf_tensor(tensor).float()

    try:
        stored = load_gguf_checkpoint(str(path))
    except (ValueError, IndexError, KeyError) as error:
        raise OSError(f"{path} is a GGUF file that cannot be read ({str(error).splitlines()[0]}).") from error
    found = {}
    for name, tensor in stored.items():
        if hasattr(tensor, "quant_type"):
            shape = dequantize_gguf_tensor(tensor).shape
            found[name] = LazyTensor(torch.empty(shape, device="meta"), partial(_whole, tensor))
        else:
            found[name] = combine(lambda value: value.float(), [LazyTensor.of(tensor)])
    return found
