"""What the VAE says that it will take, against what is alive at once while it runs."""

import itertools

import pytest
import torch

from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.frames import Bands
from diffusers_cogvideox.models.vae_memory import Saving
from live_storages import LiveStorages, live_peak
from parity import TINY_VAE, StockVAE

CONFIG = TINY_VAE | {"block_out_channels": (16, 32, 32, 64), "norm_num_groups": 8}


def tiny(dtype):
    """On the meta device: what is alive depends on sizes alone."""
    with torch.device("meta"):
        return AutoencoderKLCogVideoX(**CONFIG).to(dtype).eval()


def shape_of(direction, batch, frames, height, width):
    """Of latents, or of the video that they stand for."""
    return (batch, 4, frames, height, width) if direction == "decode" else (batch, 3, 4 * frames - 3, 8 * height, 8 * width)


def saving(name, height):
    """The whole picture at once, or a quarter of its rows."""
    bands = Bands() if name == "whole" else Bands(None, 2 * height, 8 * height)
    return Saving(bands, lean=name in ("lean", "offload"), offload=name == "offload")


def test_storages_count_once_and_while_they_live():
    with LiveStorages() as live:
        a, b = torch.empty(100), torch.empty(50)
        view = a[2:]
        assert live.now == 600
        del a, b
        assert live.now == 400
        del view
    assert (live.now, live.peak) == (0, 600)


def test_what_is_elsewhere_does_not_count():
    with LiveStorages() as live:
        with live.elsewhere():
            there = torch.empty(100)
        there.copy_(torch.ones(100))
    assert (live.now, live.peak) == (0, 400)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_meta_device_counts_as_the_processor_does(direction):
    """Stock's operations are the same on both; what is left out on the meta device takes no memory."""
    vae = StockVAE(**TINY_VAE).eval()
    x = torch.randn(shape_of(direction, 1, 3, 4, 6))
    peak = live_peak(getattr(vae, direction), x, model=vae)
    vae = vae.to("meta")
    assert live_peak(getattr(vae, direction), x.to("meta"), model=vae) == peak


@pytest.mark.parametrize("size", [(1, 5, 8, 12), (2, 2, 12, 8), (1, 1, 16, 16)])
@pytest.mark.parametrize("way", ["whole", "bands", "lean", "offload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_estimate_is_what_is_alive(direction, dtype, way, size):
    vae, shape = tiny(dtype), shape_of(direction, *size)
    vae.saving = saving(way, size[2])
    measured = live_peak(getattr(vae, direction), torch.empty(shape, dtype=dtype, device="meta"), model=vae)
    assert vae.estimate_peak(shape, direction) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_slices_take_the_caches_of_one(direction):
    vae, shape = tiny(torch.float32), shape_of(direction, 3, 5, 8, 12)
    x = torch.empty(shape, device="meta")
    together = live_peak(getattr(vae, direction), x, model=vae)
    vae.enable_slicing()
    measured = live_peak(getattr(vae, direction), x, model=vae)
    assert measured < 0.5 * together
    assert vae.estimate_peak(shape, direction) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("way", ["whole", "bands", "lean", "offload"])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_more_never_needs_less(direction, way):
    vae = tiny(torch.bfloat16)

    def peak(batch, frames, height, width):
        return vae.estimate_peak(shape_of(direction, batch, frames, height, width), direction, saving(way, height))

    for name, sizes in {
        "batch": [(n, 3, 8, 8) for n in (1, 2, 3)],
        "frames": [(1, n, 8, 8) for n in (1, 3, 5)],
        "height": [(1, 3, n, 8) for n in (4, 8, 12, 16)],
        "width": [(1, 3, 8, n) for n in (4, 5, 8, 16)],
    }.items():
        peaks = [peak(*size) for size in sizes]
        assert all(less <= more for less, more in itertools.pairwise(peaks)), (name, peaks)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_more_rows_never_need_less(direction, lean):
    vae, shape = tiny(torch.bfloat16), shape_of(direction, 1, 5, 8, 12)
    peaks = [vae.estimate_peak(shape, direction, Saving(Bands(None, rows, 64), lean)) for rows in (1, 2, 4, 8, 16, 32, 64)]
    assert all(less <= more for less, more in itertools.pairwise(peaks)), peaks


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_estimate_knows_rows_that_are_filtered(direction):
    """On the processor, in float32, where maps have many channels."""
    vae = AutoencoderKLCogVideoX(**CONFIG | {"block_out_channels": (64, 64, 64, 64)}).eval()
    shape = shape_of(direction, 1, 3, 8, 8)
    vae.saving = saving("bands", 8)
    measured = live_peak(getattr(vae, direction), torch.zeros(shape), model=vae)
    assert 0.9 * measured <= vae.estimate_peak(shape, direction) <= 1.1 * measured
