"""The guidance formulas against the recorded numbers of the original code and the closed form."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cogvideox.pipelines.guidance import dynamic_rule, guidance_at, guide


def scales(rule: str, steps: int) -> list[float]:
    ratio = 1000 / steps
    timesteps = [round(1000 - i * ratio) - 1 for i in range(steps)]
    return [guidance_at(rule, 6.0, index=i, timestep=t, steps=steps) for i, t in enumerate(timesteps)]


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("rule", "recorded"), [("stock", "dyn_cfg_sat"), ("progress", "dyn_cfg_intended")])
def test_schedules_equal_those_of_the_original_code(reference: Path, rule: str, recorded: str, steps: int):
    expected = load_file(reference / "sat" / "sampler_io.safetensors")[f"{recorded}_{steps}"]
    torch.testing.assert_close(torch.tensor(scales(rule, steps), dtype=torch.float64), expected)


def test_stock_schedule_begins_as_published():
    expected = torch.tensor([2.291, 2.544, 6.974, 6.420, 2.788, 4.272, 1.038, 4.170])
    torch.testing.assert_close(torch.tensor(scales("stock", 50)[:8]), expected, atol=6e-4, rtol=0)


def test_progress_rises_from_1_towards_1_plus_w():
    values = scales("progress", 28)
    assert values == sorted(values)
    assert values[0] == 1.0
    assert math.isclose(guidance_at("progress", 6.0, index=28, timestep=0, steps=28), 7.0)


def test_constant_guidance_is_the_scale_itself():
    assert guidance_at(None, 6.0, index=3, timestep=500, steps=10) == 6.0


def test_guide_extrapolates_from_the_unconditional_prediction():
    u, c = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guide(u, c, 0.0), u)
    torch.testing.assert_close(guide(u, c, 1.0), c)
    torch.testing.assert_close(guide(u, c, 3.0), 3 * c - 2 * u)


def test_rule_names():
    assert [dynamic_rule(value) for value in (False, True, "stock", "progress")] == [None, "stock", "stock", "progress"]
    with pytest.raises(ValueError, match=r"'cosine' is unknown.*progress"):
        dynamic_rule("cosine")
