"""Weights that are on the device only while their model works, without being copied back: the host keeps them all the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import CpuOffload, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

__all__ = ["Staged"]


class Staged(CpuOffload):
    """Brings a model to a device when it is called; `offload` lets the weights there go.

    A hook of accelerate, as diffusers' model offloading sets, so that all that asks for those finds it.

    Args:
        model: whose weights are on the CPU.
        device: where it works.
        before: called before the weights are brought, to make room.
    """

    def __init__(self, model: nn.Module, device: torch.device, before: Any = None) -> None:
        super().__init__(device)
        self.model, self.device, self.before = model, device, before
        self.kept: list[tuple[Tensor, Tensor]] = []
        add_hook_to_module(model, self)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Nothing is moved."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ARG002
        """Bring the weights, unless they are there."""
        if not self.kept:
            if self.before is not None:
                self.before()
            self.kept = [(tensor, tensor.data) for tensor in _tensors(self.model)]
            for tensor, value in self.kept:
                tensor.data = _brought(value, self.device)
        return args, kwargs

    def offload(self) -> None:
        """Let the tensors be those in host memory again."""
        for tensor, value in self.kept:
            tensor.data = value
        self.kept = []

    def remove(self) -> None:
        """Undo everything: the model is on the CPU, without a hook."""
        self.offload()
        remove_hook_from_module(self.model)


def _brought(value: Tensor, device: torch.device) -> Tensor:
    return value.to(device, non_blocking=True)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, shared ones once."""
    yield from {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
