"""The adaptive LayerNorms' modulations of a whole schedule, computed before the loop: of all inputs they depend on the timestep alone.

The linear layers that make them hold a seventh of the 5B model's parameters (0.79 B of 5.57 B). With the tables of a schedule they have
nothing to do while the loop runs, and may be elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from .block import AdaLayerNorm
from .stand_in import is_stand_in, stand_in

__all__ = ["ModulationTables", "SetAside", "tabulated"]


@contextmanager
def tabulated(
    transformer: Any,
    timesteps: Tensor,
    ofs: Tensor | None = None,
    release: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[ModulationTables | None]:
    """Let the adaptive LayerNorms of a transformer look their modulations up, while the block runs and gradients are off.

    A pass at a timestep outside the schedule computes as without tables; where `release` has taken the weights away, it raises ValueError.
    A pass that is compiled whole cannot tell, and gives NaN for such a timestep.

    There are no tables (None) for a transformer of another package, for more timesteps than the embedding has channels (the tables
    would be larger than the layers), and for leaf-level group offloading with streams, which loads layers in the order of their first use.

    Args:
        transformer: the model; offloaded layers are computed one at a time, where they are or where their hooks bring them.
        timesteps: of the schedule, (T,) in any order, on the device that the loop runs on; equal ones count once.
        ofs: as in the transformer's forward pass.
        release: keep the layers' weights in the memory of the host meanwhile. Only affects weights that would otherwise stay on an
            accelerator, and not quantised ones.
        attention_kwargs: of the call, for its LoRA scale.
    """
    layers = [module for module in transformer.modules() if isinstance(module, AdaLayerNorm)]
    schedule = timesteps.unique()
    if not layers or len(schedule) > layers[0].linear.in_features or any(_has_recorded_order(layer.linear) for layer in layers):
        yield None
        return
    release = release and schedule.device.type != "cpu"  # whose memory is the host's
    tables = ModulationTables(transformer, layers, schedule, ofs, release, attention_kwargs)
    outer = transformer.modulation
    if outer is not None:
        outer.leave()
    try:
        tables.enter()
        yield tables
    finally:
        tables.leave()
        if outer is not None:
            outer.enter()


class ModulationTables:
    """The tables of one transformer and schedule; see `tabulated`, which makes and removes them.

    `enter` puts a table (T + 1, parts * D) into every adaptive LayerNorm; the last row is NaN, for what is not in the schedule.
    """

    def __init__(
        self,
        transformer: Any,
        layers: list[AdaLayerNorm],
        timesteps: Tensor,
        ofs: Tensor | None,
        release: bool,
        attention_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.transformer = transformer
        self.layers = layers
        self.timesteps = timesteps
        self.ofs = ofs
        self.attention_kwargs = attention_kwargs
        self.tables: list[Tensor] = []
        self._state: list[Any] = []
        self._aside = SetAside(timesteps.device) if release else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self.tables)

    @property
    def released(self) -> int:
        """Bytes of weights that are away from the device at present."""
        return self._aside.nbytes if self._aside else 0

    def enter(self) -> None:
        """Compute the tables, unless they are still right, and put them in their places."""
        state = _state(self.transformer, self.layers)
        if state != self._state:
            self.tables = _compute(self.transformer, self.layers, self.timesteps, self.ofs, attention_kwargs=self.attention_kwargs)
            self._state = state
        for layer, table in zip(self.layers, self.tables, strict=True):
            layer.table = table
        self.transformer.modulation = self
        if self._aside:
            self._aside.take(layer.linear for layer in self.layers)

    def leave(self) -> None:
        """Take the tables out of their places, and bring the weights back."""
        if self._aside:
            self._aside.give_back()
        for layer in self.layers:
            layer.table = None
        self.transformer.modulation = None

    def refresh(self) -> None:
        """Compute the tables again if the weights have changed since, or a LoRA on them; for whoever lets others act inside the loop."""
        if _state(self.transformer, self.layers) != self._state:
            self.leave()
            self.enter()

    def rows(self, timestep: Tensor, ofs: float | Tensor | None) -> Tensor | None:
        """Rows (1 or B,) of the tables for a pass, or None when it has to be computed.

        Args:
            timestep: (1,) or (B,).
            ofs: as in the transformer's forward pass.

        Raises:
            ValueError: it has to be computed, and the weights are away.
        """
        found = timestep[:, None] == self.timesteps
        if ofs is not None and self.ofs is not None:
            found = found & (torch.as_tensor(ofs, device=found.device).reshape(-1, 1) == self.ofs.reshape(-1, 1))
        if not torch.compiler.is_compiling() and not found.any(dim=1).all():
            if not self.released:
                return None
            unknown = timestep[~found.any(dim=1)].tolist()
            raise ValueError(
                f"timestep={unknown} is not in the schedule of this loop, for which the modulation layers' weights were put aside: "
                "call transformer.release_modulation(False), or use only the loop's timesteps while it runs."
            )
        return torch.cat([found, torch.ones_like(found[:, :1])], dim=1).int().argmax(dim=1)  # the first that is true


class SetAside:
    """Weights of linear layers, kept in the memory of the host, with stand-ins in their places.

    Parameters stay the same objects, so that what refers to them (offloading, adapters) goes on to work.

    Args:
        device: the device that is relieved; weights elsewhere, and those that are not plain tensors (quantised), are left alone.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are aside."""
        return sum(kept.nbytes for _, kept in self._kept)

    def take(self, layers: Iterable[nn.Module]) -> None:
        """Put the weights of layers aside."""
        for parameter in (p for layer in layers for p in layer.parameters()):
            if type(parameter.data) is Tensor and parameter.device == self.device and not is_stand_in(parameter):
                self._kept.append((parameter, parameter.data.cpu()))
                parameter.data = stand_in(parameter)

    def give_back(self) -> None:
        """Undo `take`, wherever the parameters are by now."""
        for parameter, kept in self._kept:
            parameter.data = kept.to(parameter.device, parameter.dtype)
        self._kept.clear()


@torch.no_grad()
@apply_lora_scale("attention_kwargs")
def _compute(
    transformer: Any,
    layers: list[AdaLayerNorm],
    timesteps: Tensor,
    ofs: Tensor | None,
    *,
    attention_kwargs: Any = None,  # noqa: ARG001 - read by the decorator
) -> list[Tensor]:
    """Tables (T + 1, parts * D) on the device of the timesteps (T,); weights are used where they are."""
    device = timesteps.device
    hook = getattr(transformer, "_hf_hook", None)
    if isinstance(hook, CpuOffload):
        hook.pre_forward(transformer)  # a whole model that is offloaded is about to be used anyway
    home = _home(transformer.time_embedding, device)
    like = torch.empty(len(timesteps), 0, dtype=transformer.dtype, device=home)
    temb = nn.functional.silu(transformer.embed_time(timesteps.to(home), None, None if ofs is None else ofs.to(home), like))
    vectors = (layer.linear(temb.to(_home(layer.linear, device))).to(device) for layer in layers)
    return [torch.cat([part, torch.full_like(part[:1], float("nan"))]) for part in vectors]


def _home(module: nn.Module, device: torch.device) -> torch.device:
    """Where a module's weights are; `device` if only hooks know."""
    place = next(module.parameters()).device
    return device if place.type == "meta" else place


def _has_recorded_order(linear: nn.Module) -> bool:
    """Whether diffusers' group offloading brings this very layer behind the one that was used before it in the first pass."""
    registry = getattr(linear, "_diffusers_hook", None)
    hook = registry.get_hook("group_offloading") if registry else None
    return hook is not None and hook.config.stream is not None


def _state(transformer: Any, layers: list[AdaLayerNorm]) -> list[Any]:
    """Something that is equal as long as the tables are right: which parameters there are, how often each was written, adapters' state."""
    roots = [transformer.time_embedding, transformer.ofs_embedding, *(layer.linear for layer in layers)]
    modules = [module for root in roots if root is not None for module in root.modules()]
    parameters = [
        (id(p), 0 if p.is_inference() else p._version) for module in modules for p in module._parameters.values() if p is not None
    ]
    adapters = [
        (dict(module.scaling), list(module.active_adapters), list(module.merged_adapters), module.disable_adapters)
        for module in modules
        if isinstance(getattr(module, "scaling", None), dict)
    ]
    return [parameters, adapters]
