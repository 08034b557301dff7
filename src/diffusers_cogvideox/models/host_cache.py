"""The cache between chunks in the memory of the host, brought to the device just before it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .causal_conv import ConvCache

__all__ = ["HostConvCache"]


class HostConvCache(ConvCache):
    """Keeps every convolution's frames in host memory (pinned where the device is a CUDA one) between the chunks.

    Copies run beside the arithmetic, on a stream of their own: what a convolution leaves goes out while the next ones run, and while it
    runs, what the next one needs comes in; the order is that of the chunk before. Where that is smaller, most memory is in use, and it is
    fetched only when it is needed.
    """

    def __init__(self, device: torch.device, previous: ConvCache | None = None) -> None:
        super().__init__()
        self.device = device
        self.stored: dict[nn.Module, Tensor] = {}
        self.order: list[nn.Module] = []
        self.coming: dict[nn.Module, tuple[Tensor, torch.cuda.Event | None]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if isinstance(previous, HostConvCache):
            self.stored, self.order, self.stream = previous.stored, list(previous.current), previous.stream

    def take(self, conv: nn.Module) -> Tensor | None:
        """What the chunk before left, on the device; starts to fetch what comes next, if that is not smaller."""
        if conv not in self.order:
            return None
        if conv not in self.coming:
            self._fetch(conv)
        tensor, ready = self.coming.pop(conv)
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_event(ready)
        following = self.order[self.order.index(conv) + 1 :][:1]
        if following and self.stored[following[0]].nbytes >= tensor.nbytes:
            self._fetch(following[0])
        return tensor

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        """Start to copy the last frames of a chunk to the host."""
        store = self.stored.get(conv)
        if store is None or store.shape != frames.shape:
            store = self.stored[conv] = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=self.stream is not None)
        if self.stream is None:
            store.copy_(frames)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                store.copy_(frames, non_blocking=True)
            frames.record_stream(self.stream)
        self.current[conv] = store

    def advance(self) -> HostConvCache:
        """The cache to hand to the next chunk; it goes on in the same host memory."""
        return HostConvCache(self.device, self)

    def _fetch(self, conv: nn.Module) -> None:
        store = self.stored[conv]
        if self.stream is None:
            self.coming[conv] = (store.to(self.device, copy=True), None)
            return
        with torch.cuda.stream(self.stream):  # behind the copy to the host that filled the store
            tensor = store.to(self.device, non_blocking=True)
            ready = self.stream.record_event()
        tensor.record_stream(torch.cuda.current_stream(self.device))
        self.coming[conv] = (tensor, ready)
