"""The training loop: steps, averaged weights, metrics, checkpoints, and exact resume, on `accelerate`."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from .config import Optimisation, TrainConfig
from .optimizers import build_optimizers

__all__ = ["Task", "run"]

logger = logging.getLogger(__name__)

Checkpoint = Callable[[int, nn.Module], None]


class Task(Protocol):
    """What differs between tasks: the objective with the model in it, its batches, and how its model is saved."""

    objective: nn.Module

    def batch(self, step: int) -> dict[str, Any]:
        """Keyword arguments of the objective for optimiser step `step`; depends on the step and the seed only."""

    def metrics(self, batch: Mapping[str, Any], result: Mapping[str, Tensor]) -> dict[str, float]:
        """Extra figures for the log."""

    def save(self, folder: Path) -> None:
        """Write the model, its averaged weights in place, with whatever belongs to it."""


class _Progress:
    """The step counter, in the form that accelerate saves with a checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def learning_rate_factor(step: int, total: int, options: Optimisation) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then half a cosine down to `final_learning_rate`."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, total - options.warmup_steps)
    return options.final_learning_rate + (1 - options.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def run(config: TrainConfig, task: Task, on_checkpoint: Checkpoint | None = None) -> Path:
    """Train until the last stage is done, resuming from the newest checkpoint in the run folder. Returns <output>/final.

    Ctrl-C saves a checkpoint before it stops. `on_checkpoint(step, averaged model)` may evaluate.
    """
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf8")
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    set_seed(config.seed)
    options = config.optimisation
    model = task.objective.model
    task.objective.to(accelerator.device)
    optimizers = build_optimizers(model, options)
    schedules = [LambdaLR(o, lambda step: learning_rate_factor(step, config.total_steps, options)) for o in optimizers]
    ema = EMAModel(model.parameters(), decay=options.ema_decay)
    progress = _Progress()
    objective, *prepared = accelerator.prepare(task.objective, *optimizers, *schedules)
    accelerator.register_for_checkpointing(ema, progress)
    _resume(accelerator, folder)
    forward = torch.compile(objective) if config.compile else objective

    log = _Log(folder / "metrics.jsonl", config.log_every)
    bar = tqdm(total=config.total_steps, initial=progress.step, desc=config.task, mininterval=5, disable=not accelerator.is_main_process)
    try:
        while progress.step < config.total_steps:
            batch = task.batch(progress.step)
            result = forward(**batch)
            accelerator.backward(result["loss"])
            norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient norm at step {progress.step} is {float(norm)}: lower learning_rate={options.learning_rate} "
                    f"or start again from the last checkpoint in {folder}"
                )
            for part in prepared:  # optimisers, then their schedules
                part.step()
            model.zero_grad()
            ema.step(model.parameters())
            progress.step += 1
            bar.update()
            log.add(progress.step, {"loss": result["loss"], "grad_norm": norm}, task.metrics(batch, result), schedules[0])
            if progress.step % config.checkpoint_every == 0 or progress.step == config.total_steps:
                _save(accelerator, folder, progress.step, config.keep_checkpoints)
                if on_checkpoint is not None:
                    _with_averaged_weights(ema, model, lambda: on_checkpoint(progress.step, model))
    except KeyboardInterrupt:
        _save(accelerator, folder, progress.step, config.keep_checkpoints)
        logger.warning("stopped at step %d of %d; start the same command again to go on", progress.step, config.total_steps)
        raise
    finally:
        bar.close()
        log.close()
    final = folder / "final"
    if accelerator.is_main_process:
        _with_averaged_weights(ema, model, lambda: task.save(final))
    return final


def _with_averaged_weights(ema: EMAModel, model: nn.Module, action: Callable[[], None]) -> None:
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    try:
        action()
    finally:
        ema.restore(model.parameters())


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoint folders, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


def _resume(accelerator: Accelerator, folder: Path) -> None:
    if existing := _checkpoints(folder):
        logger.info("resuming from %s", existing[-1])
        accelerator.load_state(str(existing[-1]))


def _save(accelerator: Accelerator, folder: Path, step: int, keep: int) -> None:
    """Write checkpoint-<step> under another name first, so that an interrupted write is never taken for a checkpoint."""
    partial = folder / f"partial-{step}"
    accelerator.save_state(str(partial))
    if not accelerator.is_main_process:
        return
    target = folder / f"checkpoint-{step}"
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)


class _Log:
    """metrics.jsonl: one line every few steps with the means since the line before."""

    def __init__(self, path: Path, every: int) -> None:
        self.file = path.open("a", encoding="utf8")
        self.every = every
        self.sums: dict[str, list[float]] = {}
        self.started = time.monotonic()

    def add(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, float], schedule: Any) -> None:
        values = {name: float(value.detach()) for name, value in tensors.items()} | dict(extra)
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value)
        if step % self.every == 0:
            line = {name: round(sum(v) / len(v), 6) for name, v in self.sums.items()}
            line |= {"step": step, "lr": schedule.get_last_lr()[0], "seconds": round(time.monotonic() - self.started, 1)}
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            self.sums.clear()

    def close(self) -> None:
        self.file.close()
