"""The training loop: steps, averaged weights, metrics, checkpoints, and exact resume, on `accelerate`."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from .config import Optimisation, TrainConfig
from .objectives import Objective
from .optimizers import build_optimizers
from .processes import Share, process_state
from .resume import check_resumed, checkpoints, write_config

__all__ = ["Task", "run"]

logger = logging.getLogger(__name__)

Checkpoint = Callable[[int, nn.Module], None]
"""(step, model with its averaged weights in place): called after each checkpoint, e.g. to evaluate."""


class Task(Protocol):
    """What differs between tasks: the objective with the model in it, its batches, and how its model is saved."""

    objective: Objective

    def batch(self, step: int, share: Share) -> dict[str, Any]:
        """Keyword arguments of the objective for optimiser step `step`: this process's share of a batch that depends on the step and
        the seed only."""

    def metrics(self, batch: Mapping[str, Any], result: Mapping[str, Tensor]) -> dict[str, float]:
        """Extra figures for the log."""

    def save(self, folder: Path) -> None:
        """Write the model, its averaged weights in place, with whatever belongs to it."""


def learning_rate_factor(step: int, total: int, options: Optimisation) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, then half a cosine down to `final_learning_rate`."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, total - options.warmup_steps)
    return options.final_learning_rate + (1 - options.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def run(config: TrainConfig, task: Task, on_checkpoint: Checkpoint | None = None) -> Path:
    """Train until the last stage is done, resuming from the newest checkpoint in the run folder. Returns <output>/final.

    Ctrl-C saves a checkpoint before it stops; the same call then goes on exactly where it was.

    Raises:
        FloatingPointError: the gradients became infinite or NaN.
        ValueError: a batch cannot be split evenly over the processes, or the run was begun with other settings.
    """
    folder = Path(config.output)
    check_resumed(config)
    training = _Training(config, task, folder)
    if training.is_main:
        write_config(config)
    bar = tqdm(total=config.total_steps, initial=training.done, desc=config.task, mininterval=5, disable=not training.is_main)
    try:
        with bar, _Log(folder / "metrics.jsonl", config.log_every, training.is_main) as log:
            while training.done < config.total_steps:
                with _uninterrupted():
                    log.add(training.step(), training.done, training.learning_rate)
                bar.update()
                if training.done % config.checkpoint_every == 0 or training.done == config.total_steps:
                    training.save(config.keep_checkpoints)
                    if on_checkpoint is not None:
                        training.show(on_checkpoint)
    except KeyboardInterrupt:
        training.save(config.keep_checkpoints)
        logger.warning("stopped at step %d of %d; start the same command again to go on", training.done, config.total_steps)
        raise
    if training.is_main:
        with training.averaged():
            task.save(folder / "final")
    return folder / "final"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Make Ctrl-C and SIGTERM wait for the end of the block: what a step that was cut short leaves behind cannot be resumed exactly."""
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals nowhere else
        yield
        return
    came: list[int] = []
    before = {name: signal.signal(name, lambda number, _: came.append(number)) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler or signal.SIG_DFL)
    for number in came[:1]:
        signal.raise_signal(number)


class _Training:
    """Everything that changes from step to step, and that a checkpoint therefore keeps."""

    def __init__(self, config: TrainConfig, task: Task, folder: Path) -> None:
        AcceleratorState._reset_state()  # accelerate allows one precision per process; a process may train several models in turn
        process_state()
        # Schedules count optimiser steps; accelerate would advance them once for every process.
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision, step_scheduler_with_optimizer=False)
        self.share = Share.current()
        for stage in config.stages:
            self.share.of(stage.batch_size)
        set_seed(config.seed, device_specific=True)  # noise inside an objective differs between processes
        self.task, self.folder, self.options = task, folder, config.optimisation
        self.model = task.objective.model
        task.objective.to(self.accelerator.device)
        optimizers = build_optimizers(self.model, self.options)
        schedules = [LambdaLR(o, lambda step: learning_rate_factor(step, config.total_steps, self.options)) for o in optimizers]
        self.ema = EMAModel(self.model.parameters(), decay=self.options.ema_decay)
        self.objective, *self.updates = self.accelerator.prepare(task.objective, *optimizers, *schedules)
        self.schedule = schedules[0]
        self.done = 0  # optimiser steps
        self.accelerator.register_for_checkpointing(self.ema, self)
        if existing := checkpoints(folder):
            logger.info("resuming from %s", existing[-1])
            self.accelerator.load_state(str(existing[-1]))
        if config.compile:
            self.objective = torch.compile(self.objective)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.accelerator.is_main_process

    @property
    def learning_rate(self) -> float:
        """Of AdamW, at the next step."""
        return float(self.schedule.get_last_lr()[0])

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps beside weights, optimisers, averages and random states."""
        return {"step": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a checkpoint."""
        self.done = state["step"]

    def step(self) -> dict[str, float]:
        """One optimiser step; returns its figures."""
        batch = self.task.batch(self.done, self.share)
        result = self.objective(**send_to_device(batch, self.accelerator.device))
        self.accelerator.backward(result["loss"])
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm at step {self.done} is {float(norm)}: lower learning_rate={self.options.learning_rate} "
                f"or start again from the last checkpoint in {self.folder}"
            )
        for update in self.updates:  # optimisers, then their schedules
            update.step()
        self.model.zero_grad()
        self.ema.step(self.model.parameters())
        self.done += 1
        loss = self.accelerator.reduce(result["loss"].detach(), "mean")
        return {"loss": float(loss), "grad_norm": float(norm), **self.task.metrics(batch, result)}

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its averaged weights, for the length of a with-block."""
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        try:
            yield self.model
        finally:
            self.ema.restore(self.model.parameters())

    def show(self, on_checkpoint: Checkpoint) -> None:
        """Hand the averaged model to the callback, in the main process, while the others wait."""
        if self.is_main:
            with self.averaged() as model:
                model.eval()
                on_checkpoint(self.done, model)
                model.train()
        self.accelerator.wait_for_everyone()

    def save(self, keep: int) -> None:
        """Write checkpoint-<step>, under another name first, so that an interrupted write is never taken for a checkpoint."""
        partial, target = self.folder / f"partial-{self.done}", self.folder / f"checkpoint-{self.done}"
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()  # every process writes its random state
        if self.is_main:
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            for old in checkpoints(self.folder)[:-keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


class _Log:
    """metrics.jsonl: one line every few steps with the means since the line before.

    Of several processes only the main one writes: the loss and the gradient norm are of the whole batch, other figures of its share.
    """

    def __init__(self, path: Path, every: int, is_main: bool) -> None:
        self.file = path.open("a", encoding="utf8") if is_main else io.StringIO()
        self.every = every
        self.sums: dict[str, list[float]] = {}
        self.state: dict[str, float] = {}
        self.started = time.monotonic()

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self.file.close()

    def add(self, values: Mapping[str, float], step: int, learning_rate: float) -> None:
        """Take in the figures of one step; write a line when it is due, and at the end."""
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value)
        self.state = {"step": step, "lr": learning_rate, "seconds": round(time.monotonic() - self.started, 1)}
        if step % self.every == 0:
            self._write()

    def _write(self) -> None:
        if self.sums:
            line = {name: round(sum(v) / len(v), 6) for name, v in self.sums.items()}
            self.file.write(json.dumps(line | self.state) + "\n")
            self.file.flush()
            self.sums.clear()
