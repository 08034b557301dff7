"""Key rules: renaming, cutting and joining, both ways, on a table of our own and on true SAT checkpoints."""

import pytest
import torch

from diffusers_cogvideox.checkpoints.rules import KeyRules, Rule, rename
from diffusers_cogvideox.checkpoints.sat import MODEL_PREFIX, transformer_rules

# A table of a fused projection, of pieces that are regrouped, and of one renaming.
TABLE = KeyRules(
    [
        Rule(
            "layers.{layer}.attention.query_key_value.{kind}",
            {f"blocks.{{layer}}.attn1.{name}.{{kind}}": (index,) for index, name in enumerate(("to_q", "to_k", "to_v"))},
        ),
        Rule(
            "adaLN_modulations.{layer}.1.{kind}",
            {"blocks.{layer}.norm1.{kind}": (0, 1, 2, 6, 7, 8), "blocks.{layer}.norm2.{kind}": (3, 4, 5, 9, 10, 11)},
        ),
        rename("layers.{layer}.attention.dense.{kind}", "blocks.{layer}.attn1.to_out.0.{kind}"),
    ],
    dropped={r"^final\.": "an example"},
)


def test_a_tensor_is_cut_into_parts():
    fused = torch.arange(12.0).reshape(6, 2)
    found = TABLE.forward({"layers.3.attention.query_key_value.weight": fused})
    assert list(found) == [f"blocks.3.attn1.to_{letter}.weight" for letter in "qkv"]
    assert torch.equal(found["blocks.3.attn1.to_k.weight"], fused[2:4])


def test_parts_may_be_any_selection_of_pieces():
    found = TABLE.forward({"adaLN_modulations.0.1.bias": torch.arange(24.0)})
    assert found["blocks.0.norm1.bias"].tolist() == [0, 1, 2, 3, 4, 5, 12, 13, 14, 15, 16, 17]
    assert found["blocks.0.norm2.bias"].tolist() == [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23]


@pytest.mark.parametrize("name", ["v10_2b", "v10_5b", "v10_5b_i2v", "v15_5b"])
def test_both_ways_on_true_checkpoints(reference, name):
    module = torch.load(reference / "sat" / f"{name}_mp_rank_00_model_states.pt", weights_only=True)["module"]
    inside = {key.removeprefix(MODEL_PREFIX): value for key, value in module.items()}
    rules = transformer_rules(learned_positions="i2v" in name)
    known = {key: value for key, value in inside.items() if rules.reason_to_drop(key) is None}
    parts = rules.forward(inside)
    assert len(parts) == 64 + ("i2v" in name)
    back = rules.backward(parts)
    assert list(back) == list(known)  # in the order of the original code
    assert all(torch.equal(back[key], known[key]) for key in known)


def test_the_first_of_several_spellings_is_written():
    rules = KeyRules([rename("a.new", "a"), rename("a.old", "a")])
    tensor = torch.ones(2)
    assert rules.forward({"a.old": tensor})["a"] is tensor
    assert list(rules.backward({"a": tensor})) == ["a.new"]


def test_unknown_names_are_listed():
    tensors = {f"unheard.{n}": torch.ones(1) for n in range(6)}
    with pytest.raises(ValueError, match=r"no rule knows unheard\.0, unheard\.1, unheard\.2, unheard\.3 and 2 more"):
        TABLE.forward(tensors | {"final.norm": torch.ones(1)})
    with pytest.raises(ValueError, match=r"no rule knows blocks\.x\.attn1"):
        TABLE.backward({"blocks.x.attn1.to_out.0.weight": torch.ones(1)})


def test_dropped_names_are_left_out():
    assert TABLE.forward({"final.norm": torch.ones(1)}) == {}


def test_a_tensor_that_is_given_twice():
    rules = KeyRules([rename("a.new", "a"), rename("a.old", "a")])
    with pytest.raises(ValueError, match="given twice, under several spellings: a"):
        rules.forward({"a.new": torch.ones(1), "a.old": torch.ones(1)})


@pytest.mark.parametrize("shape", [(7, 2), ()])
def test_a_tensor_that_cannot_be_cut(shape):
    with pytest.raises(ValueError, match=r"query_key_value\.weight: shape .* cannot be cut into 3 equal pieces"):
        TABLE.forward({"layers.0.attention.query_key_value.weight": torch.zeros(shape)})


def test_a_part_that_is_missing():
    parts = TABLE.forward({"layers.0.attention.query_key_value.weight": torch.zeros(6, 2)})
    del parts["blocks.0.attn1.to_k.weight"]
    with pytest.raises(ValueError, match=r"query_key_value\.weight lacks its parts blocks\.0\.attn1\.to_k\.weight"):
        TABLE.backward(parts)
