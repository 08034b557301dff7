"""Training on two processes: the same run as on one."""

import json
import socket
from pathlib import Path

import pytest

import ranks
import training_runs
from diffusers_cogvideox.training.processes import Share


def logged(folder: Path) -> list[dict[str, float]]:
    """The log of a run that is finished."""
    assert (folder / "final" / "diffusion_pytorch_model.safetensors").is_file()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(tmp_path: Path, parts: dict[str, str], tiny_model: dict[str, object]) -> None:
    """Losses and gradients are compared, not weights: Muon makes rounding visible in directions that the gradient does not have."""
    training_runs.train({"output": str(tmp_path / "1"), "model": tiny_model, **parts})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks.run(2, training_runs.train_together, {"output": str(tmp_path / "2"), "model": tiny_model, **parts}, port)
    alone, together = (logged(tmp_path / count) for count in "12")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in together] == pytest.approx([line[name] for line in alone], rel=5e-3)
    assert [line["lr"] for line in together] == [line["lr"] for line in alone]
    assert len({line["loss"] for line in together}) == 5


def test_shares_cover_a_batch_once() -> None:
    parts = [list(range(12))[Share(rank, 3).of(12)] for rank in range(3)]
    assert [item for part in parts for item in part] == list(range(12)) and {len(part) for part in parts} == {4}
    with pytest.raises(ValueError, match="7 items cannot be split evenly over 2 processes"):
        Share(0, 2).of(7)
