"""Weights of fewer bits: one table of the ways that work, what each costs, and what each needs.

Only the linear layers of the blocks are quantised: attention and feed-forward. Modulation layers hold a seventh of the parameters, but act
on all tokens alike, and a pipeline's loop does not use them (`release_modulation`); the layers before and behind the blocks are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from diffusers import BitsAndBytesConfig, TorchAoConfig
from torch import nn

__all__ = [
    "BFLOAT16_ERROR",
    "KEPT",
    "QUANTISATIONS",
    "Quantisation",
    "check_planned",
    "check_possible",
    "check_quantisation",
    "load_quantised",
    "quantisation_config",
    "quantisation_of",
    "quantise",
    "quantised_layers",
]

KEPT = ("patch_embed", "time_embedding", "ofs_embedding", "norm1", "norm2", "norm_q", "norm_k", "norm_final", "norm_out", "proj_out")
"""Names of the transformer's parts that keep their precision."""

BFLOAT16_ERROR = 0.00834
"""As `Quantisation.error`, of bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """One way of storing weights.

    Args:
        bits: per weight.
        row_bytes: of scales and zero points for each row (output channel) of a matrix.
        block_bits: of scales per weight, where blocks of weights have their own.
        package: what has to be installed, None for nothing.
        devices: kinds of devices that it runs on.
        capability: smallest CUDA compute capability.
        compiled: whether it is slower than bfloat16 until the blocks are compiled.
        float32_copies: of a layer's weights that are alive at once while it works, beside those in the dtype of the arithmetic.
        error: relative rms error of the shipped model's velocity against float32, where that in bfloat16 is BFLOAT16_ERROR
            (benchmarks/results/quantisation.json); None where it has not been measured.
        about: what is done with weights and activations.
        torchao: name of torchao's config, for the ways that are torchao's.
    """

    bits: int
    row_bytes: int = 0
    block_bits: float = 0.0
    package: str | None = None
    devices: tuple[str, ...] = ("cuda",)
    capability: tuple[int, int] = (0, 0)
    compiled: bool = False
    float32_copies: int = 0
    error: float | None = None
    about: str
    torchao: str | None = None

    def bytes_per_parameter(self, columns: int = 3072) -> float:
        """Bytes per weight of a quantised matrix with so many columns (the width D), scales included."""
        return self.stored_bytes(columns, 1) / columns

    def stored_bytes(self, weights: int, rows: int) -> float:
        """Bytes of so many weights in matrices of so many rows in all, scales included."""
        return weights * (self.bits + self.block_bits) / 8 + rows * self.row_bytes

    @property
    def while_loading(self) -> bool:
        """Whether it is made only while a model is loaded, and on the device."""
        return self.package == "bitsandbytes"

    @property
    def takes_adapters(self) -> bool:
        """Whether LoRAs are loaded after it; otherwise before it."""
        return self.package is not None

    def in_words(self) -> str:
        """What it does, and its error."""
        measured = "not measured" if self.error is None else f"{100 * self.error:.2g} %, and {100 * BFLOAT16_ERROR:.2g} % in bfloat16"
        return f"{self.about}. Lossy: relative error of the shipped model's velocity {measured}; larger models have other errors"


QUANTISATIONS: Mapping[str, Quantisation] = MappingProxyType(
    {
        "int8": Quantisation(
            bits=8,
            row_bytes=5,
            package="torchao",
            devices=("cuda", "xpu", "cpu"),
            error=0.01013,
            about="weights in int8 with a scale per row; arithmetic in bfloat16",
            torchao="Int8WeightOnlyConfig",
        ),
        "int8-dynamic": Quantisation(
            bits=8,
            row_bytes=5,
            package="torchao",
            devices=("cuda", "cpu"),
            compiled=True,
            error=0.01148,
            about="weights in int8 with a scale per row, activations in int8 with a scale per token; arithmetic in int8",
            torchao="Int8DynamicActivationInt8WeightConfig",
        ),
        "fp8": Quantisation(
            bits=8,
            row_bytes=4,
            package="torchao",
            devices=("cuda", "xpu", "cpu"),
            float32_copies=2,
            error=0.01994,
            about="weights in float8 (e4m3) with a scale per row; arithmetic in bfloat16",
            torchao="Float8WeightOnlyConfig",
        ),
        "fp8-dynamic": Quantisation(
            bits=8,
            row_bytes=4,
            package="torchao",
            capability=(8, 9),
            compiled=True,
            about="weights and activations in float8 (e4m3) with scales; arithmetic in float8",
            torchao="Float8DynamicActivationFloat8WeightConfig",
        ),
        "nf4": Quantisation(
            bits=4,
            block_bits=8 / 64 + 32 / (64 * 256),
            package="bitsandbytes",
            error=0.07494,
            about="weights in 4-bit NormalFloat with a scale for 64, itself in 8 bits (QLoRA, arXiv 2305.14314); arithmetic in bfloat16",
        ),
        "fp8-cast": Quantisation(
            bits=8,
            devices=("cuda", "xpu", "mps", "cpu"),
            error=0.02049,
            about="weights stored as float8 (e4m3) without scales and cast when used: diffusers' layerwise casting",
        ),
    }
)
"""The ways by name. GGUF files keep their own: `CogVideoXTransformer3DModel.from_single_file(..., quantization_config=...)`."""

_MARK = "_cogvideox_quantisation"  # attribute of models that have been quantised here

_REFUSED = {
    "int4": "CogVideoX-5B with torchao's int4 weights took 1068 s for a video on an A100, 212 s in bfloat16 (diffusers-torchao): use 'nf4'",
    "quanto": "diffusers has deprecated it: use 'int8' or 'fp8'",
}


def check_quantisation(name: str, device: torch.device | str) -> Quantisation:
    """The way of that name, if it can be used here.

    Raises:
        ValueError: it is unknown, known to be slow or broken, or not for this device; the message says why, and what to take instead.
        ImportError: its package is not installed.
    """
    way, device = _offered(name, torch.device(device)), torch.device(device)
    if device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device) < way.capability:
        raise ValueError(
            f"quantisation {name!r} needs compute capability {'.'.join(map(str, way.capability))}, and this device has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}: use 'int8' or 'fp8'."
        )
    if way.package and find_spec(way.package) is None:
        raise ImportError(f"quantisation {name!r} needs {way.package}: pip install 'diffusers-cogvideox[quant]'.")
    return way


def check_planned(name: str, device: torch.device | str) -> Quantisation:
    """The way of that name, if memory plans for this kind of device know it; nothing has to be installed.

    Raises:
        ValueError: as `check_quantisation`; for ways that are slow until the blocks are compiled, which a plan does not do.
    """
    way = _offered(name, torch.device(device))
    if way.compiled:
        raise ValueError(
            f"quantisation {name!r} is slower than bfloat16 until the blocks are compiled, which a memory plan does not do: use 'int8' or "
            "'fp8'; or leave plans out, load_quantised(...) and compile_repeated_blocks()."
        )
    return way


def check_possible(model: Any, name: str, device: torch.device | str) -> None:
    """Raise as `quantise` would, but for hooks, which are told of there; nothing for a model that is quantised in this way already."""
    way, found = check_quantisation(name, device), quantisation_of(model)
    if found not in (None, name):
        raise ValueError(f"the transformer is quantised as {found!r} already: load it anew for {name!r}, or ask for {found!r}.")
    if found is not None:
        return
    if way.while_loading:
        raise ValueError(f"quantisation {name!r} is made while a model is loaded: use load_quantised(...).")
    adapter = next((parameter for parameter, _ in model.named_parameters() if ".lora_" in parameter), None)
    if adapter and way.takes_adapters:
        raise ValueError(f"the model has adapters ({adapter}): fuse or unload them, quantise ({name!r}), and load others after it.")


def _offered(name: str, device: torch.device) -> Quantisation:
    """The way of that name. Raises ValueError where it is unknown, known to be slow or broken, or not for this kind of device."""
    if name in _REFUSED:
        raise ValueError(f"quantisation {name!r} is not offered: {_REFUSED[name]}.")
    if name not in QUANTISATIONS:
        raise ValueError(f"quantisation {name!r} is unknown: use one of {', '.join(QUANTISATIONS)}.")
    way = QUANTISATIONS[name]
    if device.type not in way.devices:
        others = [other for other, candidate in QUANTISATIONS.items() if device.type in candidate.devices]
        raise ValueError(
            f"quantisation {name!r} does not run on {device.type}, only on {', '.join(way.devices)}: use {' or '.join(others)}."
        )
    return way


def quantisation_config(name: str, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Any:
    """The config of a way for `from_pretrained(..., quantization_config=...)` of the transformer, ours or diffusers'.

    Args:
        name: one of torchao's or bitsandbytes' in QUANTISATIONS.
        device: where the model will run.
        dtype: of the arithmetic.

    Raises:
        ValueError, ImportError: as `check_quantisation`, and for "fp8-cast", which has none.
    """
    way = check_quantisation(name, device)
    if way.torchao:
        return TorchAoConfig(_torchao_config(way), modules_to_not_convert=list(KEPT))
    if way.while_loading:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(KEPT),
        )
    raise ValueError(f"quantisation {name!r} has no config: load the model, and call quantise(model, {name!r}, device).")


def load_quantised(
    cls: Any, directory: str | Path, name: str, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, **kwargs: Any
) -> Any:
    """A transformer of a folder or hub repository with quantised blocks, on the host or, for bitsandbytes, on the device.

    Args:
        cls: its class.
        directory: as in `from_pretrained`.
        name: one of QUANTISATIONS.
        device: where it will run.
        dtype: of the arithmetic and of all else.
        kwargs: of `from_pretrained`, such as `subfolder`.

    Raises:
        ValueError, ImportError: as `check_quantisation`.
    """
    way = check_quantisation(name, device)
    if way.package is None:
        return quantise(cls.from_pretrained(directory, torch_dtype=dtype, **kwargs), name, device)
    model = cls.from_pretrained(directory, torch_dtype=dtype, quantization_config=quantisation_config(name, device, dtype), **kwargs)
    setattr(model, _MARK, name)
    return model


def quantise(model: Any, name: str, device: torch.device | str = "cuda") -> Any:
    """Quantise the blocks of a transformer that is loaded, in place; it stays where it is. Returns the model.

    LoRAs are fused before, or loaded after it; for "fp8-cast" loaded before it, and then they keep their precision.

    Raises:
        ValueError: as `check_quantisation`; for "nf4", which is made while loading; for a model that is quantised, has adapters, or is
            offloaded or streamed already.
        ImportError: its package is not installed.
    """
    way = check_quantisation(name, device)
    check_possible(model, name, device)
    _check_plain(model, name)
    if way.torchao:
        from torchao.quantization import quantize_

        chosen = {id(layer) for layer in quantised_layers(model)}
        quantize_(model, _torchao_config(way), filter_fn=lambda layer, _: id(layer) in chosen)
    else:
        dtype = next(layer.weight.dtype for layer in quantised_layers(model))
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype, skip_modules_pattern=(*KEPT, "lora_"))
        for method in ("add_adapter", "load_lora_adapter"):
            setattr(model, method, _refuse_adapters)
    setattr(model, _MARK, name)
    return model


def quantisation_of(model: nn.Module) -> str | None:
    """The way in which the blocks of a transformer are stored; None for those that are not quantised.

    Raises ValueError for a quantisation that is none of these, such as a GGUF file's.
    """
    if name := getattr(model, _MARK, None):
        return name
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    for name, way in QUANTISATIONS.items():
        if way.torchao and type(getattr(config, "quant_type", None)).__name__ == way.torchao:
            return name
        if way.while_loading and getattr(config, "bnb_4bit_quant_type", None) == name:
            return name
    kinds = sorted({type(layer.weight.data).__name__ for layer in quantised_layers(model) if type(layer.weight.data) is not torch.Tensor})
    if config is not None or kinds:
        raise ValueError(
            f"the blocks are quantised in a way that is not in QUANTISATIONS ({', '.join(kinds) or type(config).__name__}), and what it "
            "takes is not known: load the transformer with load_quantised(...)."
        )
    return None


def _torchao_config(way: Quantisation) -> Any:
    import torchao.quantization

    make: Callable[[], Any] = getattr(torchao.quantization, str(way.torchao))
    return make()


def quantised_layers(model: nn.Module) -> Iterator[nn.Linear]:
    """The layers of a transformer, or of one of its blocks, that are quantised, or will be."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in KEPT for part in name.split(".")):
            yield module


def _refuse_adapters(*_: Any, **__: Any) -> NoReturn:
    raise ValueError("a LoRA would take the blocks' float8 as its dtype: load it before the model is cast (quantisation 'fp8-cast').")


def _check_plain(model: Any, name: str) -> None:
    for layer_name, module in model.named_modules():
        if hasattr(module, "_hf_hook") or getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            raise ValueError(
                f"{layer_name or type(model).__name__} carries hooks (offloading, streaming, casting, a cache): quantise ({name!r}) first."
            )
    for parameter_name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor:
            raise ValueError(f"{parameter_name} is quantised already ({type(parameter.data).__name__}): load the model anew.")
