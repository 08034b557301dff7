"""Tensor parallelism: shares of heads and channels, divisible or not."""

import pytest

import rank_checks
import ranks


@pytest.mark.parametrize("count", [2, 3])
def test_equal_to_one_rank(count):
    cases = [
        ("5b", {"num_attention_heads": 5, "attention_head_dim": 16}),
        ("1.5-5b-i2v", {"num_attention_heads": 4, "attention_head_dim": 16, "attention_bias": False}),
        ("2b", {"num_attention_heads": 3}),
    ]
    ranks.run(count, rank_checks.tensor_parallel, cases)


def test_shares_are_read_from_the_file(tmp_path):
    ranks.run(2, rank_checks.tensor_parallel_by_loading, str(tmp_path))


def test_refusals():
    ranks.run(2, rank_checks.tensor_refusals)
