"""diffusers' attention backends on our transformer: each takes effect, on this model only, or is refused by its name."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import Tensor

__all__ = ["BackendMixin", "check_backend"]

_TRIED = 48  # tokens of the attention that a backend is tried on
_TOLERANCE = 0.05  # of the largest value: what 8-bit kernels need; a kernel that ignores a mask or a head is off by more


class BackendMixin:
    """A model whose attention processors go through diffusers' dispatcher."""

    attn_processors: dict[str, Any]

    def set_attention_backend(self, backend: str) -> None:
        """Compute attention with one of diffusers' backends ("native", "flash", "sage", "flex", "xformers", ...), in this model only.

        Whether the kernel serves this model's heads, dtype, device and mask is tried at the first call, on a small input.

        Raises:
            ValueError: for an unknown name, and for processors that cannot choose.
            RuntimeError: for a backend whose package is missing or too old.
        """
        names = [name.value for name in AttentionBackendName]
        if backend.lower() not in names:
            raise ValueError(f"attention backend {backend!r} is unknown: use one of {', '.join(names)}.")
        chosen = AttentionBackendName(backend.lower())
        deaf = sorted({type(part).__name__ for part in self.attn_processors.values() if not hasattr(part, "_attention_backend")})
        if deaf:
            raise ValueError(f"{', '.join(deaf)} does not ask for a backend: set_attn_processor(CogVideoXAttnProcessor()) first.")
        _check_attention_backend_requirements(chosen)
        _maybe_download_kernel_for_backend(chosen)
        for processor in self.attn_processors.values():
            processor._attention_backend = chosen

    def reset_attention_backend(self) -> None:
        """Back to diffusers' default, or the one of an `attention_backend` context."""
        for processor in self.attn_processors.values():
            if hasattr(processor, "_attention_backend"):
                processor._attention_backend = None

    def _check_attention_backend(self, tokens: Tensor, head_dim: int, masked: bool) -> None:
        """Try the backend on what the linear layers make of tokens (B, S, D). Raises ValueError where it does not work."""
        if torch.compiler.is_compiling():
            return
        kind = tokens.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else tokens.dtype
        active, _ = _AttentionBackendRegistry.get_active_backend()
        for backend in {
            getattr(part, "_attention_backend", AttentionBackendName.NATIVE) or active for part in self.attn_processors.values()
        }:
            if backend != AttentionBackendName.NATIVE:
                check_backend(AttentionBackendName(backend), head_dim, dtype, tokens.device, masked)


@functools.cache
def check_backend(backend: AttentionBackendName, head_dim: int, dtype: torch.dtype, device: torch.device, masked: bool) -> None:
    """Raise ValueError unless a backend computes attention over heads of `head_dim` channels, with a mask for each query if `masked`.

    Tried once for each of the arguments, on a few tokens, against float32 and plain matrix products.
    """
    query, key, value = torch.randn(3, 2, _TRIED, 3, head_dim, generator=torch.Generator().manual_seed(0))  # B x S x heads x d
    mask = torch.arange(_TRIED)[:, None] + 8 > torch.arange(_TRIED) if masked else None
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * head_dim**-0.5
    weights = (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, value)
    query, key, value = (part.to(device, dtype) for part in (query, key, value))
    where = f"heads of {head_dim} channels in {dtype} on {device}" + (" with a mask" if masked else "")
    remedy = 'Choose another with set_attention_backend, such as "native".'
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what the backend has to say, it says when it is used
            shaped = None if mask is None else mask.expand(2, 1, _TRIED, _TRIED).to(device)
            found = dispatch_attention_fn(query, key, value, attn_mask=shaped, backend=backend)
    except torch.OutOfMemoryError:
        raise  # says nothing about the backend
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"attention backend {backend.value!r} cannot serve this model, {where}: {reason}. {remedy}") from error
    if not bool(((found.float().cpu() - expected).abs() <= _TOLERANCE * expected.abs().max()).all()):
        raise ValueError(f"attention backend {backend.value!r} computes something else than attention for {where}. {remedy}")
