"""A run goes on only with the settings that it was begun with, and with the same models beside the one that it trains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..files import atomic_path, sha256
from .config import Stage, TrainConfig

__all__ = ["check_resumed", "checkpoints", "write_config"]

_CONFIG = "config.json"
_PARTS = "parts.json"
_FREE = ("output", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_prompts")  # the trained weights do not depend on these


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def write_config(config: TrainConfig) -> None:
    """Write the resolved configuration into the run folder, and hashes of the models that it names."""
    for name, content in ((_CONFIG, asdict(config)), (_PARTS, _hashes(config))):
        with atomic_path(Path(config.output) / name) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")


def check_resumed(config: TrainConfig) -> None:
    """Raise ValueError when the run folder holds checkpoints of a run with other settings or models, naming those that differ.

    What only says how a run is watched may differ. Settings that an older version did not have count as left at their defaults, and
    models of which it took no note as those that are there now.
    """
    folder = Path(config.output)
    file = folder / _CONFIG
    if not file.is_file() or not checkpoints(folder):
        return
    begun = dict(_flat(_read(file)))
    defaults = dict(_flat(asdict(TrainConfig(task=config.task, output="", model={}, stages=[Stage(steps=1, batch_size=1)]))))
    before, now = defaults | begun, json.loads(json.dumps(dict(_flat(asdict(config)))))
    names = [name for name in sorted({*before, *now}) if name not in _FREE and before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in names)
        raise ValueError(f"the run in {folder} was begun with other settings: {changes}. Restore them to go on, {_instead(folder)}")
    _check_parts(config, folder)


def _check_parts(config: TrainConfig, folder: Path) -> None:
    """Raise ValueError when a model that the run reads is no longer the one that it was begun with, whatever its folder is called."""
    known = _read(folder / _PARTS) if (folder / _PARTS).is_file() else {}
    now = _hashes(config) if known else {}
    for name, before in known.items():
        if now.get(name) != before:
            raise ValueError(
                f"the run in {folder} was begun with another {name}: the files in {getattr(config, name)} have changed since (SHA-256 "
                f"{before[:9]}..., now {now.get(name, 'none')[:9]}...). Bring them back to go on, {_instead(folder)}"
            )


def _instead(folder: Path) -> str:
    return f"or choose another output, where init_from: {folder / 'final'} starts from what this run has learned."


def _hashes(config: TrainConfig) -> dict[str, str]:
    """SHA-256 of the folder of each model that the run reads, by the setting that names it."""
    folders = {name: Path(given) for name in ("vae", "text_encoder") if (given := getattr(config, name)) is not None}
    return {name: _hash(tuple(map(_state, sorted(folder.rglob("*"))))) for name, folder in folders.items()}


@lru_cache
def _hash(states: tuple[tuple[Path, int, int], ...]) -> str:
    """SHA-256 of files; a text encoder takes a while to read, and is asked for before and after it is loaded."""
    return sha256(path for path, *_ in states if path.is_file())


def _state(path: Path) -> tuple[Path, int, int]:
    found = path.stat()
    return path, found.st_mtime_ns, found.st_size


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not what a run wrote there ({error}): restore it, or choose another output.") from error


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of all settings, those of DataOptions and Optimisation as "data.seed"."""
    for name, value in config.items():
        if name in ("data", "optimisation"):
            yield from ((f"{name}.{inner}", given) for inner, given in value.items())
        else:
            yield name, value
