"""Models whose blocks come to the device one after the other, from the memory of the host or from the checkpoint on disk.

Why not diffusers' group offloading, which goes on to work: it looks one block ahead and lets the host wait for it, it brings the
modulation layers whether a loop needs them or not, and for a disk it writes the checkpoint once more and reads without looking ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from .ring import Ring, Unit, fill_and_attach
from .streamed_parts import Parts, check_streamable, locate, named_tensors, replace_meta, wrap_again

__all__ = ["SOURCES", "is_streamed", "load_streamed", "stop_streaming", "stream", "streamed_bytes"]

SOURCES = ("memory", "disk")
HOOK = "cogvideox_streaming"

# Around a block or layer that is compiled; inside, each block's own index would have it compiled anew.
_outside = torch.compiler.disable(reason="weights are streamed to the device between the blocks: compile without fullgraph=True")

# Methods of a model that would act on stand-ins.
_REFUSED = (
    "_apply",
    "enable_group_offload",
    "enable_layerwise_casting",
    "fuse_lora",
    "fuse_qkv_projections",
    "save_pretrained",
    "unfuse_qkv_projections",
)


def stream(model: Any, device: torch.device | str, *, source: str = "memory", directory: str | Path | None = None, ahead: int = 1) -> None:
    """Let a model run on a device that holds only `ahead + 1` of its blocks at a time; what is not in a block goes there for good.

    Modulation layers, which a pipeline's loop does not use, and embeddings of text come alone when they are called. Results stay the
    same. For inference only. LoRA adapters may be loaded before or meanwhile; they are on the device as a whole.

    Args:
        model: a transformer, ours or diffusers', or a text encoder.
        device: where it runs.
        source: "memory" keeps the blocks in the memory of the host (pinned for CUDA, for which PyTorch rounds each up to a power of
            two). "disk" reads them in every pass, for an accelerator through two blocks of the host's memory.
        directory: for "disk", the folder of this model's safetensors files. Another dtype than the model's is converted in every pass.
        ahead: blocks that are brought before they are needed.

    Raises:
        ValueError: for what cannot be streamed; the message says why.
        FileNotFoundError, OSError: for a folder without safetensors files, or with corrupt ones.
    """
    device = _resolved(device)
    _check_request(device, source, directory, ahead)
    check_streamable(model, source)
    stored = {} if directory is None else locate(model, Path(directory))
    if directory is None and any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError("a model on the meta device has no weights in memory: use source='disk' and give its directory.")
    unread = replace_meta(model, device)
    wrap_again(model, device, move=True)
    parts, files = Parts.of(model), {id(tensor): stored[name] for name, tensor in named_tensors(model) if name in stored}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)

    def unit(tensors: list[Tensor]) -> Unit:
        made = Unit(tensors, (lambda index, out: files[id(tensors[index])].read(out)) if files else None)
        if not files:
            made.pack(pinned=device.type == "cuda")
        made.detach(device)
        return made

    units = [unit(tensors) for tensors in parts.block_tensors]
    streaming = _Streaming(model, Ring(units, device, ahead), [unit(tensors) for _, tensors in parts.lent], parts.resident, flags, [])
    for tensor in parts.resident:
        value = torch.empty(tensor.shape, dtype=tensor.dtype) if id(tensor) in unread else tensor.data
        if id(tensor) in unread:
            files[id(tensor)].read(value)
        tensor.data = value.to(device)
    streaming.install(parts)


def stop_streaming(model: Any) -> None:
    """End `stream`: the whole model is in the memory of the host (with source="disk" it is read from there), and can be moved and trained.

    Raises:
        ValueError: the model is not streamed, or a feature cache is on, whose hooks must be removed first.
    """
    if not is_streamed(model):
        raise ValueError(f"this {type(model).__name__} is not streamed.")
    if getattr(model, "is_cache_enabled", False):
        raise ValueError("a feature cache is on: call disable_cache() before stop_streaming(), and enable_cache() again after it.")
    model._cogvideox_streaming.remove()


def is_streamed(model: Any) -> bool:
    """Whether `stream` acts on a model."""
    return "_cogvideox_streaming" in vars(model)


def load_streamed(cls: Any, directory: str | Path, device: torch.device | str, *, dtype: torch.dtype | None = None, ahead: int = 1) -> Any:
    """A model of a folder that is streamed from there without ever being in memory as a whole.

    Args:
        cls: its class: `CogVideoXTransformer3DModel`, or transformers' `T5EncoderModel`.
        directory: with config.json and safetensors files.
        device: where it runs.
        dtype: by default that of the files; another one is converted to in every pass.
        ahead: as in `stream`.

    Raises:
        ValueError, FileNotFoundError, OSError: as `stream`.
    """
    if not (Path(directory) / "config.json").is_file():
        raise FileNotFoundError(f"there is no config.json in {directory}: give the folder of one model, such as MODEL/transformer.")
    with torch.device("meta"):
        config = cls.load_config(directory) if hasattr(cls, "load_config") else cls.config_class.from_pretrained(directory)
        model = cls.from_config(config) if hasattr(cls, "load_config") else cls(config)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
    stored = locate(model, Path(directory))
    dtype = dtype or next(tensor.dtype for tensor in stored.values() if tensor.dtype.is_floating_point)
    nn.Module.to(model, dtype)
    for name, module in model.named_modules():  # as transformers does: T5's feed-forward output overflows float16
        if dtype == torch.float16 and name.rpartition(".")[2] in (getattr(model, "_keep_in_fp32_modules", None) or ()):
            module.float()
    stream(model.eval(), device, source="disk", directory=directory, ahead=ahead)
    return model


def streamed_bytes(model: nn.Module, ahead: int = 1) -> int:
    """Bytes of weights on the device while a model is streamed, at most; for any model, the meta device's included."""
    parts = Parts.of(model)
    blocks = max(Unit(tensors, None).nbytes for tensors in parts.block_tensors)
    alone = max((Unit(tensors, None).nbytes for _, tensors in parts.lent), default=0)
    return sum(tensor.nbytes for tensor in parts.resident) + min(ahead + 1, len(parts.blocks)) * blocks + alone


