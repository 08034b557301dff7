"""A short training run, for tests that make it on one process and on several."""

import os
from typing import Any

from torch import distributed as dist

from diffusers_cogvideox.training.config import DataOptions, Optimisation, Stage, TrainConfig
from diffusers_cogvideox.training.loop import run
from diffusers_cogvideox.training.transformer import TransformerTask


def train(options: dict[str, Any]) -> None:
    """Five steps of a transformer, on pictures and on clips."""
    stages = [Stage(steps=3, batch_size=4, frames=1), Stage(steps=2, batch_size=2, frames=9)]
    tuning = Optimisation(learning_rate=1e-3, muon_learning_rate=0.01, warmup_steps=2)
    config = TrainConfig(
        task="transformer", stages=stages, data=DataOptions(height=32, width=32, clips=4), optimisation=tuning, log_every=1, **options
    )
    run(config, TransformerTask(config))


def train_together(options: dict[str, Any], port: int) -> None:
    """The same on a rank, which finds the others by what torchrun tells its processes."""
    rank, count = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in told.items()})
    train(options)
