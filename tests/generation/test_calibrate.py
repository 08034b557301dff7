"""The verb `calibrate`, and `cache="auto"` in a pipeline and on the command line, on a tiny model."""

import itertools
import json
import shutil

import pytest
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig
from diffusers.utils import logging

from diffusers_cogvideox import CogVideoXPipeline, cli
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.generation.calibrate import calibrate
from diffusers_cogvideox.generation.calibrate_options import CalibrateOptions
from diffusers_cogvideox.options import GenerateOptions
from diffusers_cogvideox.runtime.calibration import FILE, Calibration, CalibrationError
from tiny_pipeline import call

STEPS = 6
TAYLOR = TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True, taylor_factors_dtype=torch.float32)


@pytest.fixture(scope="module")
def model(folders, tmp_path_factory):
    """A tiny model, calibrated for 6 steps with two prompts and two caches."""
    folder = shutil.copytree(folders(), tmp_path_factory.mktemp("calibrated") / "model")
    (folder / "cogvideox.json").write_text(json.dumps({"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 7}))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    table = calibrate(CalibrateOptions(str(folder), steps=STEPS, prompts=2, caches=("tea", "taylor"), device="cpu"))
    logging.set_verbosity(verbosity)
    assert str(folder / FILE) in table and "taylor" in table
    return folder


@pytest.fixture
def pipe(model):
    return CogVideoXPipeline.from_pretrained(model)


def latents(pipe, **options):
    return call(pipe, num_inference_steps=STEPS, output_type="latent", **options)


def test_what_is_written(model, pipe):
    calibration = Calibration.load(model / FILE)
    (schedule,) = calibration.schedules
    assert (calibration.size, calibration.videos) == ((9, 32, 48), 2)
    assert (schedule.steps, schedule.sampler, schedule.guidance_scale) == (STEPS, "ddim", 6.0)
    assert all(len(getattr(schedule.residuals, name)) == STEPS for name in ("ratios", "changes", "first_block", "embeddings"))
    timesteps = [999, 832, 666, 499, 332, 166]
    with torch.no_grad():
        e = [pipe.transformer.time_embedding(pipe.transformer.time_proj(torch.tensor([t])).float()) for t in timesteps]
    distances = [float((b - a).abs().sum() / a.abs().sum()) for a, b in itertools.pairwise(e)]
    assert schedule.residuals.embeddings == pytest.approx((0.0, *distances), abs=0.02)
    rows = {(row.cache, row.strength): row for row in schedule.measured}
    assert rows["taylor", 2.0].passes == 4  # of 6: steps 0, 1, 2 and 4
    assert all(0 < row.mean <= row.largest <= row.bound for row in rows.values())


def test_an_earlier_file_is_added_to_not_replaced(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "model")
    options = {"prompts": 2, "caches": ("taylor",), "device": "cpu"}
    with pytest.raises(FileExistsError, match=r"calibration\.json exists already"):
        calibrate(CalibrateOptions(str(copy), steps=5, **options))
    calibrate(CalibrateOptions(str(copy), steps=5, overwrite=True, **options))
    assert [schedule.steps for schedule in Calibration.load(copy / FILE).schedules] == [STEPS, 5]


def test_auto_reports_what_it_did(pipe):
    plain = latents(pipe)
    made = latents(pipe, cache="auto", max_error=10.0, measure_error=True)
    report = pipe.cache_report
    assert not pipe.transformer.is_cache_enabled
    assert report.steps == STEPS and report.passes < STEPS and report.predicted is not None
    expected = float((made - plain).norm() / plain.norm())
    assert report.measured == (pytest.approx(expected, rel=1e-4),) and expected > 0
    torch.testing.assert_close(latents(pipe, cache="auto", max_error=10.0), made, rtol=0, atol=0)
    assert pipe.cache_report.measured is None
    assert latents(pipe).equal(plain) and pipe.cache_report is None


def test_a_name_or_a_config_of_ones_own(pipe):
    named = latents(pipe, cache="taylor", max_error=10.0)
    assert pipe.cache_report.name == "taylor"
    torch.testing.assert_close(latents(pipe, cache=TAYLOR), named, rtol=0, atol=0)
    assert pipe.cache_report.predicted is None and pipe.cache_report.config is TAYLOR


@pytest.mark.parametrize("noise", ["one", "one for each"])
def test_the_real_error_with_noise_in_the_steps(pipe, noise):
    """Both loops draw the same noise: the error is that of the cache."""

    def generator():
        one = torch.Generator().manual_seed(1)
        return one if noise == "one" else [one]

    plain = latents(pipe, eta=1.0, generator=generator())
    made = latents(pipe, cache=TAYLOR, measure_error=True, eta=1.0, generator=generator())
    assert pipe.cache_report.measured == (pytest.approx(float((made - plain).norm() / plain.norm()), rel=1e-4),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "fast"}, "cache='fast' is unknown: use 'auto', one of first_block"),
        ({"cache": "auto", "max_error": 0.0}, "max_error=0.0 is not possible"),
        ({"cache": "auto", "max_error": 1e-9}, "max_error=1e-09 is not kept by cache='auto'"),
        ({"cache": "auto", "num_inference_steps": 7}, "caches were not measured for 7 steps"),
        ({"cache": "auto", "guidance_interval": (0, 0.5)}, "measured with guidance in all steps"),
        ({"cache": "auto", "eta": 0.5}, "measured with guidance in all steps, and eta=0"),
        ({"cache": "auto", "use_dynamic_cfg": True}, "with guidance_scale=6 and use_dynamic_cfg, but for"),
        ({"cache": "auto", "use_dynamic_cfg": "progress"}, "not measured with use_dynamic_cfg='progress'"),
        ({"cache": "auto", "measure_error": True, "generator": None}, "twice from the same noise: pass a generator"),
        ({"cache": FirstBlockCacheConfig(), "max_error": 0.1}, "max_error has no effect on a config"),
        ({"max_error": 0.1}, "no effect without a cache"),
        ({"measure_error": True}, "no effect without a cache"),
    ],
)
def test_what_cannot_be_had(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, **{"num_inference_steps": STEPS, "output_type": "latent", **options})
    assert not pipe.transformer.is_cache_enabled


