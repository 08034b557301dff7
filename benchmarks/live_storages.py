"""How much memory is alive at once, on any device, the meta device included: storages counted from their first use to their end.

What is counted are the results of operations as Python sees them. Workspaces inside an operation, and what an allocator holds in reserve,
are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_cogvideox.models.host_cache import HostConvCache

__all__ = ["LiveStorages", "fused_attention", "live_peak"]

aten = torch.ops.aten
# On the meta device many operations are written in Python and take milliseconds; of those that run most, the results are known without.
_WRITES = {aten.copy_, aten.add, aten.add_, aten.mul_, aten.silu_, aten.fill_, aten.zero_, aten.mm, aten.addmm, aten.addcmul}
_POINTWISE = {aten.pow, aten.reciprocal, aten.square}


def _meta_result(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation on the meta device, or None where it has to be run."""
    packet = func.overloadpacket
    if packet in _WRITES and func._schema.is_mutable:
        target = kwargs.get("out", args[0])
        return target if target.is_meta else None
    if not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
        return None
    if packet is aten.native_group_norm:
        of_groups = args[0].new_empty(args[3], args[6], dtype=torch.float32)
        return torch.empty_like(args[0]), of_groups, torch.empty_like(of_groups)
    return torch.empty_like(args[0]) if packet in _POINTWISE else None


class LiveStorages(TorchDispatchMode):
    """While entered, counts the bytes of the storages that operations make: `now` alive, and `peak` at most at once.

    A storage counts once, however many tensors view it, and until the last of them is gone. What existed before does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._ignores = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation; its inputs existed before it, whatever else comes out is new."""
        kwargs = kwargs or {}
        out = _meta_result(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        results = [out] if isinstance(out, Tensor) else tree_leaves(out)
        for tensor in results:
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made inside stands for memory of another device and does not count."""
        self._ignores = True
        try:
            yield
        finally:
            self._ignores = False

    def ignore(self, tree: Any) -> None:
        """Tensors that existed before: writing to them makes nothing new."""
        with self.elsewhere():
            self.count(tree)

    def count(self, tree: Any) -> None:
        """Tensors that existed before, and count from now on."""
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._see(leaf)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = 0 if self._ignores else storage.nbytes()

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _fused(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """What a fused kernel leaves: the result (B, heads, S, d) in the layout (B, S, heads, d), and beside it the log-sums of the scores."""
    batch, heads, length, width = query.shape
    sums = query.new_empty(batch, heads, length, dtype=torch.float32)
    result = query.new_empty(batch, length, heads, width)
    del sums
    return result.transpose(1, 2)


@contextmanager
def fused_attention() -> Iterator[None]:
    """On the meta device, where attention is written out in plain operations, let it take what a fused kernel takes."""
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", _fused):
        yield


def live_peak(call: Callable[..., Any], *inputs: Tensor, model: nn.Module | None = None) -> int:
    """Most bytes alive at once in `call(*inputs)` without gradients, beside the inputs and the parameters of `model`.

    Caches that a VAE keeps in host memory count nowhere, but for the parts on the device.
    """
    live = LiveStorages()
    live.ignore(list(inputs) + ([] if model is None else [*model.parameters(), *model.buffers()]))
    keep = HostConvCache.keep

    def keep_elsewhere(cache: HostConvCache, conv: nn.Module, frames: Tensor) -> None:
        """As the method, in a store that is no memory of the host: nothing can be copied from the meta device."""
        store = cache.stored.get(conv)
        if store is None or store.shape != frames.shape:
            with live.elsewhere():
                cache.stored[conv] = torch.empty_like(frames)
        keep(cache, conv, frames)

    with patch.object(HostConvCache, "keep", keep_elsewhere), torch.no_grad(), live:
        call(*inputs)
    return live.peak
