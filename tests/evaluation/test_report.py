"""`evaluate shapes`: its prompts, its arithmetic against closed forms, and its rows against models whose results are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import caches
import diffusers_cogvideox.evaluation.shapes as shapes
from diffusers_cogvideox import CogVideoXPipeline, cli
from diffusers_cogvideox.data.captions import canonical, parse
from diffusers_cogvideox.data.moving_shapes import Scene, ShapeSpec, all_scenes, render, split
from diffusers_cogvideox.evaluation.detectors import Detection
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.evaluation.report import Rate, Row, Sample, ShapesReport, paired_difference, tally
from diffusers_cogvideox.evaluation.shapes import evaluate_shapes, held_out_prompts
from diffusers_cogvideox.options import EvaluateOptions
from tiny_pipeline import save_stock_folder

RED = ShapeSpec("circle", "red", "moves right")
ATTRIBUTES = {"color", "shape", "motion", "background", "all"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model of clips that are long and large enough for the detectors."""
    path = save_stock_folder(tmp_path_factory.mktemp("evaluation"))
    (path / "cogvideox.json").write_text(json.dumps({"num_inference_steps": 1, "height": 64, "width": 64, "num_frames": 17}))
    return path


@pytest.fixture(scope="module")
def pipeline(folder) -> CogVideoXPipeline:
    return CogVideoXPipeline.from_pretrained(folder)


def options(folder: Path, **changes) -> EvaluateOptions:
    baselines = {"untrained_prompts": 2} if changes.get("baselines", True) else {}
    return EvaluateOptions("shapes", str(folder), **{"prompts": 3, "batch_size": 2, "device": "cpu"} | baselines | changes)


def test_differences_between_answers_to_the_same_questions():
    """The interval holds the truth in about 95 % of many draws, is narrower than without pairs, and turns with the order."""
    assert paired_difference([True, False, False, True], [True, True, True, False])[0] == 0.25
    rng, truth, held = np.random.default_rng(0), 0.02 - 0.05, 0
    for _ in range(1000):
        cells = rng.multinomial(60, [0.7, 0.05, 0.02, 0.23])
        before, after = (np.repeat(kind, cells).tolist() for kind in ([True, True, False, False], [True, False, True, False]))
        _, (low, high) = paired_difference(before, after)
        assert paired_difference(after, before)[1] == pytest.approx((-high, -low))
        held += low <= truth <= high
    assert 0.93 < held / 1000 < 0.99
    whole = [True] * 240 + [False] * 60
    low, high = paired_difference(whole, whole)[1]
    assert low == -high and high < 0.007 < np.diff(Rate(240, 300).interval())[0] / 2
    with pytest.raises(ValueError, match="2 and 1 answers are not to the same questions"):
        paired_difference([True, True], [True])


def test_rows_of_the_table_of_caches():
    """Two batches of the benchmark, of two videos and one."""

    def record(*right: bool, error: float, passes: float, seconds: float) -> caches.Record:
        scores = [{"all": value} for value in right]
        return caches.Record([error] * len(right), [math.inf if error == 0 else 30.0] * len(right), scores, passes, seconds)

    exact = [record(True, True, error=0, passes=40, seconds=6), record(False, error=0, passes=20, seconds=3)]
    fewer = [record(True, False, error=0.1, passes=20, seconds=2), record(False, error=0.4, passes=10, seconds=1)]
    row = caches.to_json(fewer, exact)
    assert (row["passes"], row["speed_up"], row["psnr"], row["error"], row["largest_error"]) == (10, 3, 30, 0.2, 0.4)
    assert (row["all_correct"], row["points"]) == (0.3333, -33.33) and row["points_interval"][0] < -33.33 < row["points_interval"][1]
    assert caches.to_json(exact, exact)["psnr"] is None and caches.to_json(exact, exact)["points"] == 0


# --- metrics and rates --------------------------------------------------------------------------------------------------


def test_psnr_of_a_constant_error():
    """MSE of an offset c is c^2, so PSNR = 20 log10(R / c)."""
    video = np.random.default_rng(0).integers(0, 200, (3, 4, 5, 3)).astype(np.uint8)
    assert psnr(video, video + np.uint8(10), 255) == pytest.approx(20 * math.log10(25.5))
    assert psnr(video / 127.5 - 1, (video + 10) / 127.5 - 1, 2) == pytest.approx(20 * math.log10(25.5))


def test_psnr_of_equal_and_of_unequal_shapes():
    video = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(video, video, 255) == math.inf
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 3\) and \(1, 4, 4, 3\) cannot be compared"):
        psnr(video, video[:1], 255)


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_interval(right, asked, low, high):
    """The last two are examples of Newcombe 1998, table I, method 3; the first two follow by hand."""
    assert Rate(right, asked).interval() == pytest.approx((low, high), abs=1e-4)


def test_tally_counts_what_was_asked():
    rates = tally([{"color": True, "all": True}, {"color": False, "background": True, "all": False}])
    assert rates == {"color": (1, 2), "all": (1, 2), "background": (1, 1)}


def report(*samples: Sample) -> ShapesReport:
    rows = {
        "generated": Row(rates={"color": Rate(9, 10), "all": Rate(1, 2)}),
        "reconstruction": Row(rates={"color": Rate(1, 1)}, psnr=31.26),
    }
    return ShapesReport(settings={"steps": 3}, options={}, versions={}, seconds_per_video=0.5, rows=rows, samples=samples)


