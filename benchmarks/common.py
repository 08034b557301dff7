"""What every benchmark needs: a description of the machine, timing and peak memory by stage, and results that appear whole."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffusers_cogvideox.files import atomic_path
from diffusers_cogvideox.runtime.memory.usage import StageUsage, Usage

__all__ = ["RESULTS", "Stages", "machine", "measured", "peak_gib", "random_model", "timed_call", "write_result"]

Result = TypeVar("Result")

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, memory, accelerator, versions."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "diffusers-cogvideox")},
    }


def _processor() -> str:
    """Name of the processor, from Linux where that is the system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def peak_gib() -> float:
    """Largest resident memory of this process until now, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2 ** (30 if sys.platform == "darwin" else 20), 3)  # macOS counts bytes, Linux KiB


def measured(call: Callable[[], Result], device: torch.device) -> tuple[Result, StageUsage]:
    """What a call gives, its seconds, and the bytes that it took at its peak beyond what there was before it."""
    usage = Usage()
    with usage.stage("before", device):
        pass
    with usage.stage("call", device):
        result = call()
    before, after = usage.stages["before"], usage.stages["call"]
    return result, StageUsage(after.seconds, (after.device or 0) - (before.device or 0), (after.host or 0) - (before.host or 0))


@torch.no_grad()
def random_model(cls: type[nn.Module], config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model whose weights are drawn in `dtype` at once: matrices normal with variance 1 / fan-in, norms the identity."""
    with torch.device("meta"):
        model = cls(**config)
    model = nn.Module.to(model, dtype).to_empty(device="cpu").eval()  # diffusers' own `to` warns about every cast
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return model


def timed_call(pipe: Any, sizes: argparse.Namespace, output_type: str) -> tuple[torch.Tensor, list[float]]:
    """A guided call with random embeddings in place of a prompt and a fixed seed: what it gives, and the seconds of each step.

    `sizes` has frames, height, width and steps.
    """
    config, device, dtype = pipe.transformer.config, torch.device(pipe.device), pipe.transformer.dtype
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 1, config.max_text_seq_length, config.text_embed_dim, generator=generator).to(device, dtype)
    marks: list[float] = []

    def mark(*_: Any) -> dict[str, Any]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        return {}

    mark()
    result = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        num_frames=sizes.frames,
        height=sizes.height,
        width=sizes.width,
        num_inference_steps=sizes.steps,
        generator=generator,
        output_type=output_type,
        callback_on_step_end=mark,
    ).frames
    return result, [after - before for before, after in itertools.pairwise(marks)]


class Stages:
    """Wall time of each stage and the process's peak memory at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_gib: dict[str, float] = {"start": peak_gib()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block as stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)
        self.peak_gib[name] = peak_gib()


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write `result` with the machine's description as JSON; the file appears whole or not at all."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n", encoding="utf-8")
