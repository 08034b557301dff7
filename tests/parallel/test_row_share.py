"""The VAE's rows on several ranks: the same video as on one."""

import pytest

import rank_checks
import ranks
from diffusers_cogvideox import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.frames import Bands
from diffusers_cogvideox.models.vae_memory import Saving
from parity import TINY_VAE


@pytest.mark.parametrize("count", [2, 3])
def test_equal_to_one_rank(count):
    lean = Saving(Bands(None, 5, 40), lean=True)
    cases = [((5, 5, 4), None), ((4, 7, 3), lean), ((1, count, 2), None), ((3, count - 1, 4), None)]
    ranks.run(count, rank_checks.rows, cases)


def test_needs_ranks():
    with pytest.raises(RuntimeError, match="torchrun"):
        AutoencoderKLCogVideoX(**TINY_VAE).enable_row_parallelism()
