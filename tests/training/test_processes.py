"""Training on two processes: the same run as on one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def train(options: dict[str, object], processes: int) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights and log of a short run on so many processes."""
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
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder / "final" / "diffusion_pytorch_model.safetensors"), lines


def test_two_processes_train_as_one(tmp_path: Path, parts: dict[str, str], tiny_model: dict[str, object]) -> None:
    (alone, log), (together, shared_log) = (
        train({"output": str(tmp_path / str(count)), "model": tiny_model, **parts}, count) for count in (1, 2)
    )
    for name, tensor in alone.items():  # Muon iterates in bfloat16
        torch.testing.assert_close(together[name], tensor, atol=5e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
    assert [line["loss"] for line in shared_log] == pytest.approx([line["loss"] for line in log], rel=1e-3)
    assert [line["lr"] for line in shared_log] == [line["lr"] for line in log]
    assert shared_log[-1]["loss"] != shared_log[0]["loss"]


def test_shares_cover_a_batch_once() -> None:
    parts = [list(range(12))[Share(rank, 3).of(12)] for rank in range(3)]
    assert [item for part in parts for item in part] == list(range(12)) and {len(part) for part in parts} == {4}
    with pytest.raises(ValueError, match="7 items cannot be split evenly over 2 processes"):
        Share(0, 2).of(7)
