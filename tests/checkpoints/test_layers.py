"""Names and shapes of the layers, against the models themselves."""

import pytest
import torch

from diffusers_cogvideox import PRESETS, CogVideoXTransformer3DModel
from diffusers_cogvideox.checkpoints.layers import LAYERS, fitting_presets, layer_shapes
from parity import TINY_TRANSFORMERS, StockTransformer


def weights(model):
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}


@pytest.mark.parametrize("variant", TINY_TRANSFORMERS)
def test_shapes_are_those_of_the_models(variant):
    config = TINY_TRANSFORMERS[variant]
    with torch.device("meta"):
        ours, stock = CogVideoXTransformer3DModel(**config), StockTransformer(**config)
    assert layer_shapes(ours.config) == weights(ours) == weights(stock)


def test_every_layer_has_a_name_in_the_list():
    listed = {name.format(layer=block) for name in LAYERS for block in range(2)}
    with_ofs = TINY_TRANSFORMERS["1.5-5b-i2v"]
    with torch.device("meta"):
        assert listed == set(weights(CogVideoXTransformer3DModel(**with_ofs)))


@pytest.mark.parametrize(
    ("shapes", "fitting"),
    [
        ({"transformer_blocks.29.attn1.to_q": (1920, 1920)}, {"2b", "fun-2b-inp", "fun-2b-control"}),
        ({"transformer_blocks.30.attn1.to_q": (1920, 1920)}, set()),
        ({"transformer_blocks.41.attn1.to_q": (3072, 3072)}, {name for name in PRESETS if "2b" not in name}),
        ({"proj_out": (128, 3072)}, {name for name in PRESETS if "1.5" in name}),
        ({"patch_embed.proj": (3072, 256)}, {"1.5-5b-i2v"}),
        ({"patch_embed.proj": (3072, 32, 2, 2)}, {"5b-i2v", "fun-5b-control"}),
    ],
)
def test_releases_that_a_lora_fits(shapes, fitting):
    assert set(fitting_presets(shapes)) == fitting
