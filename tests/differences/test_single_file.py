"""Single files: what diffusers' classes do with them."""

import pytest

from diffusers_cogvideox import AutoencoderKLCogVideoX, CogVideoXPipeline, CogVideoXTransformer3DModel
from parity import StockPipeline, StockTransformer, StockVAE
from sat_cases import sat_transformer, sat_vae, tiny_transformer, tiny_vae


def test_d6_single_files():
    assert not hasattr(StockTransformer, "from_single_file")
    assert not hasattr(StockPipeline, "from_single_file")
    with pytest.raises(ValueError, match="currently only compatible with"):
        StockVAE.from_single_file(tiny_vae().state_dict())
    assert AutoencoderKLCogVideoX.from_single_file(tiny_vae().state_dict()).config.latent_channels == 4
    assert AutoencoderKLCogVideoX.from_single_file(sat_vae(tiny_vae())).config.latent_channels == 4
    assert CogVideoXTransformer3DModel.from_single_file(sat_transformer(tiny_transformer("5b"))).config.num_layers == 2
    assert hasattr(CogVideoXPipeline, "from_single_file")
