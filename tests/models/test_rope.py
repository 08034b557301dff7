"""Rotary tables equal stock's pipeline wherever stock has them, and keep working where stock does not."""

import math

import pytest
import torch

from diffusers_cogvideox.models.rope import (
    ROTATED,
    apply_rotary,
    as_complex,
    resized_positions,
    riflex_frequencies,
    rope_for,
    rotary_embedding,
    rotate_,
    with_text,
)
from diffusers_cogvideox.presets import PRESETS
from parity import StockTransformer
from transformer_cases import stock_rope, tiny_twins

LATENT_SIZES = [(60, 90), (90, 60), (48, 48), (96, 170), (32, 128), (2, 2)]


@pytest.mark.parametrize("size", LATENT_SIZES)
@pytest.mark.parametrize("variant", ["5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_equal_to_stock(variant, size):
    config = PRESETS[variant].transformer
    with torch.device("meta"):
        stock = StockTransformer(**config | {"num_layers": 0})
    tables = rope_for(config, 4, *size)
    assert tables is not None
    for ours, theirs in zip(tables, stock_rope(stock.config, 4, *size), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_1_5_has_no_largest_size():
    config = PRESETS["1.5-5b"].transformer | {"sample_height": 96, "sample_width": 170}  # the first upload's table size
    portrait = rope_for(config, 2, 170, 96)
    large = rope_for(PRESETS["1.5-5b"].transformer, 2, 170, 96)
    torch.testing.assert_close(portrait, large, rtol=0, atol=0)


def test_models_without_rotary_code_get_none():
    assert rope_for(PRESETS["2b"].transformer, 13, 60, 90) is None


def test_accepts_a_live_config_and_a_device():
    ours, _ = tiny_twins("1.5-5b")
    cos, _ = rope_for(ours.config, 2, 8, 12, device="meta")
    assert cos.shape == (24, 32)
    assert cos.device.type == "meta"


def test_native_grid_is_counted():
    y, x = resized_positions((30, 45), (30, 45))
    torch.testing.assert_close(y, torch.arange(30.0))
    torch.testing.assert_close(x, torch.arange(45.0))


def test_tables_are_rotations_by_position():
    cos, sin = rotary_embedding(torch.arange(2), torch.arange(3), torch.arange(5), 32)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(30, 32))
    grid = sin.view(2, 3, 5, 32)
    torch.testing.assert_close(grid[1, 2, 4, 0], torch.tensor(1.0).sin())  # first time pair: frequency 1, position 1
    torch.testing.assert_close(grid[1, 2, 4, 8], torch.tensor(2.0).sin())  # first row pair
    torch.testing.assert_close(grid[1, 2, 4, 20], torch.tensor(4.0).sin())  # first column pair


def test_scores_depend_on_relative_positions_only():
    query, key = torch.randn(2, 1, 1, 1, 16)

    def score(i, j):
        tables = [rotary_embedding(torch.tensor([p]), torch.tensor([p]), torch.tensor([p]), 16) for p in (i, j)]
        return (apply_rotary(query, tables[0]) * apply_rotary(key, tables[1])).sum()

    torch.testing.assert_close(score(7, 4), score(23, 20), atol=1e-5, rtol=1e-5)
    assert (score(7, 4) - score(7, 5)).abs() > 1e-3


def test_text_is_not_rotated():
    x = torch.randn(1, 9, 2, 16)
    rotary = with_text(rotary_embedding(torch.arange(1), torch.arange(2), torch.arange(3), 16), 3)
    rotated = apply_rotary(x, rotary)
    torch.testing.assert_close(rotated[:, :3], x[:, :3], rtol=0, atol=0)
    torch.testing.assert_close(rotated[:, 3], x[:, 3])  # position (0, 0, 0)
    assert (rotated[:, 4:] - x[:, 4:]).abs().amax() > 0.1
    assert apply_rotary(x.bfloat16(), rotary).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rotation_in_place_is_the_same(dtype):
    x = torch.randn(2, ROTATED + 5, 2, 16).to(dtype)
    rotary = with_text(rotary_embedding(torch.arange(7), torch.arange(7), torch.arange(21), 16), 0)
    expected = apply_rotary(x, rotary)
    assert rotate_(x, as_complex(rotary)) is x
    exact = torch.finfo(torch.float32).eps if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(x, expected, rtol=exact, atol=1e-6)


@pytest.mark.parametrize("head_dim", [8, 24, 40])
def test_head_dimension_must_split(head_dim):
    with pytest.raises(ValueError, match=f"attention_head_dim={head_dim}.*multiple of 16"):
        rotary_embedding(torch.arange(1), torch.arange(1), torch.arange(1), head_dim)


def test_latents_must_divide():
    with pytest.raises(ValueError, match="patches of 2x2x2"):
        rope_for(PRESETS["1.5-5b"].transformer, 3, 8, 8)


# --- RIFLEx -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "latent_frames", "tokens"), [("5b", 25, 25), ("5b-i2v", 40, 40), ("1.5-5b", 42, 21)])
def test_riflex_lowers_the_second_frequency_of_time(variant, latent_frames, tokens):
    """The authors name k = 2 for CogVideoX; at frame p the pair then turns by 0.9 * 2 pi p / L, and all others as before."""
    config = PRESETS[variant].transformer
    usual, lowered = (rope_for(config, latent_frames, 4, 4, riflex=riflex) for riflex in (False, True))
    angle = 0.9 * 2 * math.pi * torch.arange(tokens) / tokens
    changed = slice(2, 4)  # the channels of pair k = 2
    for table, before, expected in zip(lowered, usual, (angle.cos(), angle.sin()), strict=True):
        frames = table.view(tokens, 4, 64)
        torch.testing.assert_close(frames[..., changed], expected[:, None, None].expand(-1, 4, 2), atol=1e-5, rtol=0)
        frames[..., changed] = before.view(tokens, 4, 64)[..., changed]
        torch.testing.assert_close(frames, before.view(tokens, 4, 64), rtol=0, atol=0)


def test_riflex_finds_the_intrinsic_frequency_of_another_model():
    """HunyuanVideo: base 256, 16 channels, 33 latent frames; the authors name k = 4 with a period of 50."""
    frequencies = 256.0 ** (-torch.arange(8) / 8)
    lowered = riflex_frequencies(frequencies, 33, 66)
    assert (lowered != frequencies).nonzero().flatten().tolist() == [3]
    torch.testing.assert_close(lowered[3], torch.tensor(0.9 * 2 * math.pi / 66))
    with pytest.raises(ValueError, match="no effect on 50 token frames: this model repeats itself only after 50"):
        riflex_frequencies(frequencies, 33, 50)


def test_riflex_without_effect_is_refused():
    with pytest.raises(ValueError, match="no effect on 13 token frames: this model repeats itself only after 20"):
        rope_for(PRESETS["5b"].transformer, 13, 60, 90, riflex=True)
    with pytest.raises(ValueError, match="no rotary positions"):
        rope_for(PRESETS["2b"].transformer, 40, 60, 90, riflex=True)
