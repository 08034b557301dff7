"""Training on two processes: the same run as on one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_cogvideox.training.processes import Share

RUN = """
import json, sys
import torch
from pathlib import Path
from diffusers_cogvideox.training.config import DataOptions, Optimisation, Stage, TrainConfig
from diffusers_cogvideox.training.loop import run
from diffusers_cogvideox.training.transformer import TransformerTask

torch.set_num_threads(1)
options = json.loads(sys.argv[1])
stages = [Stage(steps=3, batch_size=4, frames=1), Stage(steps=2, batch_size=2, frames=9)]
tuning = Optimisation(learning_rate=1e-3, muon_learning_rate=0.01, warmup_steps=2)
config = TrainConfig(
    task="transformer", stages=stages, data=DataOptions(height=32, width=32, clips=4), optimisation=tuning, log_every=1, **options
)
run(config, TransformerTask(config))
"""


def train(options: dict[str, object], processes: int) -> list[dict[str, float]]:
    """Log of a short run on so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, json.dumps(options)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else None,
        )
        for rank in range(processes)
    ]
    assert [process.wait(timeout=240) for process in started] == [0] * processes
    folder = Path(str(options["output"]))
    assert (folder / "final" / "diffusion_pytorch_model.safetensors").is_file()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one(tmp_path: Path, parts: dict[str, str], tiny_model: dict[str, object]) -> None:
    """Losses and gradients are compared, not weights: Muon makes rounding visible in directions that the gradient does not have."""
    alone, together = (train({"output": str(tmp_path / str(count)), "model": tiny_model, **parts}, count) for count in (1, 2))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in together] == pytest.approx([line[name] for line in alone], rel=5e-3)
    assert [line["lr"] for line in together] == [line["lr"] for line in alone]
    assert len({line["loss"] for line in together}) == 5


def test_shares_cover_a_batch_once() -> None:
    parts = [list(range(12))[Share(rank, 3).of(12)] for rank in range(3)]
    assert [item for part in parts for item in part] == list(range(12)) and {len(part) for part in parts} == {4}
    with pytest.raises(ValueError, match="7 items cannot be split evenly over 2 processes"):
        Share(0, 2).of(7)
