"""What a compiler makes of a block at full size. Nothing is compiled to the end or run."""

import pytest
import torch

from compiled_block import counted
from diffusers_cogvideox import CogVideoXTransformer3DModel
from parity import StockTransformer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_block_reads_and_writes_less_than_stocks():
    ours, stock = (counted(cls, "5b", torch.bfloat16) for cls in (CogVideoXTransformer3DModel, StockTransformer))
    assert ours["kernels"] <= stock["kernels"]
    assert ours["bytes"] < 0.8 * stock["bytes"]
    assert (ours["library_calls"], ours["library_bytes"]) == (stock["library_calls"], stock["library_bytes"])
