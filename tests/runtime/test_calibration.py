"""Calibrations as values: what is chosen, what is refused, what a file holds."""

import json
import math

import pytest
import torch

from diffusers_cogvideox.models.transformer import CogVideoXTransformer3DModel
from diffusers_cogvideox.runtime.calibration import (
    CACHES,
    Calibration,
    CalibrationError,
    Measured,
    Residuals,
    Schedule,
    cache_config,
    latent_errors,
    strengths,
    summarize,
    weights_signature,
)
from parity import TINY_TRANSFORMERS, randomize

RESIDUALS = Residuals(
    ratios=(1.0, 0.9, 0.8, 0.85),
    changes=(0.0, 0.3, 0.2, 0.1),
    first_block=(0.0, 0.5, 0.2, 0.1),
    embeddings=(0.0, 0.2, 0.1, 0.05),
    coefficients=(2.0, 0.0),
)


def row(cache, passes, bound, strength=2.0):
    return Measured(cache=cache, strength=strength, passes=passes, mean=bound / 2, largest=bound / 1.5, bound=bound)


ROWS = (row("sea", 3.0, 0.01), row("tea", 2.0, 0.04), row("mag", 1.5, 0.2), row("taylor", 2.0, 0.03))
SCHEDULE = Schedule(steps=4, sampler="ddim", guidance_scale=6.0, residuals=RESIDUALS, measured=ROWS)
LOOP = {"steps": 4, "sampler": "ddim", "guidance_scale": 6.0}


@pytest.fixture
def model():
    return randomize(CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"]))


@pytest.fixture
def calibration(model):
    return Calibration(signature=weights_signature(model), size=(9, 32, 48), videos=3, schedules=(SCHEDULE,))


@pytest.mark.parametrize(
    ("cache", "max_error", "chosen"),
    [("auto", 0.05, "taylor"), ("auto", 0.2, "mag"), ("auto", 0.02, "sea"), ("auto", 0.01, "sea"), ("tea", 0.05, "tea")],
)
def test_the_fewest_passes_within_the_bound(calibration, cache, max_error, chosen):
    """Of equally many passes the smaller error."""
    schedule, found = calibration.choose(cache, max_error, **LOOP)
    assert (schedule, found.cache) == (SCHEDULE, chosen)


@pytest.mark.parametrize(
    ("cache", "max_error", "changes", "message"),
    [
        ("auto", 0.005, {}, r"max_error=0.005 is not kept by cache='auto' .* the smallest predicted error is 0\.01"),
        ("tea", 0.03, {}, r"cache='tea' with 4 steps of ddim .* is 0\.04"),
        ("faster", 0.1, {}, "cache='faster' was not measured with 4 steps"),
        ("auto", 0.1, {"steps": 5}, r"not measured for 5 steps of ddim with guidance_scale=6, but for: 4 steps"),
        ("auto", 0.1, {"sampler": "dpmsolver++"}, "not measured for 4 steps of dpm"),
        ("auto", 0.1, {"guidance_scale": 3.0}, "guidance_scale=3, but for"),
    ],
)
def test_what_was_not_measured_is_refused(calibration, cache, max_error, changes, message):
    with pytest.raises(CalibrationError, match=message):
        calibration.choose(cache, max_error, **LOOP | changes)


def test_files(calibration, tmp_path):
    calibration.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == calibration
    for content in ("no JSON", "{}", json.dumps({"schedules": [{"steps": 4}]})):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(CalibrationError, match=r"other\.json is not a calibration"):
            Calibration.load(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_known_in_every_precision(calibration, model, dtype):
    calibration.check_weights(model.to(dtype))
    with torch.no_grad():
        model.norm_final.weight += 0.05
    with pytest.raises(CalibrationError, match="measured with other weights"):
        calibration.check_weights(model)


def test_errors_are_relative_norms():
    exact = torch.tensor([[3.0, 4.0], [0.0, 2.0]]).reshape(2, 1, 1, 1, 2)
    cached = exact + torch.tensor([[0.3, 0.4], [0.0, 0.0]]).reshape(2, 1, 1, 1, 2)
    assert latent_errors(cached, exact) == pytest.approx([0.1, 0.0])


def test_the_bound_of_a_lognormal():
    """For log-normal errors it is the quantile of 3 standard deviations, or half again the largest; hardly a video exceeds it."""
    errors = torch.exp(-4 + 0.3 * torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).tolist()
    found = summarize("sea", 0.1, 12.0, errors[:12])
    logs = torch.tensor(errors[:12], dtype=torch.float64).log()
    assert found.bound == pytest.approx(max(math.exp(logs.mean() + 3 * logs.std()), 1.5 * max(errors[:12])), rel=1e-3)
    assert sum(error > found.bound for error in errors) / len(errors) < 0.02
    assert summarize("sea", 0.1, 12.0, [0.01]).bound == pytest.approx(0.015)
    assert summarize("sea", 0.1, 12.0, [0.01, 0.01, 0.01]).bound == pytest.approx(0.015)


@pytest.mark.parametrize("cache", CACHES)
def test_every_cache_has_strengths_and_a_config(cache, model):
    found = strengths(cache, SCHEDULE)
    assert found and sorted(found) == found
    for strength in found:
        model.enable_cache(cache_config(row(cache, 1.0, 0.1, strength), SCHEDULE))
        model.disable_cache()
