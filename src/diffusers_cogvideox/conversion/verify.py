"""Proof of a conversion: what was written is opened again, hashed tensor by tensor, and computed with beside the source."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.lazy import LazyTensor
from ..checkpoints.lora import AdaptedLayer, Lora
from ..checkpoints.rules import listed
from ..geometry import DECODE_CHUNK, ENCODE_CHUNK
from ..models.rope import rope_for
from .hints import Hints, parts_of
from .loras import lora_of
from .parts import Part, model_on_meta
from .sources import open_source

__all__ = ["compare_outputs", "hashes", "verify"]

_SMALL = 2**30  # bytes of weights up to which all blocks of a transformer are computed with
_BLOCKS = 2  # of a larger one
_ROUNDING = 2**-7  # of a LoRA that was rounded to 16 bits
_TOLERANCE = 1e-5  # of outputs, in float32: the weights are the same, to the bit


def hashes(tensors: Mapping[str, LazyTensor]) -> dict[str, str]:
    """The first 16 hexadecimal digits of a SHA-256 of dtype, shape and values of each tensor, one tensor in memory at a time."""
    return {name: _hash(tensor) for name, tensor in tensors.items()}


def _hash(tensor: LazyTensor) -> str:
    values = tensor.make().detach().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape} ".encode())
    digest.update(memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()[:16]


def verify(parts: Mapping[str, Part], lora: Lora | None, written: Path, hints: Hints) -> list[str]:
    """Open what was written, and compare it with what it was made of.

    Of every tensor of the source the hash is compared with that of the same tensor, made from the written ones through the rules in the
    other direction; then both models predict from the same random input.

    Args:
        parts: what was converted, in the precision of the result.
        lora: the LoRA that was converted.
        written: the new folder.
        hints: as in the conversion.

    Returns:
        lines to print: hash and name of every tensor, and the largest difference of the outputs.

    Raises:
        OSError: something is not what it should be.
    """
    lines = []
    again = _read_again(written, hints) if parts else {}
    for name, part in parts.items():
        expected = hashes(_as_in_source(part))
        found = hashes(again[name].tensors if part.rules is None else part.rules.backward(again[name].tensors))
        if wrong := [key for key in expected if expected[key] != found.get(key)]:
            raise OSError(f"verification failed: {listed(wrong)} of the {name} are not what they were. Is the disk damaged?")
        lines += [f"{digest}  {key}" for key, digest in expected.items()]
        difference, extent = compare_outputs(part, again[name])
        if not difference <= _TOLERANCE:
            raise OSError(f"verification failed: the outputs of the {name} differ by {difference:.1e}.")
        lines.append(f"verified: {len(expected)} tensors of the {name} are equal to the bit; outputs ({extent}) differ by {difference:.1e}")
    return lines + ([] if lora is None else _verified_lora(lora, written / "lora" if parts else written))


def _read_again(written: Path, hints: Hints) -> dict[str, Part]:
    source = open_source(written)
    return parts_of(source, replace(hints, configs={**hints.configs, **source.configs}))[0]


def _verified_lora(lora: Lora, place: Path) -> list[str]:
    """Compare what every layer of a LoRA adds to its weight, alpha / r * B A, with what the written one adds."""
    source = open_source(place)
    again = lora_of(source.groups["lora"], source.configs.get("lora"), next(iter(lora.layers.values())).alpha if place.is_file() else None)
    if again.layers.keys() != lora.layers.keys():
        raise OSError("verification failed: the layers of the LoRA are not those that it had.")
    difference = max(float((_update(layer) - _update(again.layers[name])).abs().max()) for name, layer in lora.layers.items())
    largest = max(float(_update(layer).abs().max()) for layer in lora.layers.values())
    if not difference <= _ROUNDING * largest:
        raise OSError(f"verification failed: what the LoRA adds to the weights differs by {difference:.1e}.")
    return [f"verified: {len(lora.layers)} layers of the LoRA; what they add to the weights differs by {difference:.1e}"]


def _update(layer: AdaptedLayer) -> Tensor:
    """alpha / r * B A, flattened to (out, in)."""
    assert layer.alpha is not None
    return layer.alpha / layer.rank * (layer.up.float().flatten(1) @ layer.down.float().flatten(1))


def _as_in_source(part: Part) -> Mapping[str, LazyTensor]:
    """The tensors of the source by its names: the very ones, unless they were rounded to another precision."""
    if part.rules is None:
        return part.tensors
    again = part.rules.backward(part.tensors)
    stored = part.group.tensors
    return {name: stored[name] if name in stored and stored[name].dtype == tensor.dtype else tensor for name, tensor in again.items()}


# --- outputs ------------------------------------------------------------------------------------------------------------


def compare_outputs(one: Part, other: Part) -> tuple[float, str]:
    """The largest difference between the outputs of two models on the same random input, in float32, and what was computed.

    Of a transformer with more than 1 GiB of weights the first two blocks are computed, between all that is before and behind them.
    """
    if one.kind == "vae":
        outputs = [_through_vae(part) for part in (one, other)]
        return float((outputs[0] - outputs[1]).abs().max()), "encoded and decoded"
    layers = one.config["num_layers"]
    size = sum(tensor.nbytes for tensor in one.tensors.values())
    kept = layers if size <= _SMALL else min(_BLOCKS, layers)
    outputs = [_through_transformer(_shortened(part, kept)) for part in (one, other)]
    return float((outputs[0] - outputs[1]).abs().max()), f"{kept} of {layers} blocks"


def _shortened(part: Part, layers: int) -> Part:
    """The transformer with its first blocks only."""
    block = "transformer_blocks."
    kept = {name: tensor for name, tensor in part.tensors.items() if not name.startswith(block) or int(name.split(".")[1]) < layers}
    return replace(part, config={**part.config, "num_layers": layers}, tensors=kept)


def _model(part: Part) -> Any:
    model = model_on_meta(part.kind, part.config)
    model.load_state_dict({name: tensor.make().float() for name, tensor in part.tensors.items()}, assign=True)
    return model.eval()


@torch.no_grad()
def _through_transformer(part: Part) -> Tensor:
    """The velocity (1, F, C, h, w) that it predicts at the smallest size with several tokens along each axis."""
    config, random = part.config, torch.Generator().manual_seed(0)
    frames, height = 2 * (config.get("patch_size_t") or 1), 2 * config["patch_size"]
    width = 2 * height
    if config.get("use_learned_positional_embeddings"):  # made for one size
        frames, height, width = 1, config["sample_height"], config["sample_width"]
    latents = torch.randn(1, frames, config["in_channels"], height, width, generator=random)
    text = torch.randn(1, 3, config["text_embed_dim"], generator=random)
    rotary = rope_for(config, frames, height, width)
    ofs = torch.full((1,), 2.0) if config.get("ofs_embed_dim") else None
    return _model(part)(latents, text, torch.tensor([500]), ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]


@torch.no_grad()
def _through_vae(part: Part) -> Tensor:
    """The moments (1, 2 C, f, h, w) of a short video and the frames that their means decode to, in one vector."""
    model = _model(part)
    random = torch.Generator().manual_seed(0)
    side = 2 * model.spatial_ratio
    video = torch.rand(1, part.config["in_channels"], ENCODE_CHUNK + 1, side, side, generator=random) * 2 - 1
    posterior = model.encode(video).latent_dist
    latents = posterior.mean[:, :, : DECODE_CHUNK + 1]
    return torch.cat([posterior.parameters.flatten(), model.decode(latents).sample.flatten()])
