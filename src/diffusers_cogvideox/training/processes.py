"""Training on several processes: which part of a global batch, or of any work on n items, is this process's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import gather
from torch import Tensor

__all__ = ["ALONE", "Share", "gather_parts", "process_state"]


def process_state() -> PartialState:
    """The processes that were launched together, by `accelerate launch` or `torchrun`; on the CPU where there is nothing faster."""
    return PartialState(cpu=not torch.accelerator.is_available())


@dataclass(frozen=True)
class Share:
    """One process's share of every batch: all processes draw the same batch and each keeps its part, so the data of a run, and which
    timestep interval belongs to which sample, do not depend on how many processes there are."""

    rank: int = 0
    processes: int = 1

    @classmethod
    def current(cls) -> Share:
        """This process's share of the processes that were launched together."""
        state = process_state()
        return cls(state.process_index, state.num_processes)

    def of(self, count: int) -> slice:
        """The part of `count` items that belongs to this process: equally many for each.

        Raises ValueError where `count` cannot be split evenly.
        """
        size, rest = divmod(count, self.processes)
        if rest:
            raise ValueError(
                f"{count} items cannot be split evenly over {self.processes} processes: "
                f"make batch_size (and data.clips) a multiple of {self.processes}, or start another number of processes."
            )
        return slice(self.rank * size, (self.rank + 1) * size)


ALONE = Share()


def gather_parts(part: Tensor, share: Share) -> Tensor:
    """The parts (n, ...) of all processes, in order, as one tensor (n * processes, ...) on the CPU."""
    if share.processes == 1:
        return part.cpu()
    return torch.as_tensor(gather(part.to(process_state().device))).cpu()
