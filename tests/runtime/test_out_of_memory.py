"""Errors that say that memory ran out, and a VAE's low-memory mode that leaves no trace."""

import pytest
import torch

from diffusers_cogvideox import AutoencoderKLCogVideoX
from diffusers_cogvideox.runtime.out_of_memory import free_unused_memory, is_out_of_memory, low_memory
from parity import TINY_VAE


def test_the_processor_out_of_memory_is_recognised():
    """The allocator's own error; four petabytes are nowhere."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_unused_memory_can_be_freed_anywhere():
    free_unused_memory()


@pytest.mark.parametrize("tiled", [False, True])
def test_settings_come_back_also_after_an_error(tiled):
    vae = AutoencoderKLCogVideoX(**TINY_VAE)
    if tiled:
        vae.enable_tiling(tile_sample_min_height=32, directions=("encode",))
    before = {name: value for name, value in vars(vae).items() if not name.startswith("_")}
    with pytest.raises(ZeroDivisionError), low_memory(vae):
        assert vae.use_tiling
        raise ZeroDivisionError
    assert {name: value for name, value in vars(vae).items() if not name.startswith("_")} == before
