"""Weights that take turns on a device: a ring of equal pieces of memory, filled ahead of the computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..models.stand_in import stand_in

__all__ = ["Ring", "Unit", "fill_and_attach"]

ALIGNMENT = 256  # bytes, what accelerators like


@torch.inference_mode(False)  # such memory could not be written to by the thread that reads, which is outside of that mode
def _memory(size: int, device: torch.device | str = "cpu", pinned: bool = False) -> Tensor:
    """Fresh memory (size,) in bytes."""
    return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=pinned)


class Unit:
    """Tensors that come and go together. While they are away, stand-ins on the device have their shapes.

    Args:
        tensors: parameters and buffers, whose `.data` is exchanged.
        read: fills one of them, given by its index, into a tensor on the CPU; None if `pack` is used.
    """

    def __init__(self, tensors: Sequence[Tensor], read: Callable[[int, Tensor], None] | None) -> None:
        self.tensors = list(tensors)
        self.read = read
        self.packed: Tensor | None = None
        self.places: list[int] = []
        self._away: list[Tensor] = []
        end = 0
        for tensor in self.tensors:
            self.places.append(end)
            end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = end

    def pack(self, pinned: bool) -> None:
        """Keep the values in one piece of the host's memory."""
        packed = _memory(self.nbytes, pinned=pinned)
        for view, tensor in zip(self.views(packed), self.tensors, strict=True):
            view.copy_(tensor.detach())
        self.packed = packed

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors in a piece of memory (bytes,)."""
        return [
            memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for place, tensor in zip(self.places, self.tensors, strict=True)
        ]

    def fill(self, memory: Tensor) -> None:
        """Bring the values into a piece of the host's memory (bytes,)."""
        if self.read is None:
            memory[: self.nbytes].copy_(self._kept())
            return
        for index, view in enumerate(self.views(memory)):
            self.read(index, view)

    def on_host(self, memory: Callable[[], Tensor]) -> Tensor:
        """The values in the host's memory, (bytes,): where they are kept, or else in `memory()`."""
        if self.read is None:
            return self._kept()
        place = memory()
        self.fill(place)
        return place[: self.nbytes]

    def attach(self, memory: Tensor) -> None:
        """Let the tensors be those in a piece of memory (bytes,)."""
        for tensor, view in zip(self.tensors, self.views(memory), strict=True):
            tensor.data = view

    def detach(self, device: torch.device) -> None:
        """Let stand-ins on the device be the tensors."""
        self._away = self._away or [stand_in(tensor, device) for tensor in self.tensors]
        for tensor, away in zip(self.tensors, self._away, strict=True):
            tensor.data = away

    def _kept(self) -> Tensor:
        assert self.packed is not None, "pack() comes first"
        return self.packed


def fill_and_attach(unit: Unit, device: torch.device) -> None:
    """Bring one unit to the device in memory of its own, now."""
    memory = _memory(unit.nbytes, device)
    if device.type == "cpu":
        unit.fill(memory)
    else:
        memory.copy_(unit.on_host(lambda: _memory(unit.nbytes)))
    unit.attach(memory)


class _Slot:
    """One piece of the device's memory: which unit is in it or on its way, and when it may be written to again."""

    def __init__(self, memory: Tensor, free: Any) -> None:
        self.memory = memory
        self.unit: int | None = None
        self.ready: Future[Any] | Any = None
        self.free = free  # event on the computing stream


class Ring:
    """Units on a device, at most `ahead + 1` at a time; while one is used the next are on their way.

    On a CUDA device copies run on a stream of their own, and nothing waits on the host but for a disk. Files are read in a thread.

    Args:
        units: in the order in which they are mostly used. All are in memory, or all are read.
        device: where they are used.
        ahead: how many are brought before they are needed.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, ahead: int) -> None:
        self.units = list(units)
        self.device = device
        self.ahead = min(ahead, len(self.units) - 1)
        self.reads = self.units[0].read is not None
        self.slots: list[_Slot] = []
        self.attached: set[int] = set()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._staging: list[tuple[Tensor, Any]] = []  # pinned memory between disk and device, with the copy that reads it
        self._thread: ThreadPoolExecutor | None = None

    def use(self, index: int) -> None:
        """Attach a unit, as soon as it is there, and send for the next ones."""
        slot = self._request(index)
        event = slot.ready.result() if isinstance(slot.ready, Future) else slot.ready
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        self.attached.add(index)
        self.units[index].attach(slot.memory)
        for following in range(index + 1, min(index + 1 + self.ahead, len(self.units))):
            self._request(following)

    def done(self, index: int) -> None:
        """Detach a unit that was used; its memory is written to once the computation that is under way has ended."""
        self.units[index].detach(self.device)
        self.attached.discard(index)
        self.slots[index % len(self.slots)].free = self._now()

    def empty(self) -> None:
        """Give all memory on the device back, also after an error in the middle of a pass."""
        for index in list(self.attached):
            self.done(index)
        for slot in self.slots:
            if isinstance(slot.ready, Future):
                slot.ready.exception()  # whatever it was for, nobody needs it any more
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        if self._thread is not None:
            self._thread.shutdown()
        self.slots, self._staging, self._thread = [], [], None

    def _now(self) -> Any:
        """An event behind all computation so far."""
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def _request(self, index: int) -> _Slot:
        """The slot of a unit, which is in it or on its way."""
        if not self.slots:
            size = max(unit.nbytes for unit in self.units)
            self.slots = [_Slot(_memory(size, self.device), self._now()) for _ in range(self.ahead + 1)]
        slot = self.slots[index % len(self.slots)]
        if slot.unit != index:
            slot.unit = index
            if self.reads:
                self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="cogvideox-weights")
                slot.ready = self._thread.submit(self._bring, slot, index)
            else:
                slot.ready = self._bring(slot, index)
        return slot

    def _bring(self, slot: _Slot, index: int) -> Any:
        """Fill a slot; returns the event that tells when it is, where that is not now."""
        unit = self.units[index]
        if self.device.type == "cpu":
            unit.fill(slot.memory)
            return None
        host = unit.on_host(lambda: self._stage(index))
        if self._stream is None:
            slot.memory[: unit.nbytes].copy_(host)
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.free)
            slot.memory[: unit.nbytes].copy_(host, non_blocking=True)
            event = self._stream.record_event()
        if self.reads:
            self._staging[index % 2] = (self._staging[index % 2][0], event)
        return event

    def _stage(self, index: int) -> Tensor:
        """One of two pieces of the host's memory, after what was in it has been copied."""
        if not self._staging:
            size, pinned = max(unit.nbytes for unit in self.units), self._stream is not None
            self._staging = [(_memory(size, pinned=pinned), None) for _ in range(2)]
        memory, event = self._staging[index % 2]
        if event is not None:
            event.synchronize()
        return memory