@dataclass
class _Streaming:
    """What `stream` has done to a model, and how it is undone."""

    model: Any
    ring: Ring
    lent: list[Unit]
    resident: list[Tensor]
    flags: list[tuple[nn.Parameter, bool]]
    handles: list[Any]

    def install(self, parts: Parts) -> None:
        """Hook the modules, and let methods that would act on stand-ins refuse."""
        for index, block in enumerate(parts.blocks):
            _hook(block, _InRing(self.ring, index))
        for unit, (modules, _) in zip(self.lent, parts.lent, strict=True):
            for module in modules:
                _hook(module, _Alone(unit, self.ring.device))
        self.handles = [
            self.model.register_forward_hook(_outside(lambda *_: self.ring.empty()), always_call=True),
            self.model.register_state_dict_pre_hook(lambda *_: _refuse(self.model, "state_dict")),
        ]
        for name in filter(lambda name: hasattr(self.model, name), _REFUSED):
            setattr(self.model, name, _refusing(self.model, name))
        self.model._cogvideox_streaming = self
        HookRegistry.check_if_exists_or_initialize(self.model).invalidate_child_registries_cache()

    def remove(self) -> None:
        """Undo everything."""
        registry = HookRegistry.check_if_exists_or_initialize(self.model)
        registry.remove_hook(HOOK, recurse=True)
        registry.invalidate_child_registries_cache()
        for handle in self.handles:
            handle.remove()
        for name in ("_cogvideox_streaming", *(name for name in _REFUSED if name in vars(self.model))):
            delattr(self.model, name)
        for unit in [*self.ring.units, *self.lent]:
            memory = torch.empty(unit.nbytes, dtype=torch.uint8)
            unit.fill(memory)
            for tensor, view in zip(unit.tensors, unit.views(memory), strict=True):
                tensor.data = view.clone()  # on their own, so that each can be freed and saved
            unit.packed = None
        for tensor in self.resident:
            tensor.data = tensor.data.cpu()
        wrap_again(self.model, torch.device("cpu"), move=False)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


class _InRing(ModelHook):
    """A block in the ring."""

    def __init__(self, ring: Ring, index: int) -> None:
        super().__init__()
        self.ring, self.index = ring, index

    @_outside
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ARG002
        """Bring the block's weights."""
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
            raise ValueError("weights that are streamed are gone before the backward pass: use torch.no_grad(), or stop_streaming(model).")
        self.ring.use(self.index)
        return args, kwargs

    @_outside
    def post_forward(self, module: nn.Module, output: Any) -> Any:  # noqa: ARG002
        """Let them go."""
        self.ring.done(self.index)
        return output


class _Alone(ModelHook):
    """A layer that is brought when it is called."""

    def __init__(self, unit: Unit, device: torch.device) -> None:
        super().__init__()
        self.unit, self.device = unit, device

    @_outside
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:  # noqa: ARG002
        """Bring the layer's weights."""
        fill_and_attach(self.unit, self.device)
        return args, kwargs

    @_outside
    def post_forward(self, module: nn.Module, output: Any) -> Any:  # noqa: ARG002
        """Let them go."""
        self.unit.detach(self.device)
        return output


def _hook(module: nn.Module, hook: ModelHook) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK)


def _refusing(model: Any, name: str) -> Callable[..., NoReturn]:
    return lambda *_, **__: _refuse(model, name)


def _refuse(model: Any, name: str) -> NoReturn:
    what = "moving or casting it (to(), half(), cuda(), model and sequential offloading)" if name == "_apply" else f"{name}()"
    raise ValueError(f"{what} is not possible while this {type(model).__name__} is streamed: call stop_streaming(model) first.")


def _resolved(device: torch.device | str) -> torch.device:
    """A device with its index, as tensors on it say it."""
    return torch.empty(0, device=device).device


def _check_request(device: torch.device, source: str, directory: str | Path | None, ahead: int) -> None:
    if source not in SOURCES:
        raise ValueError(f"source={source!r} is unknown: use one of {', '.join(SOURCES)}.")
    if (source == "disk") != (directory is not None):
        raise ValueError(
            f"source={source!r} with directory={directory!r} does not fit: 'disk' needs the folder of the model, 'memory' none."
        )
    if source == "memory" and device.type == "cpu":
        raise ValueError(
            "weights in the memory of the host need not be streamed to the CPU: use source='disk', or leave the model as it is."
        )
    if ahead < 0:
        raise ValueError(f"ahead={ahead} is not possible: give 0 or more blocks.")
