"""A LoRA as data: two factors for each adapted layer, alpha, perhaps DoRA's magnitudes; read from any layout and written to any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..presets import match_preset
from .layers import fitting_presets, layer_shapes
from .lora_config import adapter_config, alpha_of, check_options
from .lora_layouts import ALPHA, DOWN, LAYOUTS, MAGNITUDE, ROLES, SAT_TARGETS, UP, Layout, find_layout
from .rules import listed

__all__ = ["AdaptedLayer", "Lora", "check_fits", "read_lora", "to_layout", "to_peft", "with_alpha"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class AdaptedLayer:
    """What a LoRA makes of a weight W (out, in): W + alpha / r * B A (arXiv:2106.09685, section 4.1).

    With magnitudes m (DoRA, arXiv:2402.09353, equation 5) the rows of that sum are scaled to the lengths m.

    Args:
        down: A (r, in), or (r, C, p, p) of a convolution.
        up: B (out, r), or (out, r, 1, 1).
        alpha: None where the file does not say.
        magnitude: m (out), or None.
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Rank r of the update."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that this is for."""
        return (len(self.up), *self.down.shape[1:])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by role, without alpha."""
        magnitude = {} if self.magnitude is None else {MAGNITUDE: self.magnitude}
        return {DOWN: self.down, UP: self.up, **magnitude}


@dataclass(frozen=True)
class Lora:
    """All adapted layers of a file, by names such as "transformer_blocks.0.attn1.to_q"."""

    layers: Mapping[str, AdaptedLayer]
    layout: Layout
    source: str  # file name, for messages

    @property
    def is_dora(self) -> bool:
        """Whether the layers have magnitudes; all have or none."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def says_alpha(self) -> bool:
        """Whether the file names the alpha of every layer."""
        return all(layer.alpha is not None for layer in self.layers.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights that it is for, by layer."""
        return {name: layer.shape for name, layer in self.layers.items()}


# --- reading ------------------------------------------------------------------------------------------------------------


def read_lora(
    tensors: Mapping[str, Tensor], source: str, header: Mapping[str, str] | None = None, config: Mapping[str, Any] | None = None
) -> Lora:
    """Understand the tensors of a LoRA file.

    Args:
        tensors: by name, in any of the known layouts.
        source: what to call it in messages.
        header: metadata of the safetensors file.
        config: PEFT's LoraConfig, where it stands in a file of its own; read in place of the header.

    Raises:
        ValueError: no LoRA, names that belong to no layer of CogVideoX, half a layer, shapes that do not match each other, or
            options that would have to be ignored; the message lists them.
    """
    layout = find_layout(tensors)
    if layout is None:
        raise ValueError(_no_lora(tensors, source))
    try:
        config = config or adapter_config(header or {})
        check_options(config)
        layers = {name: _layer(name, roles, config) for name, roles in _by_layer(layout.rules.forward(tensors)).items()}
        _check_magnitudes(layers, config)
    except ValueError as error:
        raise ValueError(f"{source} cannot be used as a LoRA (layout {layout.name}): {error}.") from error
    return Lora(layers, layout, source)


def _no_lora(tensors: Mapping[str, Tensor], source: str) -> str:
    if not tensors:
        return f"{source} is empty: it holds no tensors."
    return (
        f"{source} holds no LoRA: none of its {len(tensors)} tensors belongs to one ({listed(sorted(tensors))}). A whole transformer is "
        "loaded with CogVideoXTransformer3DModel.from_pretrained; raw weights must be converted first."
    )


def _by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`layer.role` -> tensor as layer -> role -> tensor, in the order of the names."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        role = next(role for role in ROLES if name.endswith(f".{role}"))
        layers.setdefault(name.removesuffix(f".{role}"), {})[role] = tensors[name]
    return layers


def _layer(name: str, roles: Mapping[str, Tensor], config: Mapping[str, Any]) -> AdaptedLayer:
    if missing := [role for role in (DOWN, UP) if role not in roles]:
        raise ValueError(f"{name} lacks {' and '.join(missing)}")
    down, up = roles[DOWN], roles[UP]
    if down.ndim < 2 or up.ndim != down.ndim or not len(down) or up.shape[1] != len(down) or any(size != 1 for size in up.shape[2:]):
        raise ValueError(f"{name} has factors A {tuple(down.shape)} and B {tuple(up.shape)}, which share no rank")
    told, stored = alpha_of(config, name, len(down)), _scalar(name, roles.get(ALPHA))
    if told is not None and stored is not None and abs(told - stored) > 0.01 * abs(told):  # 16-bit alphas are rounded
        raise ValueError(f"{name} has alpha {stored:g} among the tensors, but {told:g} in the metadata")
    return AdaptedLayer(down, up, told if stored is None else stored, _magnitude(name, roles.get(MAGNITUDE), len(up)))


def _scalar(name: str, alpha: Tensor | None) -> float | None:
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"{name} has an alpha of shape {tuple(alpha.shape)}, not one number")
    return None if alpha is None else float(alpha)


def _magnitude(name: str, magnitude: Tensor | None, rows: int) -> Tensor | None:
    """DoRA's magnitudes as (out)."""
    if magnitude is not None and tuple(magnitude.shape) not in {(rows,), (rows, 1)}:
        raise ValueError(
            f"{name} has DoRA magnitudes of shape {tuple(magnitude.shape)}; only one for each of its {rows} rows can be used, as PEFT "
            "trains them"
        )
    return None if magnitude is None else magnitude.flatten()


def _check_magnitudes(layers: Mapping[str, AdaptedLayer], config: Mapping[str, Any]) -> None:
    without = [name for name, layer in layers.items() if layer.magnitude is None]
    if without and (len(without) < len(layers) or config.get("use_dora")):
        raise ValueError(f"it is a DoRA, but lacks the magnitudes of {listed(without)}")


# --- strength -----------------------------------------------------------------------------------------------------------


def with_alpha(lora: Lora, given: float | None = None) -> Lora:
    """The LoRA with an alpha in every layer: the file's, else `given`, else the usual one of its layout, with a warning.

    Raises:
        ValueError: `given` is not positive or contradicts the file.
    """
    if given is not None and not given > 0:
        raise ValueError(f"lora_alpha={given} is not possible: it must be positive. Turn a LoRA off with disable_lora() or set_adapters.")
    contradicted = [layer.alpha for layer in lora.layers.values() if None not in (given, layer.alpha) and layer.alpha != given]
    if contradicted:
        raise ValueError(
            f"lora_alpha={given:g} contradicts {lora.source}, which says {contradicted[0]:g}: leave it out. To change the strength, use "
            "set_adapters(adapter_name, weight)."
        )
    unknown = [layer for layer in lora.layers.values() if layer.alpha is None]
    if unknown and given is None:
        logger.warning(_assumption(lora, unknown))
    usual = given or lora.layout.usual_alpha
    chosen = {name: replace(layer, alpha=usual or float(layer.rank)) for name, layer in lora.layers.items() if layer.alpha is None}
    return replace(lora, layers={**lora.layers, **chosen})


def _assumption(lora: Lora, unknown: list[AdaptedLayer]) -> str:
    usual, ranks = lora.layout.usual_alpha, ", ".join(map(str, sorted({layer.rank for layer in unknown})))
    assumed = f"alpha = {usual:g}, the default of this layout's trainer" if usual else "alpha = rank, as diffusers does"
    return (
        f"{lora.source} does not say its alpha (rank {ranks}). Assumed is {assumed}. If it was trained with another one, its strength, "
        "alpha / rank, is wrong: pass lora_alpha=... Known cases are the finetune scripts of CogVideo (rank 128, alpha 64) and LoRAs that "
        "its tools exported from SAT (alpha 1)."
    )


# --- use and writing ----------------------------------------------------------------------------------------------------


def check_fits(lora: Lora, transformer_config: Mapping[str, Any]) -> None:
    """Raise ValueError when the transformer lacks a layer of the LoRA or has it in another shape; says which releases it fits."""
    has = layer_shapes(transformer_config)
    wrong = [f"{name} (LoRA {shape}, model {has.get(name, 'has none')})" for name, shape in lora.shapes.items() if has.get(name) != shape]
    if wrong:
        fitting, own = ", ".join(fitting_presets(lora.shapes)), match_preset(transformer_config)
        raise ValueError(
            f"{lora.source} does not fit this transformer{f' ({own.name})' if own else ''} in {len(wrong)} of {len(lora.layers)} layers: "
            f"{listed(wrong)}. It is a LoRA for {fitting or 'none of the released models'}."
        )


def to_peft(lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by `layer.role`, and the arguments of PEFT's LoraConfig that give every layer its strength.

    Raises:
        ValueError: for a layer without alpha (see `with_alpha`).
    """
    alphas, ranks = _alphas(lora), {name: layer.rank for name, layer in lora.layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(lora.layers),
        "use_dora": lora.is_dora,
    }
    return {f"{name}.{role}": tensor for name, layer in lora.layers.items() for role, tensor in layer.tensors.items()}, config


def to_layout(lora: Lora, name: str) -> dict[str, Tensor]:
    """The tensors under the names of another layout: the name of one of `LAYOUTS`.

    Alpha is among them where the layout has a place for it. For "diffusers", "peft" and "bare" it belongs into the metadata
    (`to_peft` gives them), for "sat" into the `lora_config` of its YAML file.

    Raises:
        ValueError: for an unknown layout, a layer without alpha, or what SAT cannot express: other layers than the attention's,
            several ranks or strengths, DoRA.
    """
    layout = next((layout for layout in LAYOUTS if layout.name == name), None)
    if layout is None:
        raise ValueError(f"there is no layout {name!r}: known are {', '.join(sorted({layout.name for layout in LAYOUTS}))}.")
    alphas, (tensors, _) = _alphas(lora), to_peft(lora)
    if name == "sat":
        _check_sat(lora)
    if layout.stores_alpha:
        tensors |= {f"{layer}.{ALPHA}": torch.tensor(alpha) for layer, alpha in alphas.items()}
    try:
        return layout.rules.backward(tensors)
    except ValueError as error:
        raise ValueError(f"{lora.source} cannot be written in the layout {name}: {error}.") from error


def _check_sat(lora: Lora) -> None:
    if len({(layer.rank, layer.alpha) for layer in lora.layers.values()}) > 1:
        raise ValueError(f"{lora.source} has layers of several ranks or alphas, but SAT knows one of each.")
    blocks = {name.partition(".attn1.")[0] for name in lora.layers if ".attn1." in name}
    absent = [name for block in sorted(blocks) for target in SAT_TARGETS if (name := f"{block}.{target}") not in lora.layers]
    if absent:
        raise ValueError(f"{lora.source} does not adapt {listed(absent)}, but SAT adapts all four projections of an attention.")


def _alphas(lora: Lora) -> dict[str, float]:
    """Alpha of every layer, or a ValueError."""
    if unknown := [name for name, layer in lora.layers.items() if layer.alpha is None]:
        raise ValueError(f"{lora.source} does not say the alpha of {listed(unknown)}: choose it with `with_alpha`.")
    return {name: layer.alpha for name, layer in lora.layers.items() if layer.alpha is not None}
