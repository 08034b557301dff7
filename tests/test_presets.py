"""Every released model's row is complete, accepted by stock's classes, legal for our geometry and recognisable."""

import dataclasses
import inspect

import pytest

from diffusers_cogvideox.geometry import Geometry
from diffusers_cogvideox.presets import PRESETS, match_preset
from parity import StockDDIMScheduler, StockTransformer, StockVAE

NAMES = sorted(PRESETS)


def defaults(cls: type) -> dict:
    """Arguments that a configurable class accepts, with their defaults."""
    return {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}


def test_rows_cover_the_releases():
    assert set(PRESETS) == {
        "2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v", "fun-2b-inp", "fun-5b-inp", "fun-1.5-5b-inp", "fun-2b-control", "fun-5b-control",
    }  # fmt: skip
    assert all(row.name == name for name, row in PRESETS.items())
    repos = [repo for row in PRESETS.values() for repo in row.repo_ids]
    assert len(repos) == len(set(repos))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("field", "stock"), [("transformer", StockTransformer), ("vae", StockVAE), ("scheduler", StockDDIMScheduler)])
def test_stock_accepts_each_config(name, field, stock):
    config = getattr(PRESETS[name], field)
    assert set(config) <= set(defaults(stock)), "unknown key"
    # The first releases predate these keys, so their files do not have them; nothing else may be missing.
    younger = {"ofs_embed_dim", "patch_bias", "patch_size_t", "use_learned_positional_embeddings"}
    assert set(defaults(stock)) - set(config) <= younger


@pytest.mark.parametrize("name", NAMES)
def test_recommended_size_is_legal(name):
    row = PRESETS[name]
    geometry = Geometry.from_configs(row.vae, row.transformer)
    assert geometry.check_frames(row.num_frames) == row.num_frames
    assert geometry.check_size(row.height, row.width) == (row.height, row.width)


@pytest.mark.parametrize(("name", "tokens"), [("2b", 13 * 30 * 45), ("5b", 13 * 30 * 45), ("1.5-5b", 11 * 48 * 85)])
def test_recommended_size_has_the_published_number_of_tokens(name, tokens):
    row = PRESETS[name]
    geometry = Geometry.from_configs(row.vae, row.transformer)
    frames = geometry.latent_frames(row.num_frames)
    t, y, x = geometry.token_grid(frames + geometry.front_padding(frames), *geometry.latent_size(row.height, row.width))
    assert t * y * x == tokens


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_recognised_from_its_own_config(name):
    config = PRESETS[name].transformer
    assert match_preset(config) is PRESETS[name]
    full = defaults(StockTransformer) | config  # what stock writes: every key, absent ones as None or False
    assert match_preset(full) is PRESETS[name]


def test_text_lengths():
    """1.5 was trained with 224 tokens, all others with 226; VideoX-Fun kept 226 for its models of both generations."""
    assert {name for name in NAMES if PRESETS[name].max_sequence_length != 226} == {"1.5-5b", "1.5-5b-i2v"}
    assert PRESETS["1.5-5b"].max_sequence_length == PRESETS["1.5-5b-i2v"].max_sequence_length == 224


def test_fun_1_5_is_trained_on_22_latent_frames():
    """85 frames at 8 per second in VideoX-Fun's model list; its default here is the longest video that these latents hold."""
    row = PRESETS["fun-1.5-5b-inp"]
    geometry = Geometry.from_configs(row.vae, row.transformer)
    assert (geometry.patched_frames(row.num_frames), geometry.latent_frames(85), row.fps) == (85, 22, 8)


def test_fun_pipelines_fit_their_channels():
    for name in NAMES:
        channels = PRESETS[name].transformer["in_channels"]
        assert ("Inpaint" in PRESETS[name].pipeline) == (channels == 33)
        assert ("Control" in PRESETS[name].pipeline) <= (channels == 32)


def test_both_published_table_sizes_of_1_5_are_recognised():
    config = PRESETS["1.5-5b"].transformer | {"sample_height": 96, "sample_width": 170}
    assert match_preset(config) is PRESETS["1.5-5b"]


def test_another_architecture_is_nobody():
    assert match_preset(PRESETS["5b"].transformer | {"num_layers": 6}) is None
    assert match_preset({}) is None


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["2b"].fps = 9
