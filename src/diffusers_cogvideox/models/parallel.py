"""diffusers' `enable_parallelism` on our transformer: what its own machinery cannot split, split; what nobody can, refused."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FirstBlockCacheConfig
from diffusers.hooks.tensor_parallel import _check_tp_supported
from diffusers.models._modeling_parallel import (
    ContextParallelConfig,
    ContextParallelInput,
    ContextParallelOutput,
    ParallelConfig,
    TensorParallelConfig,
)
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .collectives import Group, require_ranks
from .context_parallel import Ranks
from .tensor_parallel import TENSOR_PLAN, keep_share

__all__ = ["ParallelMixin", "rank_device_type"]

AnyConfig = ParallelConfig | ContextParallelConfig | TensorParallelConfig

_TOKENS = ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)
_TABLE = ContextParallelInput(split_dim=0, expected_dims=2)


class ParallelMixin:
    """`enable_parallelism` for a transformer on joint text and video tokens, with any numbers of tokens, heads and ranks."""

    # What is split and what is gathered, in diffusers' terms, for programs that read it. The model's `forward` does so itself, because
    # attention has to know how many tokens of text and of video lie on each rank, which diffusers' hooks do not tell it.
    _cp_plan: Any = {  # noqa: RUF012
        "patch_embed": {0: _TOKENS, 1: _TOKENS},
        "transformer_blocks.*": {"image_rotary_emb": [_TABLE, _TABLE]},
        "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    _tp_plan: Any = TENSOR_PLAN

    ranks: Ranks | None = None
    batch_group: Group | None = None
    transformer_blocks: Any
    _parallel_config: ParallelConfig | None = None

    def enable_parallelism(self, *, config: AnyConfig, cp_plan: dict[str, Any] | None = None) -> None:
        """Share the work of every forward pass among ranks, each of which calls the model with the same inputs and gets the same result.

        `ContextParallelConfig(ulysses_degree=U, ring_degree=R)` spreads the tokens over U R ranks, each with all weights. Numbers of
        tokens and heads need not be divisible, whether or not the config says `ulysses_anything` or `ring_anything`, every attention
        backend works, and there are gradients: those of the parameters on all ranks add up to that of one rank alone.

        `TensorParallelConfig(tp_degree=T)` leaves each rank a share of the heads, of the channels, and of their weights, for good.

        Args:
            config: diffusers' configuration; its process group must exist.
            cp_plan: always None: the model splits itself.

        Raises:
            RuntimeError: without a process group, and when parallelism is on already.
            ValueError: for a plan, for a configuration that does not fit the number of ranks, for a feature cache whose decisions
                depend on the tokens, and for weights that cannot be shared (quantised, offloaded, with adapters).
        """
        if self._parallel_config is not None:
            raise RuntimeError("Parallelism is on already for this model: call disable_parallelism() first.")
        if cp_plan is not None and cp_plan != self._cp_plan:
            raise ValueError("This model splits its tokens by itself and cannot follow another cp_plan: leave it out.")
        config = self._resolve_parallel_config(config, keep=False)
        if config.context_parallel_config is not None:
            _check_cache(getattr(self, "_cache_config", None))
            self.ranks = Ranks.of(config.context_parallel_config)
        elif config.tensor_parallel_config is not None:
            _check_tp_supported(type(self).__name__, self._tp_plan, None, config.tensor_parallel_config, model=self)  # type: ignore[arg-type]
            keep_share(self.transformer_blocks, Group.of(config.tensor_parallel_config._mesh.get_group()))
        self._parallel_config = config

    def enable_batch_parallelism(self, group: Any = None) -> None:
        """Share the samples of every batch among the ranks of a process group, by default all ranks; each rank calls the model with all
        samples, and gets the predictions for all.

        With two ranks, a guided pipeline has the prediction without the prompt made on one and that with it on the other, at the same
        time. Goes together with `enable_parallelism` over other ranks. Batches with fewer samples than ranks are computed by every rank.

        Raises:
            RuntimeError: without a process group.
        """
        require_ranks()
        self.batch_group = Group.of(dist.group.WORLD if group is None else group)

    def disable_batch_parallelism(self) -> None:
        """Undo `enable_batch_parallelism`."""
        self.batch_group = None

    @property
    def partners(self) -> list[Group]:
        """The groups of ranks that must call this model together, with the same inputs."""
        context = self.ranks and self.ranks.everyone
        tensor = self._parallel_config and self._parallel_config.tensor_parallel_config
        groups = [context, tensor and Group.of(tensor._mesh.get_group()), self.batch_group]
        return [group for group in groups if group]

    @property
    def tensor_ranks(self) -> int:
        """Ranks among which the weights are shared; 1 where this model has all of them."""
        tensor = self._parallel_config and self._parallel_config.tensor_parallel_config
        return tensor._mesh.size() if tensor else 1  # which a mesh of its own decides, not the degree

    def disable_parallelism(self) -> None:
        """Undo `enable_parallelism`. Raises ValueError for tensor parallelism: the other ranks' weights are gone."""
        if self._parallel_config is not None and self._parallel_config.tensor_parallel_config is not None:
            raise ValueError("Each rank has given away the others' weights: load the model again to have it without tensor parallelism.")
        self._parallel_config = self.ranks = None

    def enable_cache(self, config: Any) -> None:
        """As `CacheMixin.enable_cache`. Raises ValueError for a cache that would decide differently on every rank, too."""
        if self.ranks is not None:
            _check_cache(config)
        super().enable_cache(config)  # type: ignore[misc]

    def _resolve_parallel_config(self, config: AnyConfig, keep: bool = True) -> ParallelConfig:
        """`config` with its device mesh, on processors without accelerators too; diffusers, when it loads shares, has it kept here.

        Raises as `enable_parallelism`.
        """
        require_ranks()
        if isinstance(config, ContextParallelConfig):
            config = ParallelConfig(context_parallel_config=config)
        elif isinstance(config, TensorParallelConfig):
            config = ParallelConfig(tensor_parallel_config=config)
        kind, rank, size = rank_device_type(), dist.get_rank(), dist.get_world_size()
        context, tensor = config.context_parallel_config, config.tensor_parallel_config
        if context is None and tensor is None:
            raise ValueError("This configuration names no parallelism: give it a context_parallel_config or a tensor_parallel_config.")
        shape: tuple[int, ...] = context.mesh_shape if context is not None else (tensor.tp_degree,)  # type: ignore[union-attr]
        names: tuple[str, ...] = context.mesh_dim_names if context is not None else ("tp",)
        given = (context or tensor).mesh  # type: ignore[union-attr]
        degree = given.size() if given is not None else torch.Size(shape).numel()
        if given is None and degree != size:
            raise ValueError(
                f"{dict(zip(names, shape, strict=True))} are {degree} ranks, but {size} are running: make them equal, or pass the part "
                "of a larger mesh as the config's mesh."
            )
        mesh = given if given is not None else init_device_mesh(kind, shape, mesh_dim_names=names)
        device = torch.device(kind, rank % torch.accelerator.device_count() if kind != "cpu" else 0)
        config.setup(rank, size, device, mesh=mesh)
        if keep:
            self._parallel_config = config
        return config


def _check_cache(config: Any) -> None:
    if isinstance(config, FirstBlockCacheConfig):
        raise ValueError(
            "FirstBlockCacheConfig decides by the tokens, of which every rank has others: one would skip a step while the others wait for "
            "it. Turn it off (disable_cache), or use a cache that counts steps (MagCache, PAB, TaylorSeer)."
        )


def rank_device_type() -> str:
    """The kind of device that the ranks of the process group compute on: that of the accelerator, or "cpu" for gloo."""
    if dist.get_backend() == "gloo" or not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return accelerator.type