def test_a_cache_that_is_on_already(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=9.0))
    with pytest.raises(ValueError, match="one is on already"):
        latents(pipe, cache="auto")


def test_without_a_calibration(folders):
    pipe = CogVideoXPipeline.from_pretrained(folders())
    with pytest.raises(CalibrationError, match=r"there is no .*calibration\.json of this model"):
        latents(pipe, cache="auto")


def test_a_model_without_a_calibration_on_the_command_line(folders, capsys):
    assert cli.main(["generate", "a red circle", "--model", str(folders()), "--cache", "auto", "--device", "cpu"]) == 2
    assert "makes it" in capsys.readouterr().err


def test_on_the_command_line(model, tmp_path, capsys):
    command = ["generate", "a red circle", "--model", str(model), "--steps", str(STEPS), "--device", "cpu", "--output", str(tmp_path)]
    assert cli.main([*command, "--cache", "auto", "--max-error", "10"]) == 0
    assert "passes, an error of at most" in capsys.readouterr().err
    recipe = next(path for path in tmp_path.glob("*.json"))
    assert {name: json.loads(recipe.read_text())["settings"][name] for name in ("cache", "max_error")} == {"cache": "auto", "max_error": 10}
    assert cli.main(["generate", str(recipe), "--output", str(tmp_path / "again")]) == 0
    assert cli.main([*command, "--cache", "auto", "--max-error", "1e-9", "--overwrite"]) == 2
    assert "max_error=1e-09 is not kept" in capsys.readouterr().err


def test_caches_that_there_are_not(capsys):
    assert cli.main(["calibrate", "demo", "--caches", "foo"]) == 2
    assert "--caches foo is not possible: expected one of first_block, mag" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_error": 0.1}, "--max-error 0.1 has no effect without --cache"),
        ({"cache": "auto", "max_error": -1.0}, "--max-error -1.0 is not possible"),
        ({"cache": "auto", "checkpoint_every": 2}, "--checkpoint-every is not possible with --cache"),
    ],
)
def test_options_that_are_not_possible(options, message):
    with pytest.raises(ValueError, match=message):
        GenerateOptions("a red circle", **options)


def test_the_shipped_calibration_is_that_of_the_shipped_weights():
    """After a change of the weights: `cogvideox calibrate demo --prompts 12 --overwrite`."""
    pipe = CogVideoXPipeline.from_pretrained(demo_model())
    calibration = Calibration.load(demo_model() / FILE)
    calibration.check_weights(pipe.transformer)
    assert calibration.choose("auto", 0.05, steps=20, sampler="ddim", guidance_scale=4.0)[1].passes < 20
