"""The verb `convert`: find out what the input is, plan the output, write it whole or not at all, and prove it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers.utils import logging

from ..checkpoints.lora import Lora
from ..checkpoints.rules import listed
from ..checkpoints.writing import parse_bytes
from ..files import atomic_folder, atomic_path
from ..presets import match_preset
from . import to_diffusers, to_sat
from .hints import Hints, hints_for, parts_of, pipeline_class
from .loras import diffusers_lora, lora_of, merged
from .options import ConvertOptions
from .parts import Part, in_dtype
from .plan import Output
from .sources import Source, open_source
from .text_encoder import find_text_encoder
from .verify import verify

__all__ = ["convert"]

logger = logging.get_logger(__name__)

_FILES = (".safetensors", ".pt", ".bin", ".ckpt")
_NAMES = {"sat": "the original code (SAT)", "diffusers": "diffusers"}
# What an earlier result consists of, beside weight and JSON files: nothing else is ever replaced.
_PARTS = {"latest", "1", "transformer", "vae", "text_encoder", "tokenizer", "scheduler", "lora", "3d-vae.pt", to_sat.T5_FOLDER}


@dataclass(frozen=True)
class _Understood:
    """The input, with everything that the options and the files beside it say about it."""

    source: Source
    hints: Hints
    parts: dict[str, Part]
    lora: Lora | None
    target: str  # "diffusers" or "sat"
    notes: list[str]


def convert(options: ConvertOptions) -> str:
    """Convert a checkpoint, as `cogvideox convert` does; returns what it prints.

    Raises:
        FileNotFoundError, OSError: the input is not there, is damaged or dangerous; the output cannot be written.
        ValueError: the input is no known checkpoint or not whole, options contradict it, or something must be said that it does not tell.
    """
    target = Path(options.output)
    _check_output(target, options)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    max_bytes = parse_bytes(options.max_shard_size)
    found = _understand(options, dtype)
    output = _planned(found, options, dtype)
    is_file = target.suffix in _FILES
    if is_file and len(output.weights) != 1:
        raise ValueError(f"{target} names a file, but the result is several: name a folder.")
    parent = next(folder for folder in target.resolve().parents if folder.is_dir())
    output.check_space(parent)
    proof: list[str] = []
    try:
        if is_file:
            with atomic_path(target) as partial:
                single = replace(output.weights[0], place=partial.name, stem=None)
                Output([single]).write(partial.parent, max_bytes)
                proof = verify(found.parts, found.lora, partial, found.hints) if options.verify else []
        else:
            with atomic_folder(target) as partial:
                output.write(partial, max_bytes)
                proof = verify(found.parts, found.lora, partial, found.hints) if options.verify else []
    except OSError as error:
        raise OSError(f"nothing was written to {target}: {error}") from error
    return "\n".join([*_report(found, output, target), *proof])


def _check_output(target: Path, options: ConvertOptions) -> None:
    """Refuse an output that exists, that is the input, or that is not the work of a conversion."""
    source = Path(options.input).resolve()
    here = target.resolve()
    if here == source or here in source.parents or (source.is_dir() and source in here.parents):
        raise ValueError(f"the output {target} and the input {options.input} lie within each other: choose another place.")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not options.overwrite:
        raise FileExistsError(f"{target} exists already: pass --overwrite to replace it, or choose another place.")
    entries = list(target.iterdir()) if target.is_dir() else []
    if strange := [entry.name for entry in entries if entry.name not in _PARTS and entry.suffix not in (".safetensors", ".json")]:
        raise FileExistsError(
            f"{target} holds other things than a model ({listed(strange)}), so it is not replaced: delete it, or choose another place."
        )


def _understand(options: ConvertOptions, dtype: torch.dtype | None) -> _Understood:
    source = open_source(Path(options.input), trusted=options.trust_pickle)
    hints = hints_for(source, options.like)
    if options.only and options.only not in source.groups:
        raise ValueError(f"--only {options.only}: {source.path} holds only {', '.join(source.groups)}.")
    parts, notes = parts_of(source, hints)  # the transformer is needed for the VAE's scale, even if only the VAE is written
    chosen = {kind: group for kind, group in source.groups.items() if options.only in (None, kind)}
    source, parts = replace(source, groups=chosen), {name: part for name, part in parts.items() if name in chosen}
    lora = lora_of(chosen["lora"], hints.configs.get("lora"), options.lora_alpha) if "lora" in chosen else None
    if "text_encoder" in chosen:
        notes.append(f"left out: {len(chosen['text_encoder'].tensors)} tensors of the text encoder, which has a folder of its own")
    if not parts and lora is None:
        raise ValueError(f"{source.path} holds only a text encoder: it needs no conversion.")
    if lora is None and (options.merge_lora or options.lora_alpha is not None):
        raise ValueError(f"--{'merge-lora' if options.merge_lora else 'lora-alpha'} has no effect: {source.path} holds no LoRA.")
    if options.merge_lora and lora is not None:
        if "transformer" not in parts:
            raise ValueError(f"--merge-lora needs a transformer to merge with, but {source.path} holds only the LoRA.")
        parts["transformer"], lora = merged(parts["transformer"], lora), None
    parts = {name: in_dtype(part, dtype) for name, part in parts.items()}
    return _Understood(source, hints, parts, lora, _target(options, source), notes)


def _target(options: ConvertOptions, source: Source) -> str:
    target = options.to or ("sat" if source.is_diffusers_folder else "diffusers")
    if target == "sat" and all(group.layout == "sat" for kind, group in source.groups.items() if kind != "text_encoder"):
        raise ValueError(f"{source.path} is a checkpoint of the original code already: leave out --to sat.")
    return target


def _planned(found: _Understood, options: ConvertOptions, dtype: torch.dtype | None) -> Output:
    """All files of the result."""
    output = (_sat if found.target == "sat" else _diffusers)(found, options, dtype)
    output.notes += found.notes
    return output


def _text_folders(found: _Understood, options: ConvertOptions) -> tuple[Path, Path] | None:
    if options.text_encoder is not None:
        if len(found.parts) < 2:
            raise ValueError(f"--text-encoder has no effect: without transformer and VAE, {found.source.path} makes no pipeline.")
        return find_text_encoder(options.text_encoder)
    return found.source.text_encoder


def _diffusers(found: _Understood, options: ConvertOptions, dtype: torch.dtype | None) -> Output:
    text = _text_folders(found, options)
    if len(found.parts) == 2:
        if text is None:
            raise ValueError(
                f"{found.source.path} holds a transformer and a VAE, but no text encoder, which a pipeline needs: pass --text-encoder "
                "with its folder or repository (google/t5-v1_1-xxl), or convert one of them with --only transformer or --only vae."
            )
        index = found.source.path / "model_index.json"
        named = to_diffusers.class_named_in(index) if index.is_file() else None
        name = pipeline_class(found.parts["transformer"], found.hints, named)
        output = to_diffusers.pipeline(found.parts, text, name, found.hints.configs.get("scheduler"), found.hints.family, dtype)
    elif found.parts:
        output = to_diffusers.component(next(iter(found.parts.values())))
    else:
        output = Output()
    if found.lora is not None:
        output.weights.append(diffusers_lora(found.lora, "lora/" if found.parts else "", dtype))
    return output


def _sat(found: _Understood, options: ConvertOptions, dtype: torch.dtype | None) -> Output:
    if found.lora is not None and found.parts:
        raise ValueError(
            f"{found.source.path} holds a transformer and a LoRA: choose with --only transformer, --only lora or --merge-lora."
        )
    output = to_sat.lora(found.lora, dtype) if found.lora is not None else Output()
    configs = {name: part.config for name, part in found.parts.items()}
    if found.lora is not None:
        configs["lora"] = to_sat.sat_lora_config(found.lora)
    whole = len(found.parts) == 2
    for name, part in found.parts.items():
        output += (to_sat.transformer if name == "transformer" else to_sat.vae)(part, f"{name}/" if whole else "")
    if whole and (text := _text_folders(found, options)) is not None:
        output += to_sat.text_encoder(text, dtype)
    if whole and "scheduler" in found.hints.configs:
        configs["scheduler"] = dict(found.hints.configs["scheduler"])
    output.texts |= to_sat.configs_file(configs)
    return output


def _report(found: _Understood, output: Output, target: Path) -> list[str]:
    """What was found, what was left out, what was written."""
    lines = [_described(name, part) for name, part in found.parts.items()]
    if found.lora is not None:
        layers = found.lora.layers.values()
        ranks, alphas = ({getattr(layer, key) for layer in layers} for key in ("rank", "alpha"))
        lines.append(
            f"lora: layout {found.lora.layout.name}, {len(found.lora.layers)} layers, rank {', '.join(map(str, sorted(ranks)))}, "
            f"alpha {', '.join(f'{alpha:g}' for alpha in sorted(alphas))}"
        )
    return [*lines, *output.notes, f"written for {_NAMES[found.target]}: {target} ({output.nbytes / 1e9:.3g} GB)"]


def _described(name: str, part: Part) -> str:
    preset = match_preset(part.config) if name == "transformer" else None
    kind = f", CogVideoX {preset.name}" if preset else ", of no released size" if name == "transformer" else ""
    precision = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in part.dtypes))
    left = "".join(f"; left out: {reason} ({count})" for reason, count in Counter(part.left_out.values()).items())
    return f"{name}: {len(part.tensors)} tensors, names of {_NAMES[part.group.layout]}{kind}, written in {precision}{left}"
