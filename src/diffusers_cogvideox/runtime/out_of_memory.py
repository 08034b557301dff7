"""When memory runs out: how it is recognised, what can be freed, and a VAE that makes do with less."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from diffusers.utils.torch_utils import empty_device_cache

from ..models.vae_memory import Saving, is_out_of_memory

__all__ = ["free_unused_memory", "is_out_of_memory", "low_memory"]

_PLAIN = (bool, int, float, str, tuple, frozenset, type(None))  # what settings are; anything else is the model itself


def free_unused_memory() -> None:
    """Give memory that no tensor holds any more back to the accelerator, and to the system where the C library can."""
    gc.collect()
    empty_device_cache()
    with suppress(OSError, AttributeError, TypeError):  # TypeError: there is no library of the process itself on Windows
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def low_memory(vae: Any) -> Iterator[None]:
    """Let a VAE work with less memory, and longer, while the block runs (`enable_tiling`); its own settings come back afterwards."""
    before = {name: value for name, value in vars(vae).items() if isinstance(value, (*_PLAIN, Saving))}
    vae.enable_tiling()
    vae.saving = None  # of a plan, which has failed
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(vae, name, value)
