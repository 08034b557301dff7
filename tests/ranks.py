"""Functions run on several ranks, gloo processes on this machine, which are forked from a server that has imported everything once."""

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(
    [
        "diffusers_cogvideox.cli",
        "diffusers_cogvideox.generation.generate",
        "peft",
        "torch._dynamo",
        "torch.distributed.tensor.parallel",
        "transformers.models.t5.modeling_t5",
        "diffusers.guiders",
        "sentencepiece",
        "rank_checks",
        "training_runs",
    ]
)
FOLDERS = [str(Path(__file__).parents[1] / name) for name in ("tests", "benchmarks")]


def run(count: int, check: Callable[..., Any], *arguments: Any, timeout: float = 100) -> list[Any]:
    """What `check(*arguments)` returns on each of `count` ranks; a failed rank fails the test with its traceback."""
    outcomes = outcomes_of(count, check, *arguments, timeout=timeout)
    failed = {rank: error for rank, (result, error) in enumerate(outcomes) if error is not None}
    assert not failed, "\n".join(f"--- rank {rank} of {count}\n{error}" for rank, error in failed.items())
    return [result for result, _ in outcomes]


def outcomes_of(
    count: int, check: Callable[..., Any], *arguments: Any, timeout: float = 100, patience: float = 60
) -> list[tuple[Any, str | None]]:
    """(result, None) or (None, traceback) of each rank; a rank that says nothing within `timeout` seconds is ended.

    A rank waits for the others for `patience` seconds.
    """
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        return _outcomes(f"file://{folder}/ranks", count, check, arguments, timeout, patience)


def _start_server() -> None:
    """Start the server, unless it runs, with the path of the tests: what it cannot import, every rank would import again."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in FOLDERS:
            patch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
        forkserver.ensure_running()


def _outcomes(
    meeting: str, count: int, check: Callable[..., Any], arguments: tuple[Any, ...], timeout: float, patience: float
) -> list[tuple[Any, str | None]]:
    pipes = [START.Pipe(duplex=False) for _ in range(count)]
    processes = [
        START.Process(target=_rank, args=(sender, rank, count, meeting, check, arguments, patience), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(processes, pipes, strict=True):
        process.start()
        sender.close()
    outcomes: dict[Connection, tuple[Any, str | None]] = {}
    waiting, deadline = [receiver for receiver, _ in pipes], time.monotonic() + timeout
    while waiting and (ready := wait(waiting, max(0.0, deadline - time.monotonic()))):
        for receiver in ready:
            try:
                outcomes[receiver] = receiver.recv()
            except EOFError:
                outcomes[receiver] = (None, "ended without a word")
            waiting.remove(receiver)
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    return [outcomes.get(receiver, (None, f"nothing for {timeout} seconds")) for receiver, _ in pipes]


def _rank(
    sender: Connection, rank: int, count: int, meeting: str, check: Callable[..., Any], arguments: tuple[Any, ...], patience: float
) -> None:
    import torch

    gc.freeze()  # collections of garbage need not go through what is imported
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        timeout = timedelta(seconds=patience)
        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=count, timeout=timeout)
        sender.send((check(*arguments), None))
        torch.distributed.destroy_process_group()
    except BaseException:
        sender.send((None, traceback.format_exc()))
