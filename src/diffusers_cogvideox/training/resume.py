"""A run goes on only with the settings that it was begun with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import atomic_path
from .config import Stage, TrainConfig

__all__ = ["check_resumed", "checkpoints", "write_config"]

_CONFIG = "config.json"
_FREE = ("output", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_prompts")  # the trained weights do not depend on these


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def write_config(config: TrainConfig) -> None:
    """Write the resolved configuration into the run folder."""
    with atomic_path(Path(config.output) / _CONFIG) as partial:
        partial.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf8")


def check_resumed(config: TrainConfig) -> None:
    """Raise ValueError when the run folder holds checkpoints of a run with other settings, naming those that differ.

    What only says how a run is watched may differ. Settings that an older version did not have count as left at their defaults.
    """
    folder = Path(config.output)
    file = folder / _CONFIG
    if not file.is_file() or not checkpoints(folder):
        return
    try:
        begun = dict(_flat(json.loads(file.read_text(encoding="utf8"))))
    except ValueError as error:
        raise ValueError(f"{file} is not what a run wrote there ({error}): restore it, or choose another output.") from error
    defaults = dict(_flat(asdict(TrainConfig(task=config.task, output="", model={}, stages=[Stage(steps=1, batch_size=1)]))))
    before, now = defaults | begun, json.loads(json.dumps(dict(_flat(asdict(config)))))
    names = [name for name in sorted({*before, *now}) if name not in _FREE and before.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)}, now {now.get(name)}" for name in names)
        raise ValueError(
            f"the run in {folder} was begun with other settings: {changes}. Restore them to go on, or choose another output, where "
            f"init_from: {folder / 'final'} starts from what this run has learned."
        )


def _flat(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of all settings, those of DataOptions and Optimisation as "data.seed"."""
    for name, value in config.items():
        if name in ("data", "optimisation"):
            yield from ((f"{name}.{inner}", given) for inner, given in value.items())
        else:
            yield name, value
