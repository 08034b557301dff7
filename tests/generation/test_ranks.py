"""`torchrun ... -m diffusers_cogvideox generate`: one video, made by several processes; and processes that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rank_checks
import ranks
from diffusers_cogvideox import cli
from diffusers_cogvideox.models.collectives import Group
from diffusers_cogvideox.models.tensor_parallel import keep_share
from diffusers_cogvideox.runtime import launch
from diffusers_cogvideox.runtime.launch import Launch, launched, together
from diffusers_cogvideox.runtime.memory import available
from diffusers_cogvideox.runtime.memory.facts import ModelFacts
from diffusers_cogvideox.video_io import read_video
from transformer_cases import tiny_twins

SMALL = ["--frames", "9", "--size", "32x48", "--steps", "2", "--dtype", "float32"]
COMMON = ["generate", "a red circle", *SMALL]


def torchrun(count: int, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False)


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory) -> np.ndarray:
    """Frames of the video of one process."""
    path = tmp_path_factory.mktemp("alone") / "a.mp4"
    assert cli.main([*COMMON, "--model", str(folders()), "--output", str(path)]) == 0
    return read_video(path)[0].astype(int)


def test_generate_on_two_processes(folders, tmp_path, alone):
    """The video of one process, from two; each says what it does, and the first one writes."""
    command = [*COMMON, "--model", str(folders()), "--output", str(tmp_path / "together")]
    done = torchrun(2, "-m", "diffusers_cogvideox", *command)
    assert done.returncode == 0, done.stderr
    (path,) = map(Path, done.stdout.split())
    assert "rank 0 of 2: the half without the prompt" in done.stderr and "rank 1 of 2: the half with the prompt" in done.stderr
    assert sorted(part.suffix for part in path.parent.iterdir()) == [".json", ".mp4", ".png"]
    assert json.loads(path.with_suffix(".json").read_text())["processes"]["count"] == 2
    assert np.abs(read_video(path)[0] - alone).mean() < 0.5


def test_mistakes_are_told_once(folders, tmp_path):
    """And before weights are loaded, or by all."""
    common = ["generate", "x", "--model", str(folders()), *SMALL, "--output", str(tmp_path)]
    mistakes = [
        (["--steps", "0"], "--steps 0 is not possible", False),
        (["--frames", "9000"], "9000", True),
        (["--ram", "1MB"], "The smallest budget that works is", False),
        (["--parallel", "cfg", "--guidance-scale", "1"], "without guidance there is only one half", False),
    ]
    first, second = ranks.run(2, rank_checks.command_lines, [[*common, *flags] for flags, _, _ in mistakes])
    for (_, message, silent), (status, said, _), (other, said_too, _) in zip(mistakes, first, second, strict=True):
        assert (status, other) == (2, 2) and message in said and bool(said_too) != silent
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("way", "place"), [("cfg", "disk"), ("ring", "disk"), ("tensor", "streamed")])
def test_weights_stream_on_every_rank(folders, tmp_path, alone, way, place):
    """Each follows the same plan within its own budget, which counts what it computes and holds."""
    command = [*COMMON, "--model", str(folders()), "--parallel", way, "--ram", "2GB", "--output", str(tmp_path / "a.mp4")]
    outcomes = ranks.run(2, rank_checks.command_lines, [command], place)
    assert [status for ((status, _, _),) in outcomes] == [0, 0], outcomes
    report = json.loads((tmp_path / "a.json").read_text())["memory"]
    assert {"transformer streamed", "text_encoder streamed"} <= set(report["active"])
    hits = {effect["name"]: effect["hits"] for effect in report["effects"]}
    assert hits["streamed weights"] > 0 and (way == "cfg" or hits["parallelism"] > 0)
    assert report["plan"]["placements"]["transformer"] == place and report["plan"]["ram"] == 2 * 10**9
    assert report["plan"]["work"]["sequential"] == (way == "cfg")
    assert np.abs(read_video(tmp_path / "a.mp4")[0] - alone).mean() < 0.5


def test_an_interrupted_video_goes_on_on_all_ranks(folders, tmp_path):
    """The first rank keeps the state, and no rank makes a step twice."""
    command = [*COMMON, "--model", str(folders()), "--steps", "3", "--sampler", "dpm", "--checkpoint-every", "1", "--output"]
    for statuses, made in ranks.run(2, rank_checks.interrupted, [*command, str(tmp_path / "a.mp4")], 2):
        assert (statuses, made) == ([130, 0], [2, 2])  # the second step was not recorded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png"]
    ranks.run(2, rank_checks.command_lines, [[*command, str(tmp_path / "whole.mp4")]])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_a_plan_counts_the_largest_share_of_the_weights():
    """Three heads on two ranks: the first one has two of them."""
    model, _ = tiny_twins("5b", num_attention_heads=3)
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    whole, shared = (ModelFacts("tiny", "", config, {}, tensor_ranks=count).transformer_part for count in (1, 2))
    assert whole.parameters == sum(parameter.numel() for parameter in model.parameters())
    keep_share(model.transformer_blocks, Group("two", 0, 2))
    assert shared.parameters == sum(parameter.numel() for parameter in model.parameters()) < whole.parameters


def test_several_videos_and_the_example(folders, tmp_path):
    """What is there is left alone, by all; the example says what each rank does."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    command = ["generate", str(tmp_path / "prompts.txt"), "--model", str(folders()), *SMALL, "--output", str(tmp_path / "made")]
    first, second = ranks.run(2, rank_checks.command_lines, [[*command, "--parallel", way] for way in ("ring", "tensor")])
    for (status, _, printed), (other, _, nothing) in zip(first, second, strict=True):
        assert (status, other) == (0, 0) and len(printed.split()) == 2 and not nothing
    assert "rank 1 of 2: tokens 2 of 2 (ring)" in first[0][1] and first[1][1].count("is there already") == 2
    assert len(list((tmp_path / "made").glob("*.mp4"))) == 2
    example = Path(__file__).parents[2] / "examples" / "several_gpus.py"
    first, second = ranks.run(2, rank_checks.script, str(example), str(folders()), str(tmp_path / "example.mp4"))
    assert (tmp_path / "example.mp4").is_file() and "rank 1 of 2: the half with the prompt" in second


