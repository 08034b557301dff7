"""The VAE's layers that own weights: torch's, which also lend what is derived from their weights to whoever computes with them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

__all__ = ["Conv2d", "Conv3d", "GroupNorm", "forget"]

T = TypeVar("T")


class _Lending(nn.Module):
    """A layer that is called either with its input, or with a function of the layer itself, whose result it returns.

    Whatever brings weights to where they are needed (offloading, casting between storage and arithmetic) acts when a layer is called.
    So code that computes with a layer's weights in a way of its own calls it with a function, and finds them there.
    """

    weight: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._derived: dict[Hashable, tuple[Hashable, Any]] = {}

    @overload
    def __call__(self, x: Tensor | None) -> Tensor: ...
    @overload
    def __call__(self, x: Callable[[Any], T]) -> T: ...
    def __call__(self, x: Any) -> Any:
        """The layer's output, or what the function returns."""
        return super().__call__(x)

    def forward(self, x: Any) -> Any:
        """See the class."""
        return super().forward(x) if isinstance(x, Tensor) else x(self)

    def derived(self, name: Hashable, make: Callable[[Tensor], T]) -> T:
        """`make(weight)`, kept under `name` for as long as the weight stays what and where it is."""
        weight = self.weight.detach()
        if weight.is_inference():  # does not tell when it changes
            return make(weight)
        state = (weight.data_ptr() if not weight.is_meta else None, weight._version, weight.dtype, weight.device)
        found = self._derived.get(name)
        if found is None or found[0] != state:
            with torch.no_grad():
                found = self._derived[name] = (state, make(weight))
        return found[1]

    def forget(self) -> None:
        """Release what was derived."""
        self._derived.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.forget()  # .to(), .half(), .cuda(), ...: nothing may stay behind on the device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}


class Conv2d(_Lending, nn.Conv2d):
    """`torch.nn.Conv2d`."""


class Conv3d(_Lending, nn.Conv3d):
    """`torch.nn.Conv3d`."""


class GroupNorm(_Lending, nn.GroupNorm):  # type: ignore[misc]
    """`torch.nn.GroupNorm`."""


def forget(model: nn.Module) -> None:
    """Release what was derived from weights anywhere in `model`."""
    for module in model.modules():
        if isinstance(module, _Lending):
            module.forget()
