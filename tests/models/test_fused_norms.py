"""The Triton kernels against the torch form: on a GPU, and without one in Triton's interpreter; when they are used, and when not."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from diffusers_cogvideox.models import fused_norms, norms
from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from parity import TINY_VAE, randomize

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: test_kernels_in_the_interpreter sets it")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where kernels run; their tiles are so small that a row takes several, and the last one is not full."""
    monkeypatch.setattr(fused_norms, "TILE", 64)
    return request.param


@pytest.fixture
def broken(monkeypatch):
    """A GPU, as far as the selection can see, and kernels that are to be replaced."""
    monkeypatch.setattr(norms, "_on_gpu", lambda _: True)
    monkeypatch.setattr(norms, "find_spec", lambda _: object())
    monkeypatch.delenv(norms.SWITCH, raising=False)
    kernels_work = norms._kernels_work
    kernels_work.cache_clear()
    yield monkeypatch
    kernels_work.cache_clear()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_kernels_in_the_interpreter():
    """In a process of its own: Triton decides at import whether it interprets."""
    pytest.importorskip("triton", minversion="3.9", reason="the interpreters of older Tritons fail with current NumPy")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


def picture(*shape, dtype, device, mean=0.0):
    """Rows 1 .. -1 of random frames (B, F, rows + 2, W, C)."""
    batch, frames, rows, width, channels = shape
    return (mean + torch.randn(batch, frames, rows + 2, width, channels)).to(device, dtype)[:, :, 1:-1]


# Shapes (B, F, rows, W, C) with a number of groups: some pixels and channels of a tile are empty, or all of a tile is taken.
SHAPES = [((2, 3, 2, 13, 6), 3), ((1, 1, 1, 1, 8), 2), ((1, 2, 3, 16, 32), 32), ((1, 2, 1, 3, 130), 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_statistics_are_those_of_float64(device, dtype, shape, groups):
    """With a mean of 30 standard deviations, where sums of squares in float32 would lose three digits."""
    x = picture(*shape, dtype=dtype, device=device, mean=30.0)
    mean, variance = fused_norms.frame_statistics(x, groups)
    grouped = x.double().unflatten(-1, (groups, -1))
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), grouped.mean((2, 3, 5)).transpose(0, 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), grouped.var((2, 3, 5), correction=0).transpose(0, 1), rtol=3e-5, atol=1e-7)
    torch.testing.assert_close((mean, variance), norms.frame_statistics(x.float(), groups), rtol=1e-4, atol=1e-5)
    again = fused_norms.frame_statistics(x, groups)
    assert torch.equal(again[0], mean)
    assert torch.equal(again[1], variance)


def test_a_picture_of_one_colour_has_no_variance(device):
    mean, variance = fused_norms.frame_statistics(torch.full((1, 1, 2, 13, 6), 0.7, device=device), 2)
    torch.testing.assert_close(mean, torch.full_like(mean, 0.7))
    assert variance.max() < 1e-12


@pytest.mark.parametrize("way", [norms._by_batch_norm, norms._by_variance])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_librarys_statistics_are_those_of_float64(way, dtype):
    """As many pixels as a processor is shown at once, with a mean of 30 standard deviations."""
    x = (30 + torch.randn(16, norms._SUMMED // 16, 6)).to(dtype)
    mean, variance = way(x)
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean.double(), x.double().mean((0, 1)), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), x.double().var((0, 1), correction=0), rtol=3e-5, atol=0)


# frames, latent frames, rows of the band, height, latent rows, width, latent columns, channels
PLACES = [
    (3, 2, (3, 7), 8, 4, 12, 3, 6),  # an odd first frame, a band that begins inside a cell
    (5, 3, (0, 2), 2, 2, 5, 5, 8),  # whole map, on the latent grid
    (4, 2, (15, 16), 16, 2, 16, 2, 40),  # no single first frame
    (1, 1, (0, 1), 4, 1, 3, 1, 130),  # one frame; one scale for all, as in the encoder
    (9, 3, (4, 6), 8, 1, 9, 1, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("frames", "latents", "rows", "height", "high", "width", "wide", "channels"), PLACES)
def test_modulation_is_that_of_float32(device, dtype, frames, latents, rows, height, high, width, wide, channels):
    """Rounded once; what lies around `out` stays as it is."""
    shape = (2, frames, rows[1] - rows[0], width, channels)
    x = picture(*shape, dtype=dtype, device=device)
    affine = torch.randn(2, 2, channels, latents, high, wide, device=device).movedim(2, -1).unbind()  # as convolutions leave it
    expected = torch.empty(shape, device=device)
    spans = norms.latent_spans(frames, latents)
    norms.modulate(x.float(), rows[0], height, affine, spans, expected, nn.SiLU())
    work = torch.full((2, frames + 2, shape[2] + 2, width, channels), 9.0, device=device, dtype=dtype)
    out = work[:, :, 1:-1][:, 2:]
    fused_norms.modulate_silu(x, rows[0], height, affine, spans, out)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected, rtol=max(eps, 5e-6), atol=max(eps / 8, 5e-6))
    out.fill_(9.0)
    assert (work == 9.0).all()


