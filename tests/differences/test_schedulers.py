"""The schedulers' own options: what diffusers does, and what we do."""

import inspect

import pytest
import torch

from diffusers_cogvideox import CogVideoXDDIMScheduler, CogVideoXPipeline
from diffusers_cogvideox.presets import PRESETS
from parity import StockDDIMScheduler, StockDPMScheduler, StockPipeline
from tiny_pipeline import call


def test_d16_clipping():
    x, results = 9 * torch.randn(2, 3), []
    for clip in (False, True):
        stock = StockDDIMScheduler(**PRESETS["5b"].scheduler | {"clip_sample": clip})
        stock.set_timesteps(10)
        results.append(stock.step(x, 999, x).prev_sample)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="clip_sample=True would have no effect"):
        CogVideoXDDIMScheduler(clip_sample=True)


def test_x7_custom_timesteps(loaded):
    ours, stock = (cls(**loaded(cls).components) for cls in (CogVideoXPipeline, StockPipeline))
    assert call(ours, timesteps=[999, 500], output_type="latent").isfinite().all()
    with pytest.raises(ValueError, match="does not support custom"):
        call(stock, timesteps=[999, 500])
    assert all("timesteps" not in inspect.signature(cls.set_timesteps).parameters for cls in (StockDDIMScheduler, StockDPMScheduler))
