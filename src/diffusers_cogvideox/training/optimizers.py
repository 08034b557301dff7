"""Optimisers: AdamW, or Muon for weight matrices beside AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .config import Optimisation

__all__ = ["MatrixMuon", "build_optimizers"]


def as_matrix(values: Tensor, weight: Tensor) -> Tensor:
    """A weight (C_out, C_in, ...), or its gradient in any layout, as (C_out, rest) with the columns in the order of the weight's storage.

    Of the weight itself it is a view, also when stored channels-last.
    """
    return values.flatten(1) if weight.is_contiguous() else values.movedim(1, -1).flatten(1)


class MatrixMuon(torch.optim.Muon):
    """Muon (K. Jordan, 2024) for weights of any rank: a convolution is the matrix of its output channels.

    The update is the orthogonalised momentum of the gradient, so that all directions of a weight learn at the same pace.
    """

    def __init__(self, weights: Iterable[nn.Parameter], **options: Any) -> None:
        self.weights = list(weights)
        super().__init__([nn.Parameter(as_matrix(weight.data, weight)) for weight in self.weights], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients of the weights."""
        matrices = [matrix for group in self.param_groups for matrix in group["params"]]
        for weight, matrix in zip(self.weights, matrices, strict=True):
            matrix.data = as_matrix(weight.data, weight)  # the weight may have moved: DistributedDataParallel gives it new storage
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad, weight)
        return super().step(closure)


def build_optimizers(model: nn.Module, options: Optimisation) -> list[torch.optim.Optimizer]:
    """The optimisers of `model`, which together own every parameter that requires a gradient once.

    With `muon_learning_rate`, weights of rank >= 2 go to Muon, except the first and last layers' (fewer than 8 rows or columns) and
    embedding tables; biases, norms and the rest stay with AdamW.
    """
    tables = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if options.muon_learning_rate and p.ndim > 1 and p not in tables and min(p.flatten(1).shape) >= 8]
    owned = set(matrices)
    adamw = torch.optim.AdamW(
        [p for p in parameters if p not in owned], lr=options.learning_rate, betas=options.betas, weight_decay=options.weight_decay
    )
    if not matrices:
        return [adamw]
    return [adamw, MatrixMuon(matrices, lr=options.muon_learning_rate, weight_decay=options.weight_decay)]
