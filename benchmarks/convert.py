"""How long does it take to convert a checkpoint of CogVideoX-5B, and with how much memory? Random weights in the original code's layout.

    python benchmarks/convert.py [--tiny] [--folder TEMPORARY_FOLDER] [--output FILE.json]

Writes a transformer of 11 GB below the folder, converts it to a model folder of diffusers and back in a process of its own each,
compares the hashes of the two checkpoints, and deletes all of it. Memory is what belongs to the process alone (RssAnon of /proc, Linux
only): pages of files that are mapped or were just written are the system's cache, which it takes back when it needs to.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import RESULTS, write_result
from diffusers_cogvideox import PRESETS, CogVideoXTransformer3DModel
from diffusers_cogvideox.checkpoints.lazy import LazyTensor
from diffusers_cogvideox.checkpoints.reading import read_tensors
from diffusers_cogvideox.checkpoints.sat import MODEL_PREFIX, transformer_rules
from diffusers_cogvideox.checkpoints.writing import write_pickle
from diffusers_cogvideox.conversion.positions import generated

PRESET = PRESETS["5b"]
TINY = {"num_layers": 2, "num_attention_heads": 2, "text_embed_dim": 32, "time_embed_dim": 32}


def random_checkpoint(path: Path, tiny: bool) -> int:
    """Write a transformer with random bfloat16 weights as the original code does; returns the bytes of its tensors."""
    config = PRESET.transformer | (TINY if tiny else {})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in CogVideoXTransformer3DModel(**config).state_dict().items()}
    tensors = {
        name: LazyTensor(torch.empty(shape, dtype=torch.bfloat16, device="meta"), partial(random_tensor, name, shape))
        for name, shape in shapes.items()
    }
    named = generated(config, torch.bfloat16) | transformer_rules(learned_positions=False).backward(tensors)
    path.parent.mkdir(parents=True)
    write_pickle(path, {"module": {f"{MODEL_PREFIX}{name}": tensor for name, tensor in named.items()}})
    return sum(tensor.nbytes for tensor in named.values())


BLOCK = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).bfloat16()


def random_tensor(name: str, shape: torch.Size) -> Tensor:
    """A stretch of random numbers that begins elsewhere for every name, the same every time."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") % len(BLOCK)
    count = shape.numel()
    return BLOCK.repeat((start + count) // len(BLOCK) + 1)[start : start + count].reshape(shape)


def measured(*arguments: str) -> dict[str, Any]:
    """Run `cogvideox` with these arguments; its seconds, and the peak of its own memory and of all its resident memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "diffusers_cogvideox", *arguments], stdout=subprocess.DEVNULL)
    peaks = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        for name, value in memory_kib(process.pid).items():
            peaks[name] = max(peaks[name], value)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"the conversion failed with status {process.returncode}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_own_gib": round(peaks["RssAnon"] / 2**20, 3),
        "peak_with_mapped_files_gib": round(peaks["VmHWM"] / 2**20, 3),
    }


def memory_kib(pid: int) -> dict[str, int]:
    """RssAnon and VmHWM of a process; nothing when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmHWM:"))}


def digest(path: Path) -> str:
    """A hash of all tensors of a checkpoint with their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(read_tensors(path)[0].items()):
        found.update(name.encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Make, convert, convert back, compare, delete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny widths, to try the script")
    parser.add_argument("--folder", default=None, help="where to put 34 GB of temporary files")
    parser.add_argument("--output", type=Path, default=RESULTS / "convert.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder, "sat", "1", "mp_rank_00_model_states.pt")
        size = random_checkpoint(source, options.tiny)
        source.parent.with_name("latest").write_text("1")
        there = measured("convert", f"{folder}/sat", f"{folder}/diffusers")
        shards = sorted(path.name for path in Path(folder, "diffusers").iterdir())
        back = measured("convert", f"{folder}/diffusers", f"{folder}/again")
        again = Path(folder, "again", "1", "mp_rank_00_model_states.pt")
        result = {
            "checkpoint": {"tensors_gb": round(size / 1e9, 3), "file_gb": round(source.stat().st_size / 1e9, 3)},
            "sat_to_diffusers": there | {"files": shards},
            "diffusers_to_sat": back,
            "round_trip_is_bit_identical": digest(source) == digest(again),
        }
    write_result(options.output, result)
    print(result)


if __name__ == "__main__":
    main()
