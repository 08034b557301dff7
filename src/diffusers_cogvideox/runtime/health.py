"""Numerical health: a warning before a precision that overflows, and the name of the first bad layer in place of a black video."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

__all__ = ["check_dtype", "checked", "first_bad_layer", "is_finite", "run_checked"]

logger = logging.get_logger(__name__)

_SAFE_MODE = "keep_residual_in_float32"  # method of our transformer


def check_dtype(name: str, recommended: str, dtype: torch.dtype) -> None:
    """Warn, once per model, about float16 for weights that were trained in bfloat16: their activations pass float16's 65504.

    Args:
        name: the release, a key of `PRESETS`.
        recommended: its `Preset.dtype`.
        dtype: what it is about to run in.
    """
    if dtype == torch.float16 and recommended == "bfloat16":
        _warn_about_float16(name)


@functools.cache
def _warn_about_float16(name: str) -> None:
    logger.warning(
        f"CogVideoX {name} was trained in bfloat16, and float16 may overflow in it (a black video). Load the pipeline with "
        f"dtype=torch.bfloat16 or torch.float32; where only float16 is fast, call pipe.transformer.{_SAFE_MODE}()."
    )


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite; always true on the meta device.

    One pass without temporaries (the two extremes keep NaN and infinity), and one wait for the accelerator.
    """
    return tensor.is_meta or not tensor.numel() or bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())


def run_checked(model: nn.Module, call: Callable[[], Tensor], where: str) -> Tensor:
    """`call()`, which runs `model`, and an error in place of a result that is not finite. See `checked`."""
    return checked(call(), model, call, where)


def checked(result: Tensor, model: nn.Module, call: Callable[[], object], where: str) -> Tensor:
    """`result`, a tensor of any shape that `model` made, or an error when it is not finite.

    A healthy result costs `is_finite`. For a bad one, `call` makes it again under hooks that find the layer.

    Args:
        result: what is checked.
        model: the model whose layers are searched.
        call: runs the model as for `result`.
        where: for the message, "at step 3 of 50 (timestep 940)".

    Raises:
        FloatingPointError: names the first layer that went bad, where, and what to do.
    """
    if is_finite(result):
        return result
    layer = first_bad_layer(model, call)
    raise FloatingPointError(
        f"{type(model).__name__} made NaN or infinity {where}: the first layer to go bad is {layer or 'none, when run again'}. "
        + _remedy(model, layer)
    )


@torch.no_grad()
def first_bad_layer(model: nn.Module, call: Callable[[], object]) -> str | None:
    """Name of the first, innermost module of `model` whose output is not finite while `call` runs; None when all are.

    "NAME, whose input was bad already" tells that the trouble came from outside, or from arithmetic between the layers. Compiled
    models run uncompiled here. Hooks that are there (offload, caches) stay, and see one more call.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
            if not found and not _all_finite(output):
                found.append(name if _all_finite([args, kwargs]) else f"{name}, whose input was bad already")

        return hook

    names = {name.replace("_orig_mod.", ""): module for name, module in model.named_modules() if name not in ("", "_orig_mod")}
    handles = [module.register_forward_hook(watch(name), with_kwargs=True) for name, module in names.items()]
    try:
        with torch.compiler.set_stance("force_eager"):
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _all_finite(value: object) -> bool:
    return all(is_finite(tensor) for tensor in _tensors(value) if tensor.is_floating_point())


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and mappings (diffusers' output objects are mappings)."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _remedy(model: nn.Module, layer: str | None) -> str:
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if layer and not _all_finite(list(model.get_submodule(layer.partition(",")[0]).parameters())):
        return "Its weights are not finite: load them again, from a sound file."
    if torch.float16 not in dtypes:
        return "Look for damaged weights, an adapter with too large a scale, or inputs far outside the usual range."
    safe = f", or call {_SAFE_MODE}() on it" if hasattr(model, _SAFE_MODE) else ""
    return f"float16 ends at 65504: load the pipeline with dtype=torch.bfloat16 or torch.float32{safe}."
