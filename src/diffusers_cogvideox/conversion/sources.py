"""Where checkpoints are kept: files and folders of every kind, opened as named tensors, with the configs that stand beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoints.lazy import LazyTensor, lazily
from ..checkpoints.reading import LATEST, SAT_MODEL_FILE, inside, is_gguf, newest, read_content, read_tensors
from ..checkpoints.zero import merge
from ..pipelines.folder import INDEX, check_folder, read_json
from ..pipelines.lora_files import find_lora_file
from .detect import Group, Kind, sort_tensors
from .gguf import read_gguf

__all__ = ["SAT_CONFIGS", "Source", "open_source"]

SAT_CONFIGS = "diffusers_configs.json"
"""A file beside checkpoints that were converted to SAT: what diffusers' configs say and tensors do not tell."""

_WEIGHTS = (".safetensors", ".pt", ".bin", ".ckpt", ".pth", ".gguf")
_CLASSES: dict[str, Kind] = {"CogVideoXTransformer3DModel": "transformer", "AutoencoderKLCogVideoX": "vae"}


@dataclass(frozen=True)
class Source:
    """What a file or folder holds.

    Args:
        path: the file or folder.
        groups: the models in it.
        configs: by component, where they are known: transformer, vae, scheduler, and lora (r, lora_alpha).
        text_encoder: folders with the text encoder and the tokenizer; the same one where SAT keeps both together.
        is_diffusers_folder: whether it is a folder that `from_pretrained` loads.
    """

    path: Path
    groups: Mapping[Kind, Group]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text_encoder: tuple[Path, Path] | None = None
    is_diffusers_folder: bool = False


def open_source(path: Path, *, trusted: bool = False) -> Source:
    """Find and open the tensors of a checkpoint. Values are mapped from disk, not read.

    Args:
        path: a weight file; a folder of SAT or DeepSpeed (with `latest` or without); a release folder of SAT with transformer/ and
            vae/; a folder that `from_pretrained` loads; or a folder with one weight file.
        trusted: run the code in pickles that need it.

    Raises:
        FileNotFoundError: there is nothing, or nothing that is known.
        OSError: a file is damaged, dangerous, or something else than weights.
        ValueError: tensors that belong to no known layout.
    """
    if path.is_file():
        return Source(path, _of_file(path, trusted), _saved_configs(path.parent))
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}.")
    if (path / INDEX).is_file():
        return _pipeline(path)
    if (path / "config.json").is_file() and (kind := _CLASSES.get(read_json(path / "config.json").get("_class_name", ""))):
        return Source(path, _component(path, kind), {kind: read_json(path / "config.json")}, is_diffusers_folder=True)
    if (path / LATEST).is_file() or _is_training_folder(path):
        return Source(path, _training(path, trusted), _saved_configs(path))
    if (path / "transformer").is_dir() or (path / "vae").is_dir():
        return _release(path, trusted)
    if (path / "adapter_config.json").is_file():
        file = find_lora_file(path)
        return Source(path, _of_file(file, trusted), {"lora": read_json(path / "adapter_config.json")})
    return Source(path, _of_files(_only_weights(path), path, trusted), _saved_configs(path))


