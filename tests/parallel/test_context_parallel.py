"""Context parallelism: the same numbers as on one rank, whatever does not divide what."""

import pytest
import torch
from diffusers import ContextParallelConfig
from torch.nn.functional import scaled_dot_product_attention

import rank_checks
import ranks
from diffusers_cogvideox.models import collectives
from diffusers_cogvideox.models.collectives import Group
from diffusers_cogvideox.models.context_parallel import Ranks, attend_together
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


@pytest.mark.parametrize(("heads", "pieces"), [(6, 4), (3, 3), (1, 1)])
def test_the_next_keys_are_on_their_way_while_attention_is_computed(monkeypatch, heads, pieces):
    """Of two ranks in a ring, with the same tokens: attention to everything twice is attention to it once."""
    order = []

    def said(what, value):
        order.append(what)
        return value

    def attend(query, key, value, attn_mask):
        order.append("attend")
        out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)), attn_mask).transpose(1, 2)
        out.register_hook(lambda gradient: said("attend", gradient))
        return out

    monkeypatch.setattr(collectives, "_gather_equal", lambda x, *_: said("send", torch.cat([x, x])))
    monkeypatch.setattr(collectives.functional, "wait_tensor", lambda x: said("wait", x))
    monkeypatch.setattr(collectives.functional, "all_to_all_single", lambda x, *_: said("send", x))
    one, two = Group("one", 0, 1), Group("two", 0, 2)
    spread = Ranks(two, two, one).spread(text=4, video=6)
    query, key, value = (torch.randn(2, 5, heads, 8, requires_grad=True) for _ in range(3))
    out = attend_together(attend, query, key, value, None, spread)
    between = ["send", "wait", "attend"] * (pieces - 1)
    assert order == ["send", *between, "wait", "attend"]
    order.clear()
    weights = torch.randn_like(out)
    gradients = torch.autograd.grad((out * weights).sum(), (query, key, value))
    assert order == ["attend", "send", *["attend", "send", "wait"] * (pieces - 1), "wait"]
    alone = attend(query, key, value, None)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-6)
    expected = torch.autograd.grad((alone * weights).sum(), (query, key, value))
    for gradient, known in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, known, rtol=0, atol=1e-5)


def test_refusals():
    ranks.run(2, rank_checks.refusals)
    model, _ = tiny_twins("5b")
    with pytest.raises(RuntimeError, match="torchrun"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
