"""What takes minutes: checkpoints of the real DeepSpeed, and the memory that a conversion of 11 GB needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_cogvideox.conversion.sources import open_source

ROOT = Path(__file__).resolve().parents[2]

TRAINING = """
import sys, torch, deepspeed
sys.path[:0] = sys.argv[4:]
from sat_cases import tiny_transformer
from transformer_cases import inputs

model = tiny_transformer("1.5-5b-i2v")
for name, parameter in model.named_parameters():
    parameter.requires_grad_("ofs_embedding" not in name)
optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": int(sys.argv[1])}}
config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
engine.backward(engine(**inputs(model))[0].square().mean())
engine.step()
engine.save_checkpoint(sys.argv[2])
"""
MERGING = """
import sys, torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as merge
torch.save({name: tensor.clone() for name, tensor in merge(sys.argv[1]).items()}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_of_deepspeed_itself(tmp_path, stage):
    """Two ranks on the CPU, with frozen parameters; merged to what DeepSpeed's own script makes of them."""
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + stage), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", TRAINING, str(stage), str(tmp_path / "run"), "", str(ROOT / "src"), str(ROOT / "tests")]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    assert [process.wait(600) for process in ranks] == [0, 0]
    subprocess.run([sys.executable, "-c", MERGING, str(tmp_path / "run"), str(tmp_path / "theirs.pt")], check=True, env=environment)
    theirs = torch.load(tmp_path / "theirs.pt", weights_only=True)
    found = open_source(tmp_path / "run").groups["transformer"].tensors
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name].make(), tensor) for name, tensor in theirs.items())


@pytest.mark.slow
def test_memory_of_converting_a_model_of_11_gb(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "convert.py"), "--folder", str(tmp_path), "--output", str(tmp_path / "result.json")]
    subprocess.run(script, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["round_trip_is_bit_identical"]
    for direction in ("sat_to_diffusers", "diffusers_to_sat"):
        assert result[direction]["peak_own_gib"] < 3
