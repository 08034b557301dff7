"""Which parameters the optimisers own, and what Muon does to a convolution."""

import pytest
import torch
from torch import nn

from diffusers_cogvideox.training.config import Optimisation
from diffusers_cogvideox.training.optimizers import MatrixMuon, build_optimizers


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(16, 16), nn.Conv3d(8, 16, 3), nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 3))


@pytest.mark.parametrize("muon", [None, 0.02])
def test_every_parameter_moves(muon: float | None) -> None:
    network = model()
    before = [p.clone() for p in network.parameters()]
    optimizers = build_optimizers(network, Optimisation(muon_learning_rate=muon))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    assert len(optimizers) == (2 if muon else 1)
    assert all(not torch.equal(old, new) for old, new in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_muon_step_of_a_convolution_is_orthogonal(memory_format: torch.memory_format) -> None:
    conv = nn.Conv3d(8, 16, 3)
    conv.weight.data = conv.weight.data.to(memory_format=memory_format)
    before = conv.weight.detach().clone()
    optimizer = MatrixMuon([conv.weight], lr=0.1, weight_decay=0.0)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    step = (before - conv.weight.detach()).flatten(1) / 0.1
    singular = torch.linalg.svdvals(step)
    # The quintic iteration brings all singular values near 1, not exactly to it.
    assert singular.min() > 0.5 and singular.max() < 1.4


def test_muon_does_not_depend_on_the_storage_order() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last_3d):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(16, 8, 3, 3, 3).to(memory_format=memory_format))
        weight.grad = torch.randn(16, 8, 3, 3, 3).to(memory_format=memory_format)
        MatrixMuon([weight], lr=0.1, weight_decay=0.0).step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, atol=5e-3, rtol=0)  # the iteration runs in bfloat16


def test_muon_takes_gradients_in_any_layout_and_weights_that_moved() -> None:
    """DistributedDataParallel gives parameters new storage and gradients its own layout."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(16, 8, 3, 3, 3).to(memory_format=torch.channels_last_3d))
        optimizer = MatrixMuon([weight], lr=0.1, weight_decay=0.0)
        weight.data = weight.data.clone(memory_format=torch.preserve_format)
        weight.grad = torch.randn(16, 8, 3, 3, 3).to(memory_format=layout)
        optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)