@pytest.mark.parametrize(
    ("flags", "match"),
    [(["--parallel", "ring"], "start them with torchrun"), (["--parallel", "fast"], "expected one of 'auto', 'cfg'")],
)
def test_one_process_has_nobody_to_share_with(folders, tmp_path, capsys, flags, match):
    with pytest.raises(SystemExit) if "fast" in flags else pytest.MonkeyPatch.context():
        assert cli.main(["generate", "x", "--model", str(folders()), "--output", str(tmp_path), *flags]) == 2
    assert match in capsys.readouterr().err


def test_what_several_processes_cannot_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched() == 2
    with pytest.raises(ValueError, match="--device cuda:1 is one device for 2 processes"), together("cuda:1"):
        pass
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="1 GPUs, but more processes"), together():
        pass


def test_one_process_agrees_with_itself():
    assert Launch().agreed(lambda: 3) == 3 and Launch().least(4) == 4 and Launch().first and Launch().alone


def test_processes_on_one_machine_share_its_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(available.psutil, "virtual_memory", lambda: SimpleNamespace(available=10**10))
    monkeypatch.setattr(available, "_CGROUP", tmp_path)
    monkeypatch.setattr(available, "resident_bytes", lambda: 7)
    assert (available.free_ram(), available.free_ram(4)) == (9 * 10**9 + 7, 2_250_000_000 + 7)


@pytest.mark.parametrize("way", ["dies", "waits"])
def test_a_rank_that_is_lost_ends_the_others(folders, way):
    """With an error, long before the test's own patience ends."""
    outcomes = ranks.outcomes_of(2, rank_checks.lost, str(folders()), way, timeout=60, patience=4)
    error = outcomes[0][1] or "none"
    assert "RuntimeError" in error or "DistBackendError" in error, error
    assert "in exchange" in error or "in _exchange" in error, error  # not later, and not by the test's own timeout


def test_ranks_agree_on_what_the_first_one_says():
    outcomes = ranks.outcomes_of(2, rank_checks.agreement)
    assert "ValueError: of the first" in outcomes[0][1] and "SystemExit: 2" in outcomes[1][1]