def test_table():
    head, generated, reconstruction = report().table().splitlines()
    assert head.split() == ["videos", "color", "all", "PSNR"]
    assert generated.split() == ["generated", "10", "90.0", "(60-98)", "50.0", "(9-91)"]
    assert reconstruction.split() == ["reconstruction", "1", "100.0", "(21-100)", "31.3", "dB"]
    assert head.index("color") + len("color") == generated.index("98)") + len("98)")


def test_labels_say_what_was_found():
    sample = Sample(prompt="a red circle", seed=0, wanted=Scene(), found=Detection("navy", (RED,)), score={"color": True, "all": True})
    assert sample.label == "a red circle | found: red circle moves right on navy | right"
    sample = Sample(prompt="p", seed=0, wanted=Scene(), found=Detection("navy", ()), score={"color": False, "motion": False, "all": False})
    assert sample.label == "p | found: no shape on navy | wrong: color, motion"


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    video = np.zeros((9, 16, 16, 3), np.uint8)
    sample = Sample(prompt="p", seed=0, wanted=Scene("navy", (RED,)), found=Detection("navy", ()), score={"all": False}, video=video)
    files = report(sample).save(tmp_path / "whole")
    assert [path.name for path in files] == ["shapes.json", "shapes.png"]
    assert json.loads(files[0].read_text())["samples"][0]["wanted"]["shapes"][0]["color"] == "red"
    with Image.open(files[1]) as sheet:
        assert sheet.width > 8 * 16

    monkeypatch.setattr("diffusers_cogvideox.evaluation.report.write_image", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report(sample).save(tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


# --- prompts ------------------------------------------------------------------------------------------------------------


def test_prompts_are_held_out_and_mean_their_scenes():
    prompts = held_out_prompts(450)
    _, held_out = split(all_scenes(1))
    assert {prompt.scene for prompt in prompts} == set(held_out)
    for prompt in prompts:
        (wanted,), (shown,) = prompt.wanted.shapes, prompt.scene.shapes
        assert prompt.wanted == parse(prompt.text)
        assert wanted == shown
        assert prompt.wanted.background in (None, prompt.scene.background)


def test_prompts_are_a_fixed_sequence():
    assert held_out_prompts(20) == held_out_prompts(300)[:20]
    assert held_out_prompts(20, seed=1) != held_out_prompts(20)


def test_half_of_the_prompts_are_paraphrases():
    prompts = held_out_prompts(300)
    canonical_share = np.mean([prompt.text == canonical(prompt.scene) for prompt in prompts])
    assert canonical_share == pytest.approx(0.5, abs=0.02)
    assert 0.05 < np.mean([prompt.wanted.background is None for prompt in prompts]) < 0.25


# --- rows ---------------------------------------------------------------------------------------------------------------


def test_a_perfect_model_is_always_right(pipeline, folder, monkeypatch):
    """In place of the model: the scene that the prompt describes."""

    def draw(pipe, texts, seeds, settings):
        scenes = (prompt.scene for text in texts for prompt in held_out_prompts(20) if prompt.text == text)
        return np.stack([np.rint(render(scene, np.random.default_rng(7)) * 127.5 + 127.5) for scene in scenes]).astype(np.uint8)

    monkeypatch.setattr(shapes, "make_videos", draw)
    found = evaluate_shapes(pipeline, options(folder, prompts=20, baselines=False))
    assert {name: rate.share for name, rate in found.rows["generated"].rates.items()} == dict.fromkeys(ATTRIBUTES, 1.0)
    assert found.rows.keys() == {"generated"}
    assert all(sample.label.endswith("| right") for sample in found.samples)


def test_a_random_model_and_its_baselines(pipeline, folder):
    scheduler = pipeline.scheduler
    found = evaluate_shapes(pipeline, options(folder, sampler="dpm"))
    assert pipeline.scheduler is scheduler
    assert list(found.rows) == ["generated", "ground truth", "reconstruction", "untrained", "other prompts"]
    assert found.rows["ground truth"].rates["all"] == (3, 3)
    assert found.rows["generated"].rates["all"] == (0, 3)
    assert found.rows["untrained"].rates["all"].asked == 2
    quality = found.rows["reconstruction"].psnr
    assert quality is not None
    assert 0 < quality < 20
    assert [sample.seed for sample in found.samples] == [0, 1, 2]
    assert (found.settings["sampler"], found.settings["num_inference_steps"], found.settings["dtype"]) == ("dpm", 1, "float32")


def test_batches_do_not_change_the_videos(pipeline, folder):
    one, two = (evaluate_shapes(pipeline, options(folder, batch_size=size, baselines=False)) for size in (1, 2))
    for left, right in zip(one.samples, two.samples, strict=True):
        assert np.abs(left.video.astype(int) - right.video).max() <= 1  # rounding of sums in another order


def test_the_verb_writes_a_report_once(folder, tmp_path, capsys):
    arguments = [
        "evaluate",
        "shapes",
        str(folder),
        "--prompts",
        "2",
        "--untrained-prompts",
        "1",
        "--output",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[1].startswith("generated")
    assert shown[-2:] == [str(tmp_path / "shapes.json"), str(tmp_path / "shapes.png")]
    content = json.loads((tmp_path / "shapes.json").read_text())
    assert content["rows"]["ground truth"]["rates"]["all"]["share"] == 1
    assert len(content["samples"]) == 2
    assert cli.main(arguments) == 2
    assert "shapes.json exists already" in capsys.readouterr().err
    assert cli.main([*arguments, "--overwrite"]) == 0