def test_tensors_above_two_to_the_31_elements(device):
    """Each frame begins less than 2^31 elements after the one before, the third more than that behind the first.

    Only the pages that are touched take memory.
    """
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GiB of free device memory")
    far = 2**30 + 64
    shape, strides = (1, 3, 1, 4, 8), (3 * far, far, 32, 8, 1)
    x, out = (torch.empty(2 * far + 32, dtype=torch.bfloat16, device=device).as_strided(shape, strides) for _ in range(2))
    values = torch.randn(shape).bfloat16().to(device)
    x.copy_(values)
    torch.testing.assert_close(fused_norms.frame_statistics(x, 2), norms.frame_statistics(values.float(), 2))
    one = torch.ones(1, 1, 1, 1, 8, device=device)
    fused_norms.modulate_silu(x, 0, 1, (one, 0 * one), [(0, 3)], out)
    torch.testing.assert_close(out, nn.functional.silu(values), rtol=0.02, atol=0.01)


def test_decoding_and_encoding_with_kernels(device, monkeypatch):
    """Every norm of the model, with frames that stand for two."""
    monkeypatch.setattr(fused_norms, "TILE", 4096)
    vae = randomize(AutoencoderKLCogVideoX(**TINY_VAE)).eval().to(device)
    x, z = torch.randn(1, 3, 5, 8, 8, device=device), torch.randn(1, 4, 3, 1, 1, device=device)
    used = set()

    def fused(*tensors):
        used.add(len(tensors))
        return True

    with torch.no_grad():
        monkeypatch.setenv(norms.SWITCH, "0")
        expected = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
        monkeypatch.setattr(norms, "fused", fused)
        found = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    assert used == {1, 2}  # both kernels
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if device == "cpu" else 5e-3)  # convolutions on a GPU round to TF32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_used_on_a_gpu(dtype, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv(norms.SWITCH, raising=False)
    norms._kernels_work.cache_clear()
    assert norms.fused(torch.zeros(1, 1, 2, 3, 8, dtype=dtype, device="cuda"))


# --- when they are used -----------------------------------------------------------------------------------------------


def test_nothing_is_fused_on_a_processor():
    assert not norms.fused(torch.zeros(1, 1, 2, 3, 8))


def test_what_forbids_the_kernels(broken):
    broken.setattr(norms, "_kernels_work", lambda *_: True)
    x = torch.zeros(1, 2, 4, 3, 8)
    assert norms.fused(x)
    assert norms.fused(x, x[:, 1:, 1:3])
    assert not norms.fused(x.double())
    assert not norms.fused(x, x[:, :, :, :2])
    assert not norms.fused(x, x.transpose(3, 4).contiguous().transpose(3, 4))
    broken.setenv(norms.SWITCH, "0")
    assert not norms.fused(x)
    broken.setenv(norms.SWITCH, "off")
    with pytest.raises(ValueError, match="COGVIDEOX_TRITON='off' is not possible"):
        norms.fused(x)
    broken.delenv(norms.SWITCH)
    broken.setattr(norms, "find_spec", lambda _: None)
    assert not norms.fused(x)


def test_other_activations_are_left_to_torch(broken):
    broken.setattr(norms, "_kernels_work", lambda *_: True)
    broken.setattr(fused_norms, "modulate_silu", lambda *_: pytest.fail("the kernel knows SiLU only"))
    x, one = torch.randn(1, 1, 2, 3, 8), torch.ones(1, 1, 1, 1, 8)
    out = torch.empty_like(x)
    norms.normalise(x, (0, 2), 2, (one, one), nn.GELU(), out)
    torch.testing.assert_close(out, nn.functional.gelu(x + 1))


def by_torch(x, top, height, affine, spans, out):
    """What the second kernel is to compute."""
    norms.modulate(x, top, height, affine, spans, out, nn.SiLU())


def wrong(x, groups):
    mean, variance = norms.frame_statistics(x, groups)
    return mean, 1.01 * variance


def not_compiled(x, groups):
    raise RuntimeError("ptxas is not there")


@pytest.mark.parametrize(("statistics", "message"), [(wrong, "compute something else"), (not_compiled, "ptxas is not there")])
def test_kernels_that_do_not_work_are_reported_once_and_not_used(broken, caplog, statistics, message):
    broken.setattr(fused_norms, "modulate_silu", by_torch)
    broken.setattr(fused_norms, "frame_statistics", norms.frame_statistics)
    x = torch.randn(1, 1, 2, 3, 8)
    assert norms.fused(x)  # kernels that are right
    norms._kernels_work.cache_clear()
    broken.setattr(fused_norms, "frame_statistics", statistics)
    broken.setattr(logging.getLogger("diffusers_cogvideox"), "propagate", True)
    state = torch.get_rng_state()
    with caplog.at_level(logging.WARNING, logger=norms.__name__):
        assert not norms.fused(x)
        assert not norms.fused(x)
    assert [record.message for record in caplog.records if message in record.message] == [record.message for record in caplog.records]
    assert len(caplog.records) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_lack_of_memory_says_nothing_about_the_kernels(broken):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    broken.setattr(fused_norms, "modulate_silu", full)
    broken.setattr(fused_norms, "frame_statistics", norms.frame_statistics)
    with pytest.raises(torch.OutOfMemoryError):
        norms.fused(torch.zeros(1, 1, 2, 3, 8))
    broken.setattr(fused_norms, "modulate_silu", by_torch)
    assert norms.fused(torch.zeros(1, 1, 2, 3, 8))
