"""Configuration files and `from_config` between our classes, stock's and the other schedulers of diffusers."""

import inspect
import json
import logging

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.schedulers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXScheduler
from parity import StockDDIMScheduler, StockDPMScheduler

CONFIG = PRESETS["2b"].scheduler  # snr_shift_scale 3
OURS = (CogVideoXScheduler, CogVideoXDDIMScheduler, CogVideoXDPMScheduler)
NAMED = {CogVideoXDDIMScheduler: StockDDIMScheduler, CogVideoXDPMScheduler: StockDPMScheduler}
OTHERS = (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)


@pytest.fixture
def warnings_of_diffusers(caplog):
    """Records what diffusers logs; its logger does not propagate by default."""
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


def same_table(a, b):
    torch.testing.assert_close(a.alphas_cumprod.double(), b.alphas_cumprod.double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("ours", NAMED)
def test_stock_reads_our_file_without_a_warning(ours, tmp_path, warnings_of_diffusers):
    mine = ours(**CONFIG)
    mine.save_pretrained(tmp_path)
    stock = NAMED[ours].from_pretrained(tmp_path)
    same_table(mine, stock)
    assert not warnings_of_diffusers()
    stock.save_pretrained(tmp_path / "stock")
    files = [json.loads((folder / "scheduler_config.json").read_text()) for folder in (tmp_path, tmp_path / "stock")]
    assert files[0] == files[1]


@pytest.mark.parametrize("ours", NAMED)
def test_we_read_stocks_file_without_a_warning(ours, tmp_path, warnings_of_diffusers):
    stock = NAMED[ours](**CONFIG)
    stock.save_pretrained(tmp_path)
    mine = ours.from_pretrained(tmp_path)
    same_table(mine, stock)
    assert not warnings_of_diffusers()
    assert {key: mine.config[key] for key in CONFIG} == CONFIG


@pytest.mark.parametrize(("stock", "solver"), [(StockDDIMScheduler, "ddim"), (StockDPMScheduler, "dpmsolver++")])
def test_the_general_class_takes_the_solver_from_stocks_file(stock, solver, tmp_path):
    stock(**CONFIG).save_pretrained(tmp_path)
    assert CogVideoXScheduler.from_pretrained(tmp_path).algorithm_type == solver
    other = {"ddim": "dpmsolver++", "dpmsolver++": "ddim"}[solver]
    assert CogVideoXScheduler.from_pretrained(tmp_path, algorithm_type=other).algorithm_type == other


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_the_general_class_keeps_its_solver(solver, tmp_path):
    mine = CogVideoXScheduler(**CONFIG, algorithm_type=solver)
    mine.save_pretrained(tmp_path)
    assert CogVideoXScheduler.from_pretrained(tmp_path).algorithm_type == solver
    assert CogVideoXScheduler.from_config(mine.config).algorithm_type == solver


@pytest.mark.parametrize("source", [*OURS, StockDDIMScheduler, StockDPMScheduler])
@pytest.mark.parametrize("target", OURS)
def test_from_config_within_the_family(source, target):
    """Options survive, and the class that is asked for decides the solver wherever it has only one."""
    origin = source(**CONFIG)
    made = target.from_config(origin.config, timestep_spacing="leading")
    same_table(origin, made)
    assert made.config["timestep_spacing"] == "leading"
    fixed = {CogVideoXDDIMScheduler: "ddim", CogVideoXDPMScheduler: "dpmsolver++"}
    expected = fixed.get(target) or fixed.get(source) or "ddim"
    assert made.algorithm_type == expected
    assert ("algorithm_type" in made.config) == (target is CogVideoXScheduler)


@pytest.mark.parametrize("source", OURS)
@pytest.mark.parametrize("target", NAMED.values())
def test_stock_takes_over_from_ours(source, target):
    """The line of the tutorials, with diffusers' own class."""
    mine = source(**CONFIG | {"timestep_spacing": "leading"})
    stock = target.from_config(mine.config, timestep_spacing="trailing")
    same_table(mine, stock)
    assert {key: stock.config[key] for key in CONFIG} == CONFIG


@pytest.mark.parametrize("ours", NAMED)
def test_no_foreign_key_gets_into_a_named_file(ours, tmp_path):
    ours.from_config(CogVideoXScheduler(**CONFIG, algorithm_type="dpmsolver++").config).save_pretrained(tmp_path)
    keys = set(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert keys == {*CONFIG, "_class_name", "_diffusers_version"}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++"])
def test_there_and_back_through_other_schedulers(other, target, solver):
    """`snr_shift_scale` is unknown to them; it waits in their config."""
    origin = CogVideoXScheduler(**CONFIG, algorithm_type=solver)
    away = other.from_config(origin.config)
    back = target.from_config(away.config)
    assert back.config["snr_shift_scale"] == 3.0
    same_table(origin, back)


@pytest.mark.parametrize("ours", OURS)
@pytest.mark.parametrize("loaded", [False, True])
def test_plain_ddim_takes_the_same_steps(ours, loaded, tmp_path):
    """Nothing of ours counts as a default that the other class may replace by its own, such as clip_sample=True."""
    ours(snr_shift_scale=1.0).save_pretrained(tmp_path)
    mine = ours.from_pretrained(tmp_path) if loaded else ours(snr_shift_scale=1.0)
    plain = DDIMScheduler.from_config(mine.config)
    mine = CogVideoXDDIMScheduler.from_config(plain.config)
    torch.testing.assert_close(plain.alphas_cumprod.double(), mine.alphas_cumprod, atol=1e-6, rtol=0)
    x = 3 * torch.randn(2, 4, 4)
    for scheduler in (plain, mine):
        scheduler.set_timesteps(10)
    for t in mine.timesteps:
        a, b = (scheduler.step(x.cos(), t, x).prev_sample for scheduler in (plain, mine))
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("stock", NAMED.values())
def test_stocks_own_defaults_are_read(stock, tmp_path):
    """clip_sample=True is the default of stock's classes, which never look at it; it must not be an error here."""
    default = stock()
    assert default.config["clip_sample"] is True
    default.save_pretrained(tmp_path)
    for mine in (CogVideoXScheduler.from_config(default.config), CogVideoXScheduler.from_pretrained(tmp_path)):
        assert mine.config["clip_sample"] is False
        same_table(mine, default)


def test_clipping_that_another_scheduler_did_is_refused():
    """Where clip_sample and thresholding were in effect, dropping them silently would change the result."""
    with pytest.raises(ValueError, match="clip_sample=True would have no effect"):
        CogVideoXScheduler.from_config(DDIMScheduler(clip_sample=True).config)
    with pytest.raises(ValueError, match="thresholding=True would have no effect"):
        CogVideoXScheduler.from_config(DDIMScheduler(clip_sample=False, thresholding=True).config)


@pytest.mark.parametrize(("ours", "wrong"), [(CogVideoXDDIMScheduler, "dpmsolver++"), (CogVideoXDPMScheduler, "ddim")])
def test_a_named_class_has_one_solver(ours, wrong):
    with pytest.raises(ValueError, match="use CogVideoXScheduler"):
        ours(algorithm_type=wrong)


def test_the_options_are_stocks_and_one_more():
    names = {cls: list(inspect.signature(cls.__init__).parameters) for cls in (CogVideoXScheduler, StockDDIMScheduler, StockDPMScheduler)}
    assert names[CogVideoXScheduler] == [*names[StockDDIMScheduler], "algorithm_type"]
    assert names[StockDDIMScheduler] == names[StockDPMScheduler]


def test_compatibles_name_every_scheduler_that_can_take_over():
    assert set(NAMED.values()) | set(OTHERS) <= set(CogVideoXScheduler().compatibles)
