"""A call of a pipeline that can be interrupted: the loop's state on disk every few steps, put back when the same call is made again."""

from __future__ import annotations

import os
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import atomic_path

__all__ = ["Journal", "LoopState"]

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class LoopState:
    """All that the rest of a denoise loop depends on, after `steps` of the `timesteps` (N,).

    `latents` (B, F, C, H, W); `history`, what the scheduler keeps of earlier steps; `generators`, the state of each source of noise.
    """

    steps: int
    timesteps: Tensor
    latents: Tensor
    history: dict[str, Tensor]
    generators: list[Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors."""
        named = {"steps": torch.tensor(self.steps), "timesteps": self.timesteps, "latents": self.latents}
        named |= {f"history.{name}": tensor for name, tensor in self.history.items()}
        return named | {f"generator.{number}": state for number, state in enumerate(self.generators)}

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor]) -> LoopState:
        """The inverse of `tensors`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}

        states = part("generator.")
        ordered = [states[str(number)] for number in range(len(states))]
        return cls(int(named["steps"]), named["timesteps"], named["latents"], part("history."), ordered)


class Journal:
    """Saves the state of a call's denoise loops, and lets the same call go on from it: the video is the same to the bit.

    Hand one to `__call__(..., journal=...)`. When the file exists already, the loops that it knows leave out the steps that were done.
    What a callback changed besides the latents is not part of the state. Keep calling with the same arguments and seed. Of several ranks,
    one keeps the journal and hands the others copies (`for_reading`).

    Args:
        path: safetensors file; written whole or not at all.
        every: steps between two saves; None saves only when `save` is called.
        identity: which call this is, in words of the caller's own.

    Raises:
        ValueError: for a file of another identity, and for `every` below 1.
        OSError: for a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str], every: int | None = 10, identity: str = "") -> None:
        if every is not None and every < 1:
            raise ValueError(f"every={every} is not possible: save every step (1) or less often.")
        self.path = Path(path)
        self._every, self._identity = every, identity
        self._states = self._read() if self.path.exists() else []
        self._loop = -1  # the loop that runs: a call may have several, one after the other

    @property
    def progress(self) -> str:
        """How far the call is, such as "step 12 of 50"; of several loops, the last."""
        if not self._states:
            return "the start"
        state = self._states[-1]
        return f"step {state.steps} of {len(state.timesteps)}" + (f" of part {len(self._states)}" if len(self._states) > 1 else "")

    def for_reading(self) -> Journal:
        """A copy that never writes, for a process that makes the same call as the one which keeps the journal."""
        made = copy(self)
        made._states, made._every = list(self._states), None
        return made

    # --- called by the denoise loop ---------------------------------------------------------------------------------------

    def enter(self, pipe: Any, timesteps: Tensor, generator: Generators, tensors: dict[str, Any]) -> int:
        """Put the state of this loop back into scheduler, generators and `tensors`; returns how many steps to leave out.

        Raises:
            ValueError: when the call cannot be resumed exactly, or is not the one that was saved.
        """
        self._check_resumable(pipe, generator)
        self._loop += 1
        if self._loop >= len(self._states):
            return 0
        state, latents = self._states[self._loop], tensors["latents"]
        sources = _as_list(generator)
        if (*latents.shape, len(sources)) != (*state.latents.shape, len(state.generators)) or not torch.equal(
            state.timesteps, timesteps.cpu()
        ):
            raise ValueError(
                f"{self.path} was saved by another call, with latents {tuple(state.latents.shape)} and {len(state.timesteps)} steps, not "
                f"{tuple(latents.shape)} and {len(timesteps)}: repeat that call, or delete the file."
            )
        tensors["latents"] = state.latents.to(latents)
        pipe.scheduler.load_history({name: tensor.to(latents.device) for name, tensor in state.history.items()})
        for source, known in zip(sources, state.generators, strict=True):
            source.set_state(known)
        return state.steps

    def record(self, steps: int, pipe: Any, timesteps: Tensor, generator: Generators, latents: Tensor) -> None:
        """Note the state after a step, and save it when that is due."""
        states = [source.get_state() for source in _as_list(generator)]
        state = LoopState(steps, timesteps.cpu(), latents, pipe.scheduler.history(), states)
        self._states[self._loop :] = [state]
        if self._every is not None and steps % self._every == 0:
            self.save()

    def _check_resumable(self, pipe: Any, generator: Generators) -> None:
        if generator is None:
            raise ValueError("A call with a journal needs generator=...: PyTorch's global random state is not saved.")
        if not hasattr(pipe.scheduler, "load_history"):
            raise ValueError(
                f"A call with a journal needs a scheduler whose history can be saved, which {type(pipe.scheduler).__name__} is not: use "
                "diffusers_cogvideox.CogVideoXDDIMScheduler or CogVideoXDPMScheduler."
            )
        if getattr(pipe.transformer, "is_cache_enabled", False):
            raise ValueError(
                "A call with a journal cannot use a feature cache, which has a state of its own: pipe.transformer.disable_cache()."
            )

    # --- the file -----------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write what is known now. Before the first step that is nothing."""
        named = {f"{loop}.{name}": tensor for loop, state in enumerate(self._states) for name, tensor in state.tensors().items()}
        if named:
            with atomic_path(self.path) as partial:
                save_file({name: tensor.clone() for name, tensor in named.items()}, partial, {"identity": self._identity})

    def remove(self) -> None:
        """Delete the file: the call is finished, or shall start anew."""
        self.path.unlink(missing_ok=True)
        self._states, self._loop = [], -1

    def _read(self) -> list[LoopState]:
        try:
            with safe_open(self.path, "pt") as file:
                identity = (file.metadata() or {}).get("identity")
                named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError as error:
            raise self._damaged(error) from error
        if identity != self._identity:
            raise ValueError(f"{self.path} was saved by another call: repeat that call, or delete the file to start anew.")
        loops: dict[int, dict[str, Tensor]] = {}
        for name, tensor in named.items():
            loop, _, rest = name.partition(".")
            loops.setdefault(int(loop), {})[rest] = tensor
        try:
            return [LoopState.from_tensors(loops[loop]) for loop in sorted(loops)]
        except KeyError as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> OSError:
        return OSError(f"{self.path} is not a saved state, or is damaged ({error}): delete it to start anew.")


def _as_list(generator: Generators) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [generator] if generator is not None else []
