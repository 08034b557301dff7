"""Parallelism: D2 to D4."""

import pytest

import rank_checks
import ranks
from parity import StockTransformer
from transformer_cases import tiny_twins


@pytest.fixture(scope="module")
def checked():
    """Both models on two ranks; see the checks."""
    ranks.run(2, rank_checks.stock)


def test_d2_context_parallelism(checked):
    ours, stock = tiny_twins("5b")
    assert stock._cp_plan is None and ours._cp_plan


def test_d3_without_accelerator(checked):
    """The ranks are processes of this machine's processor."""


def test_d4_tensor_parallelism(checked):
    ours, _ = tiny_twins("5b")
    assert StockTransformer._tp_plan is None and ours._tp_plan
