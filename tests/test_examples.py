"""Every script in examples/ runs, on a tiny pipeline in place of the shipped one, and makes the file that it names."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from diffusers_cogvideox import cli
from diffusers_cogvideox.conversion.options import ConvertOptions
from tiny_pipeline import save_stock_folder

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {variant: save_stock_folder(tmp_path_factory.mktemp(variant), variant) for variant in ("5b", "5b-i2v")}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, folders, tmp_path, monkeypatch, capsys):
    folder = folders["5b-i2v" if script.stem == "image_to_video" else "5b"]
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 40
    suffix = ".png" if "OUTPUT.png" in script.read_text(encoding="utf-8") else ".mp4"
    output = tmp_path / f"made{suffix}"
    monkeypatch.setattr(sys, "argv", [str(script), str(folder), str(output)])
    runpy.run_path(str(script), run_name="__main__")
    assert output.stat().st_size > 0
    assert str(output) in capsys.readouterr().out


def test_full_size_benchmark_runs_in_small(tmp_path, monkeypatch):
    """The same code as for the full size, on tiny models."""
    result = tmp_path / "result.json"
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["full_size_2b.py", "--tiny", "--steps", "2", "--output", str(result)])
    runpy.run_path(str(ROOT / "benchmarks" / "full_size_2b.py"), run_name="__main__")
    measured = json.loads(result.read_text(encoding="utf-8"))
    assert measured["video"] == {"frames": 9, "height": 240, "width": 240, "steps": 2}
    assert set(measured["seconds"]) >= {"build", "denoise", "decode"}
    assert 0 < measured["peak_gib"] < 100
    assert measured["machine"]["torch"]


def test_vae_benchmark_runs_in_small(tmp_path, monkeypatch, capsys):
    """Part by part into one file; the table is made from it."""
    result = tmp_path / "vae.json"
    script = str(ROOT / "benchmarks" / "vae.py")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    common = ["vae.py", "--threads", str(torch.get_num_threads()), "--output", str(result)]
    small = ["--widths", "4", "4", "4", "4", "--frames", "5", "--height", "16", "--width", "16", "--pairs", "1"]
    for options in (["--only", "decode-float32", *small], ["--only", "error", *small], ["--table"]):
        monkeypatch.setattr(sys, "argv", common + options)
        runpy.run_path(script, run_name="__main__")
    measured = json.loads(result.read_text(encoding="utf-8"))["parts"]["cpu"]
    assert measured["decode-float32"]["ratio"]["ours against stock"] > 0
    assert measured["error"]["encode"]["float32"]["relative_rms"] < 5e-6
    assert result.with_suffix(".png").stat().st_size > 0
    assert "| decode, float32, CPU, 5 x 16 x 16: seconds (times as fast) |" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "target"), [("sat_to_diffusers", "diffusers"), ("diffusers_to_sat", "sat")])
def test_conversion_scripts(name, target, tmp_path, monkeypatch):
    handed = []
    monkeypatch.setitem(
        cli.VERBS, "convert", dataclasses.replace(cli.VERBS["convert"], run=lambda options: handed.append(options) or "done")
    )
    monkeypatch.setattr(sys, "argv", [name, "in", "out", "--verify"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "conversion" / f"{name}.py"), run_name="__main__")
    assert handed == [ConvertOptions("in", "out", to=target, verify=True)]
