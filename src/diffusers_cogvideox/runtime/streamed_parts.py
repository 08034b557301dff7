"""What of a model is streamed: which modules are its blocks, what comes alone, what stays; and where the weights of each lie on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..checkpoints.stored import StoredTensor, stored_tensors
from ..models.block import AdaLayerNorm
from ..models.stand_in import stand_in

__all__ = ["Parts", "check_streamable", "locate", "named_tensors", "replace_meta", "wrap_again"]

ADAPTER = "lora_"


@dataclass(frozen=True)
class Parts:
    """The tensors of a model by how they come to the device.

    Args:
        blocks, block_tensors: the blocks, in order, and what belongs to each.
        lent: modules that are brought alone when they are called (modulation layers, embeddings of text), with what belongs to them.
            Modules that share their weights are one entry.
        resident: all else, and adapters.
    """

    blocks: list[nn.Module]
    block_tensors: list[list[Tensor]]
    lent: list[tuple[list[nn.Module], list[Tensor]]]
    resident: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        """The parts of any model that has a list of blocks. Raises ValueError for others."""
        blocks = _blocks(model)
        inside = {id(module) for block in blocks for module in block.modules()}
        seen: set[int] = {id(tensor) for name, tensor in named_tensors(model) if ADAPTER in name}

        def own(module: nn.Module) -> list[Tensor]:
            found = [tensor for _, tensor in named_tensors(module) if id(tensor) not in seen]
            found = list({id(tensor): tensor for tensor in found}.values())
            seen.update(map(id, found))
            return found

        lent: list[tuple[list[nn.Module], list[Tensor]]] = []
        for module in _called_alone(model, inside):
            shared = next((group for group in lent if group[0][0].weight is module.weight), None)
            if shared:
                shared[0].append(module)
            else:
                lent.append(([module], own(module)))
        block_tensors = [own(block) for block in blocks]
        adapters = [tensor for name, tensor in named_tensors(model) if ADAPTER in name]
        return cls(blocks, block_tensors, lent, own(model) + adapters)


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers with all their names: tensors that are shared come several times.

    Of a parameter that is a wrapper around others (torchao's quantised ones) those others.
    """
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        if is_traceable_wrapper_subclass(tensor):
            yield from ((f"{name}.{inner}", getattr(tensor, inner)) for inner in tensor.__tensor_flatten__()[0])
        else:
            yield name, tensor


def wrap_again(model: nn.Module, device: torch.device, move: bool) -> None:
    """Let wrappers say that they are on a device: what they wrap is exchanged behind their backs.

    Args:
        model: on which they are.
        device: what they shall say.
        move: whether what they wrap is moved there for it, and comes back; otherwise it must be there.
    """
    for parameter in model.parameters():
        if not is_traceable_wrapper_subclass(parameter) or parameter.device == device:
            continue
        names, context = parameter.__tensor_flatten__()
        values = {name: getattr(parameter, name) for name in names}
        inside = {name: value.to(device) for name, value in values.items()} if move else values
        made = type(parameter).__tensor_unflatten__(inside, context, parameter.shape, parameter.stride())
        torch.utils.swap_tensors(parameter, nn.Parameter(made, requires_grad=False))
        for name, value in values.items():
            getattr(parameter, name).data = value


def check_streamable(model: Any, source: str) -> None:
    """Raise ValueError for a model that is streamed or offloaded already, or quantised in a form that cannot be streamed."""
    for name, module in model.named_modules():
        registry = getattr(module, "_diffusers_hook", None)
        if hasattr(module, "_hf_hook") or (registry and registry.get_hook("group_offloading")):
            raise ValueError(f"{name or type(model).__name__} is offloaded already: load the model anew, and do one of the two.")
        if registry and registry.get_hook("cogvideox_streaming"):
            raise ValueError(f"this {type(model).__name__} is streamed already: call stop_streaming(model) first.")
    for name, parameter in model.named_parameters():
        if is_traceable_wrapper_subclass(parameter) and source == "disk":
            raise ValueError(f"{name} is quantised ({type(parameter).__name__}), and on disk it is not: use source='memory'.")
        if type(parameter) is not nn.Parameter and not is_traceable_wrapper_subclass(parameter):
            raise ValueError(
                f"{name} is quantised ({type(parameter).__name__}), and what belongs to it is not in the parameter: keep the model on the "
                "device, or use one of torchao's quantisations or 'fp8-cast', which can be streamed."
            )


def locate(model: nn.Module, folder: Path) -> dict[str, StoredTensor]:
    """Where the weights of a model lie in its folder, by their names in the model. Adapters are not in it.

    Raises:
        ValueError: the folder is not that of this model, or holds other values than a model that has values already.
        FileNotFoundError, OSError: as `stored_tensors`.
    """
    stored = stored_tensors(folder)
    found: dict[str, StoredTensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(model):
        names.setdefault(id(tensor), []).append(name)
    for name, tensor in named_tensors(model):
        if ADAPTER in name:
            continue
        entry = next((stored[alias] for alias in _aliases(names[id(tensor)]) if alias in stored), None)
        if entry is None or entry.shape != tuple(tensor.shape):
            has = "has no such tensor" if entry is None else f"has it in the shape {entry.shape}"
            raise ValueError(f"{name} is {tuple(tensor.shape)}, but {folder} {has}: give the folder of this model, with the same settings.")
        if not tensor.is_meta:
            _compare(name, tensor, entry)
        found[name] = entry
    return found


def replace_meta(model: nn.Module, device: torch.device) -> set[int]:
    """Put stand-ins in the place of tensors on the meta device, in place; returns the ids of the new ones."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    value = stand_in(tensor, device)
                    made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
                table[name] = made[id(tensor)]  # type: ignore[assignment]
    return {id(tensor) for tensor in made.values()}


def _blocks(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    sizes = [sum(p.numel() for p in blocks.parameters()) for blocks in lists]
    if not lists or 2 * max(sizes) < sum(p.numel() for p in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with most of its weights, and cannot be streamed: offload it whole."
        )
    return list(lists[sizes.index(max(sizes))])


def _called_alone(model: nn.Module, inside: set[int]) -> list[nn.Module]:
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding) and id(module) not in inside]
    modulations = [module.linear for module in model.modules() if isinstance(module, AdaLayerNorm) and id(module) in inside]
    return [*embeddings, *modulations]


def _aliases(names: list[str]) -> Iterator[str]:
    for name in names:
        yield from (name, name.replace(".base_layer", ""))


def _compare(name: str, tensor: Tensor, stored: StoredTensor) -> None:
    value = torch.empty(tensor.shape, dtype=tensor.dtype)
    stored.read(value)
    if not torch.equal(value, tensor.detach().cpu()):
        raise ValueError(
            f"{name} differs from {stored.path}, from where it would be read: save the model as it is (save_pretrained, without adapters), "
            "and stream it from there."
        )
