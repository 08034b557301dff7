"""Context parallelism: the same numbers as on one rank, whatever does not divide what."""

import pytest
from diffusers import ContextParallelConfig

import rank_checks
import ranks
from transformer_cases import tiny_twins


@pytest.mark.parametrize("count", [2, 3])
def test_collectives_of_unequal_parts(count):
    ranks.run(count, rank_checks.unequal_parts)


@pytest.mark.parametrize("count", [2, 3])
def test_equal_to_one_rank(count):
    cases = [
        (variant, {f"{way}_degree": count}, changes, sizes)
        for way in ("ulysses", "ring")
        for variant, changes, sizes in [
            ("5b", {"num_attention_heads": 5, "attention_head_dim": 16}, {"text": 7, "height": 10}),
            ("1.5-5b-i2v", {}, {"text": 1}),
            ("2b", {"num_attention_heads": 1}, {"text": 10, "frames": 1, "height": 2, "width": 6, "batch": 1}),
        ]
    ]
    ranks.run(count, rank_checks.context_parallel, cases)


def test_heads_and_queries_at_once():
    """Four ranks: pairs that exchange heads, two of which gather keys and values."""
    sizes = {"text": 7, "height": 10}
    ranks.run(4, rank_checks.context_parallel, [("5b", {"ulysses_degree": 2, "ring_degree": 2}, {"num_attention_heads": 3}, sizes)])


@pytest.mark.parametrize("degrees", [{"ulysses_degree": 2}, {"ring_degree": 2}])
def test_masks_and_backends(degrees):
    ranks.run(2, rank_checks.masks_and_backends, degrees)


@pytest.mark.parametrize("degrees", [{"ulysses_degree": 2}, {"ring_degree": 2}])
def test_blocks_compile_with_their_exchanges(degrees):
    ranks.run(2, rank_checks.compiled, degrees)


def test_refusals():
    ranks.run(2, rank_checks.refusals)
    model, _ = tiny_twins("5b")
    with pytest.raises(RuntimeError, match="torchrun"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
