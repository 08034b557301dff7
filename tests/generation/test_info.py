"""The verb `info` on LoRA files (on models: test_generate.py)."""

import json

import pytest
import torch
from safetensors.torch import save_file

from diffusers_cogvideox import cli
from diffusers_cogvideox.generation.lora_info import describe_lora, is_lora_place
from lora_cases import factors, spelled

FACTORS = factors(rank=4, width=1920, blocks=2)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.safetensors"
    save_file(spelled(FACTORS, "fun", alpha=2.0), path)
    return path


def printed(capsys, *arguments):
    assert cli.main(["info", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_facts(file):
    assert describe_lora(str(file)) == {
        "lora": str(file),
        "layout": "kohya",
        "ranks": [4],
        "alphas": [2.0],
        "dora": False,
        "targets": {"attn1.to_k": 2, "attn1.to_out.0": 2, "attn1.to_q": 2, "attn1.to_v": 2},
        "layers": 8,
        "blocks": 2,
        "parameters": 8 * 2 * 4 * 1920,
        "dtypes": ["float32"],
        "fits": ["2b", "fun-2b-inp", "fun-2b-control"],
    }


def test_facts_as_json(file, capsys):
    assert json.loads(printed(capsys, file, "--json")) == describe_lora(str(file))


def test_facts_as_text(file, capsys):
    lines = dict(line.split(maxsplit=1) for line in printed(capsys, file).splitlines())
    assert lines == {
        "lora": str(file),
        "layout": "kohya",
        "rank": "4",
        "alpha": "2",
        "targets": "attn1.to_k, attn1.to_out.0, attn1.to_q, attn1.to_v",
        "layers": "8 in 2 blocks",
        "parameters": "122,880 (float32)",
        "fits": "2b, fun-2b-inp, fun-2b-control",
    }


def test_a_file_that_does_not_say_its_alpha(tmp_path, capsys):
    """Nothing is assumed, and no warning is given: nobody has asked to use it."""
    torch.save({"module": spelled(factors(), "sat")}, tmp_path / "sat.pt")
    lines = dict(line.split(maxsplit=1) for line in printed(capsys, tmp_path / "sat.pt").splitlines())
    assert lines["alpha"] == "not in the file: give it as --lora-alpha, in Python lora_alpha=..."
    assert lines["fits"] == "none of the released models"
    assert describe_lora(str(tmp_path / "sat.pt"))["alphas"] is None


def test_a_dora_of_several_ranks_in_half_precision(tmp_path, capsys):
    mixed = {layer: factors(rank=2 + 2 * layer[0])[layer] for layer in factors()}
    tensors = spelled(mixed, "diffusers") | {
        f"transformer.transformer_blocks.{block}.attn1.{target}.lora_magnitude_vector": torch.ones(64) for block, target in mixed
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "pytorch_lora_weights.safetensors")
    lines = dict(line.split(maxsplit=1) for line in printed(capsys, tmp_path).splitlines())
    assert (lines["layout"], lines["rank"]) == ("diffusers, DoRA", "2, 4")
    assert lines["parameters"].endswith("(bfloat16)")


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "page.safetensors").write_bytes(b"<html>")
    save_file({"proj_out.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for name, message in (("page", "is no weight file but a web page"), ("model", "holds no LoRA")):
        assert cli.main(["info", str(tmp_path / f"{name}.safetensors")]) == 2
        assert message in capsys.readouterr().err


def test_folders_of_models_are_no_loras(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").touch()  # the shipped model comes first
    assert not is_lora_place(str(folders()))
    assert not is_lora_place(str(folders() / "transformer"))
    assert not is_lora_place(str(tmp_path))
    assert not is_lora_place("demo")