def _saved_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configs that were written when this was converted to SAT: here, or up to two folders above (`transformer/1/`)."""
    places = [folder, *folder.resolve().parents[:2]]
    return next((read_json(place / SAT_CONFIGS) for place in places if (place / SAT_CONFIGS).is_file()), {})


# --- files --------------------------------------------------------------------------------------------------------------


def _of_file(path: Path, trusted: bool) -> dict[Kind, Group]:
    if is_gguf(path):
        return sort_tensors(read_gguf(path), str(path))
    tensors, header = read_tensors(path, trusted=trusted)
    return sort_tensors(lazily(tensors), str(path), header)


def _of_files(files: list[Path], folder: Path, trusted: bool) -> dict[Kind, Group]:
    """Several shards of one checkpoint."""
    if len(files) == 1:
        return _of_file(files[0], trusted)
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        tensors |= lazily(read_tensors(file, trusted=trusted)[0])
    return sort_tensors(tensors, str(folder))


def _only_weights(folder: Path) -> list[Path]:
    """The weight files of a folder: those that an index names, or the only one.

    Raises:
        FileNotFoundError: there is none, several of which none is chosen, or shards are missing.
    """
    if indices := sorted(folder.glob("*.index.json")):
        return _shards(indices[0])
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    if len(files) == 1:
        return files
    found = f"{len(files)} weight files ({', '.join(file.name for file in files[:6])}): name one of them" if files else "no weight file"
    raise FileNotFoundError(
        f"{folder} holds {found}. Known are files of weights; folders with `{LATEST}`; folders with transformer/ and vae/; and folders "
        "that diffusers loads."
    )


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    files = [inside(index.parent, name, index) for name in names]
    if absent := [file.name for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(absent)} of {len(names)} weight files that {index.name} names.")
    return files


# --- folders of diffusers -----------------------------------------------------------------------------------------------


def _component(folder: Path, kind: Kind) -> dict[Kind, Group]:
    groups = _of_files(_only_weights(folder), folder, trusted=False)
    if kind not in groups:
        raise ValueError(f"{folder} holds no tensors of a {kind}, although its config.json says so.")
    return {kind: groups[kind]}


def _pipeline(folder: Path) -> Source:
    check_folder(folder)
    entries = read_json(folder / INDEX)
    groups: dict[Kind, Group] = {}
    configs: dict[str, dict[str, Any]] = {}
    for name, kind in (("transformer", "transformer"), ("vae", "vae")):
        if (folder / name / "config.json").is_file():
            groups |= _component(folder / name, kind)  # type: ignore[arg-type]
            configs[name] = read_json(folder / name / "config.json")
    if not groups:
        raise ValueError(f"{folder} is a pipeline ({entries.get('_class_name')}) without the transformer and the VAE of CogVideoX.")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    configs |= {"scheduler": read_json(scheduler)} if scheduler.is_file() else {}
    text = (folder / "text_encoder", folder / "tokenizer")
    return Source(folder, groups, configs, text if all(place.is_dir() for place in text) else None, is_diffusers_folder=True)


# --- folders of SAT and DeepSpeed ---------------------------------------------------------------------------------------


def _release(folder: Path, trusted: bool) -> Source:
    """transformer/, vae/ and a folder of the text encoder, as the weights of the original code are published."""
    groups: dict[Kind, Group] = {}
    for name in ("transformer", "vae"):
        if (folder / name).is_dir():
            groups |= open_source(folder / name, trusted=trusted).groups
    text = next((place for place in sorted(folder.iterdir()) if _is_text_encoder(place)), None)
    return Source(folder, groups, _saved_configs(folder), (text, text) if text else None)


def _is_text_encoder(folder: Path) -> bool:
    config = folder / "config.json"
    return folder.is_dir() and config.is_file() and read_json(config).get("model_type") == "t5"


def _training_files(folder: Path) -> Iterator[Path]:
    for pattern in ("mp_rank_*_model_states.pt", "zero_pp_rank_*_model_states.pt", "z3_rank_*_model_states.pt"):
        yield from sorted(folder.glob(pattern), key=_ranks)


def _is_training_folder(folder: Path) -> bool:
    return any(_training_files(folder))


def _ranks(file: Path) -> list[int]:
    """The numbers in a file name: 10 comes after 9."""
    return [int(word) for word in file.name.replace(".", "_").split("_") if word.isdigit()]


def _training(folder: Path, trusted: bool) -> dict[Kind, Group]:
    """A checkpoint of SAT, of DeepSpeed, or of both."""
    folder = newest(folder) or folder
    models, optimizers = list(_training_files(folder)), sorted(folder.glob("*_optim_states.pt"), key=_ranks)
    if not models:
        raise FileNotFoundError(f"{folder} holds no {SAT_MODEL_FILE} and no files of ZeRO stage 3.")
    if sum(file.name.startswith("mp_rank_") for file in models) > 1:
        raise ValueError(f"{folder} was saved by a tensor-parallel model in {len(models)} parts. Merge them with the original code first.")
    if optimizers:
        return sort_tensors(_merged(folder, models, optimizers, trusted), str(folder))
    if models[0].name.startswith("zero_pp_rank_"):
        raise FileNotFoundError(f"{folder} lacks the *_optim_states.pt files, in which ZeRO stage 3 keeps the weights.")
    return _same_for_all_ranks(models, trusted)


def _merged(folder: Path, models: list[Path], optimizers: list[Path], trusted: bool) -> dict[str, LazyTensor]:
    try:
        return merge(*([read_content(file, trusted=trusted) for file in files] for files in (models, optimizers)))
    except ValueError as error:
        raise ValueError(f"{folder} cannot be put together from the files of its ranks: {error}.") from error


def _same_for_all_ranks(models: list[Path], trusted: bool) -> dict[Kind, Group]:
    """The tensors of the only rank, or of several that each hold the whole model or whole tensors of it."""
    tensors: dict[str, LazyTensor] = {}
    for file in models:
        for name, tensor in lazily(read_tensors(file, trusted=trusted)[0]).items():
            if name in tensors and not tensors[name].make().equal(tensor.make()):
                raise ValueError(f"{file} holds a part of {name}, and nothing says how the parts of the ranks belong together.")
            tensors[name] = tensor
    return sort_tensors(tensors, str(models[0] if len(models) == 1 else models[0].parent))
