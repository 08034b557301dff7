"""DeepSpeed ZeRO checkpoints: the pieces of parameters that each rank holds, put together to whole float32 tensors.

Stages 1 and 2 concatenate the parameters of a group into one flat vector and give every rank an equal share of it. Stage 3 cuts every
parameter by itself into equal shares, the last of which are padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .lazy import LazyTensor, combine
from .rules import listed

__all__ = ["merge"]

_PADDED_TO = 2  # elements per rank, to which the vectors of stages 1 and 2 are padded

Shapes = Mapping[str, Sequence[int]]


def merge(models: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]) -> dict[str, LazyTensor]:
    """All parameters and buffers of a checkpoint by name, any shapes, trained ones in float32.

    Args:
        models: contents of the model files (`*_model_states.pt`): one for stages 1 and 2, one for each rank for stage 3.
        optimizers: contents of the optimiser files (`*_optim_states.pt`) of all ranks, in order of their ranks.

    Raises:
        ValueError: ranks are missing, or the vectors and the shapes do not agree.
    """
    model, state = models[0], [_entry(content, "optimizer_state_dict") for content in optimizers]
    stage, ranks = int(_number(_entry(state[0], "zero_stage"))), _ranks(_entry(state[0], "partition_count"))
    if len(optimizers) != ranks:
        raise ValueError(f"it was written by {ranks} ranks, but holds the optimiser files of {len(optimizers)}")
    if stage == 3 and len(models) != ranks:
        raise ValueError(f"it was written by {ranks} ranks, but holds the model files of {len(models)}")
    shapes = _entry(model, "param_shapes")
    groups = [shapes] if isinstance(shapes, Mapping) else list(shapes)
    if stage == 3:
        merged = dict(_stage_3([_entry(content, "fp32_flat_groups") for content in state], groups))
    else:
        merged = dict(_stages_1_and_2([_entry(content, "single_partition_of_fp32_groups") for content in state], groups))
    merged |= _frozen(models, stage)
    merged |= {name: LazyTensor.of(model["module"][name]) for name in model.get("buffer_names", ()) if name in model["module"]}
    shared = model.get("shared_params") or {}
    return merged | {name: merged[twin] for name, twin in dict(shared).items() if twin in merged}


def _entry(content: Any, name: str) -> Any:
    if not isinstance(content, Mapping) or name not in content:
        raise ValueError(f"one of its files lacks {name!r}, which DeepSpeed writes: it is of another kind or version")
    return content[name]


def _number(value: Any) -> int:
    """A stage, also where DeepSpeed wrote it as an enumeration."""
    return int(value.content[0]) if hasattr(value, "content") else int(value)


def _ranks(count: Any) -> int:
    """Number of data-parallel ranks; with several groups of experts, DeepSpeed writes a list."""
    return max(count) if isinstance(count, list | tuple) else int(count)


def _cut(vectors: Sequence[Tensor], start: int, stop: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Where elements start to stop of several vectors, one after another, stand: each vector with its own span."""
    for vector in vectors:
        span = max(start, 0), min(stop, len(vector))
        if span[0] < span[1]:
            yield vector, span
        start, stop = start - len(vector), stop - len(vector)


def _joined(pieces: Sequence[tuple[Tensor, tuple[int, int]]], shape: Sequence[int]) -> LazyTensor:
    """The pieces one after another in a shape; a view where it is one piece."""
    spans = [span for _, span in pieces]
    return combine(partial(_reshaped, spans=spans, shape=tuple(shape)), [LazyTensor.of(vector) for vector, _ in pieces])


def _reshaped(*vectors: Tensor, spans: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> Tensor:
    cut = [vector[start:stop] for vector, (start, stop) in zip(vectors, spans, strict=True)]
    return (cut[0] if len(cut) == 1 else torch.cat(cut)).reshape(shape)


def _stages_1_and_2(flat: Sequence[Sequence[Tensor]], groups: Sequence[Shapes]) -> Iterator[tuple[str, LazyTensor]]:
    """Walk along all ranks' vectors of each group."""
    for rank, vectors in enumerate(flat):
        if len(vectors) != len(groups):
            raise ValueError(f"rank {rank} holds {len(vectors)} groups of parameters, but the model has {len(groups)}")
    for group, shapes in enumerate(groups):
        vectors = [rank[group] for rank in flat]
        total, wanted = sum(map(len, vectors)), sum(math.prod(shape) for shape in shapes.values())
        unit = _PADDED_TO * len(vectors)
        if math.ceil(total / unit) != math.ceil(wanted / unit):
            raise ValueError(f"the ranks hold {total} numbers of group {group}, but its parameters need {wanted}")
        position = 0
        for name, shape in shapes.items():
            end = position + math.prod(shape)
            yield name, _joined(list(_cut(vectors, position, end)), shape)
            position = end


def _stage_3(flat: Sequence[Sequence[Tensor]], groups: Sequence[Shapes]) -> Iterator[tuple[str, LazyTensor]]:
    """Every rank holds the same number of elements of every parameter, at the same place; the vectors need not be cut by groups."""
    held = [sum(map(len, vectors)) for vectors in flat]
    position = 0
    for name, shape in (item for shapes in groups for item in shapes.items()):
        count = math.prod(shape)
        share = math.ceil(count / len(flat))
        if position + share > min(held):
            raise ValueError(f"the ranks hold {min(held)} numbers each, which end within {name}")
        lengths = _shares(share, count, len(flat))
        pieces = [piece for vectors, length in zip(flat, lengths, strict=True) for piece in _cut(vectors, position, position + length)]
        yield name, _joined(pieces, shape)
        position += share
    if set(held) != {position}:
        raise ValueError(f"the ranks hold {max(held)} numbers each, but the parameters need {position}")


def _shares(share: int, count: int, ranks: int) -> list[int]:
    """How many of `count` elements each rank holds, without the padding of the last ones."""
    return [min(share, max(count - rank * share, 0)) for rank in range(ranks)]


def _frozen(models: Sequence[Mapping[str, Any]], stage: int) -> dict[str, LazyTensor]:
    """Parameters that were not trained: whole in stages 1 and 2, cut like all others in stage 3."""
    shapes, pieces = models[0].get("frozen_param_shapes") or {}, [model.get("frozen_param_fragments") or {} for model in models]
    if absent := [name for name in shapes if any(name not in held for held in pieces)]:
        raise ValueError(f"the values of its frozen parameters are missing: {listed(absent)}")
    if stage != 3:
        return {name: LazyTensor.of(pieces[0][name].reshape(tuple(shape))) for name, shape in shapes.items()}
    found = {}
    for name, shape in shapes.items():
        vectors, count = [held[name].flatten() for held in pieces], math.prod(shape)
        if sum(map(len, vectors)) < count:
            raise ValueError(f"the ranks hold {sum(map(len, vectors))} numbers of the frozen {name}, which needs {count}")
        found[name] = _joined(list(_cut(vectors, 0, count)), shape)
    return found
