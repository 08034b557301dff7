"""A pipeline on several ranks: who does what, and that all of them do the same video.

Every rank has the whole pipeline and makes the same calls; within them the transformer and the VAE share their work. What is shared, from
the cheapest in communication to the dearest: the halves of guidance (one prediction per step), the rows of the VAE (borders of feature
maps), tokens (`ring`: keys and values; `ulysses`: queries, keys, values and results), heads and channels with their weights (`tensor`:
all tokens, twice per block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelConfig, TensorParallelConfig
from diffusers.utils import logging
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ..models.collectives import gather, require_ranks
from ..models.parallel import rank_device_type

__all__ = ["MODES", "Roles", "check_same_start", "divide_roles", "share_work", "shares_batches"]

logger = logging.get_logger(__name__)

MODES = ("auto", "cfg", "ulysses", "ring", "tensor")

_DIFFERENT = 1e-2  # of the norm; different noise differs by about 1, rounding by 1e-3 in half precision


@dataclass(frozen=True, kw_only=True)
class Roles:
    """How many ranks share what; their product is the number of ranks."""

    halves: int = 1
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1

    def of(self, rank: int) -> str:
        """What a rank does, in words."""
        inner = self.ring * self.ulysses * self.tensor
        parts = [f"the half {'with' if rank // inner else 'without'} the prompt"] if self.halves > 1 else []
        if self.tensor > 1:
            parts.append(f"heads and channels {rank % self.tensor + 1} of {self.tensor}")
        if self.ring * self.ulysses > 1:
            place, ways = rank % inner + 1, [name for name in ("ring", "ulysses") if getattr(self, name) > 1]
            parts.append(f"tokens {place} of {self.ring * self.ulysses} ({' x '.join(ways)})")
        return ", ".join(parts) or "everything"


def divide_roles(mode: str, ranks: int, *, heads: int, guided: bool) -> Roles:
    """The roles of `ranks` ranks.

    Args:
        mode: one of MODES. "cfg" is two halves, and Ulysses within them; "auto" is that where there is guidance and the ranks are even,
            else Ulysses, with a ring of them where there are more ranks than heads.
        ranks: how many there are.
        heads: attention heads of the transformer.
        guided: whether there are two halves.

    Raises:
        ValueError: for an unknown mode, and for one that is not possible with so many ranks.
    """
    if mode not in MODES:
        raise ValueError(f"parallel={mode!r} is unknown: use one of {', '.join(MODES)}.")
    if mode == "cfg" and (not guided or ranks % 2):
        reason = f"{ranks} ranks are not two halves" if guided else "without guidance there is only one half"
        raise ValueError(f"parallel='cfg' is not possible: {reason}. Use 'ulysses', or 'auto'.")
    if mode in ("ulysses", "tensor") and ranks > heads:
        raise ValueError(f"parallel={mode!r} is not possible: {ranks} ranks cannot share {heads} heads. Use 'ring', or 'auto'.")
    if mode in ("ring", "tensor"):
        return Roles(**{mode: ranks})
    halves = 2 if mode == "cfg" or (mode == "auto" and guided and ranks % 2 == 0) else 1
    inner = ranks // halves
    ulysses = max(degree for degree in range(1, min(inner, heads) + 1) if inner % degree == 0)
    return Roles(halves=halves, ring=inner // ulysses, ulysses=ulysses)


def share_work(pipe: Any, mode: str = "auto", *, guided: bool = True) -> Roles:
    """Let the ranks of the default process group work on this pipeline together, from the next call on.

    Args:
        pipe: a pipeline whose transformer and VAE are ours; its call is made on every rank, with the same arguments and seed.
        mode: see `divide_roles`.
        guided: whether calls have a guidance scale above 1.

    Returns:
        who does what; `roles.of(rank)` says it in words.

    Raises:
        RuntimeError: without a process group.
        ValueError: for a mode that is not possible here.
    """
    require_ranks()
    transformer = pipe.transformer
    roles = divide_roles(mode, dist.get_world_size(), heads=transformer.config.num_attention_heads, guided=guided)
    if roles.tensor > 1:
        transformer.enable_parallelism(config=TensorParallelConfig(tp_degree=roles.tensor))
    else:
        shape, names = (roles.halves, roles.ring, roles.ulysses), ("halves", "ring", "ulysses")
        mesh = init_device_mesh(rank_device_type(), shape, mesh_dim_names=names)
        if roles.halves > 1:
            transformer.enable_batch_parallelism(mesh["halves"].get_group())
        if roles.ring * roles.ulysses > 1:
            config = ContextParallelConfig(ring_degree=roles.ring, ulysses_degree=roles.ulysses, mesh=mesh["ring", "ulysses"])
            transformer.enable_parallelism(config=config)
    if dist.get_world_size() > 1:
        pipe.vae.enable_row_parallelism()
    return roles


def shares_batches(transformer: Any, samples: int, *, guider: bool = False) -> bool:
    """Whether ranks share the batches of a call with so many samples, halves of guidance counted; warns where they have nothing to share.

    Raises ValueError for a guider, which predicts one half after the other.
    """
    group = getattr(transformer, "batch_group", None)
    if group is None:
        return False
    if guider:
        raise ValueError(
            "A guider makes its predictions one after the other, which leaves ranks that share a batch nothing to share: call "
            "pipe.transformer.disable_batch_parallelism() and share tokens (enable_parallelism), or leave the guider out."
        )
    if samples < group.size:
        logger.warning(
            f"This call predicts {samples} sample at a time, which {group.size} ranks cannot share: each computes all of it. Share "
            "tokens in place of the halves of guidance: parallel='ulysses'."
        )
    return True


def check_same_start(transformer: Any, *tensors: Tensor) -> None:
    """Raise ValueError when ranks that must make the same video start from different tensors, such as noise drawn without a seed."""
    for group in getattr(transformer, "partners", []):
        marks = torch.stack([_marks(tensor) for tensor in tensors])
        all_marks = gather(marks[None], 0, [1] * group.size, group)
        if not bool(((all_marks - all_marks[:1]).abs() < _DIFFERENT).all()):
            raise ValueError(
                "The ranks start from different noise or prompts, and cannot share the work on one video: pass the same arguments on every "
                "rank, with generator=torch.Generator().manual_seed(n)."
            )


def _marks(x: Tensor) -> Tensor:
    """Two numbers (2,) that different tensors hardly share, and that hardly change by rounding."""
    flat = x.detach().float().flatten()
    waves = torch.arange(len(flat), device=x.device, dtype=torch.float32).sin()
    return torch.stack([flat.sum(), (flat * waves).sum()]) / flat.norm().clamp_min(1e-6)
