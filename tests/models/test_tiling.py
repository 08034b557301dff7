"""The tile walk as a function of sizes, and the VAE's tiling against stock where stock is right."""

import itertools

import pytest
import torch

from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.tiling import TileAxis, map_tiles
from parity import TINY_VAE, StockVAE, twins

# Tiles of 6 x 5 cells that overlap by one: sizes and overlaps are whole both in pixels and in latents, so stock is right.
FITTING = TINY_VAE | {"sample_height": 96, "sample_width": 80}
CUSTOM = [(8, 8, 0.0), (16, 24, 0.3), (40, 17, 0.5), (24, 24, 0.9), (33, 50, 0.2), (1000, 8, 0.5)]


@pytest.fixture
def vae():
    return AutoencoderKLCogVideoX(**TINY_VAE).eval()


@pytest.fixture
def pair():
    ours, stock = twins(AutoencoderKLCogVideoX, StockVAE, FITTING)
    ours.enable_tiling(blended=True)
    stock.enable_tiling()
    return ours, stock


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(n, s, o) for n, s in itertools.product((1, 5, 6, 17, 60), (1, 4, 6, 80)) for o in {0, s // 2, s - 1}]
)
def test_spans_cover_the_axis_and_none_lies_inside_another(length, size, overlap):
    spans = TileAxis(length, size, overlap).spans()
    assert spans[0][0] == 0
    assert spans[-1][1] == length
    assert all(stop - start == size for start, stop in spans[:-1])
    for (_, stop), (next_start, next_stop) in itertools.pairwise(spans):
        assert stop - next_start == overlap
        assert next_stop > stop


@pytest.mark.parametrize("overlap", [-1, 4, 5])
def test_an_overlap_outside_the_tile_is_refused(overlap):
    with pytest.raises(ValueError, match=f"overlap by {overlap}.*choose 0 <= overlap < size"):
        TileAxis(10, 4, overlap)


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("size", [(9, 7), (4, 4), (12, 5), (3, 3)])
def test_mapping_the_identity_returns_the_input(size, overlap):
    """Where neighbours agree, blending changes nothing: the weights of a pixel's tiles sum to one."""
    x = torch.randn(1, 2, 3, *size)
    rows, columns = (TileAxis(n, 4, overlap) for n in size)
    torch.testing.assert_close(map_tiles(lambda tile: tile.clone(), x, rows, columns), x)


@pytest.mark.parametrize(("in_scale", "out_scale"), [(1, 2), (2, 1), (2, 2)])
def test_scales_are_cells(in_scale, out_scale):
    """Nearest resizing acts on each cell alone, so in tiles it is what it is on the whole."""
    x = torch.randn(1, 1, 9 * in_scale, 7 * in_scale)

    def resize(tile):
        return torch.nn.functional.interpolate(tile, scale_factor=out_scale / in_scale)

    torch.testing.assert_close(
        map_tiles(resize, x, TileAxis(9, 4, 1), TileAxis(7, 4, 2), in_scale=in_scale, out_scale=out_scale), resize(x)
    )


def test_the_cross_fade_is_linear():
    """Two tiles that return 0 and 1 meet in a ramp over their overlap."""
    values = iter((0.0, 1.0))
    out = map_tiles(lambda tile: torch.full_like(tile, next(values)), torch.zeros(1, 1, 1, 6), TileAxis(1, 1, 0), TileAxis(6, 5, 4))
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize("latents", [(12, 10), (13, 11), (5, 11), (12, 4)])
def test_decode_equals_stock_where_stock_is_right(pair, latents):
    ours, stock = pair
    z = torch.randn(1, 4, 3, *latents)
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z).sample, stock.decode(z).sample, rtol=0, atol=2e-5)


@pytest.mark.parametrize("pixels", [(96, 80), (104, 88), (40, 88), (96, 32)])
def test_encode_equals_stock_where_stock_is_right(pair, pixels):
    ours, stock = pair
    x = torch.randn(2, 3, 9, *pixels)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x).latent_dist.parameters, stock.encode(x).latent_dist.parameters, rtol=0, atol=2e-5)


class Enlarge(torch.nn.Module):
    """Stands in for a decoder: nearest resizing of the tile, less the tile's mean, so that the result depends on where tiles lie."""

    def __init__(self, stock):
        super().__init__()
        self.stock = stock

    def forward(self, z, *_, **__):
        pictures = torch.nn.functional.interpolate((z - z.mean((-2, -1), keepdim=True))[:, :3, 0], scale_factor=8).unsqueeze(2)
        return (pictures, None) if self.stock else pictures


def test_v5_released_tile_settings_equal_stock(pair):
    """480x720 in tiles of 240x360 that overlap by 1/6 and 1/5: nine tiles at the same places with the same blending."""
    for vae, stock in zip(pair, (False, True), strict=True):
        vae.enable_tiling(240, 360, **({} if stock else {"blended": True}))
        vae.decoder = Enlarge(stock)
    z = torch.randn(1, 4, 1, 60, 90)
    torch.testing.assert_close(pair[0].decode(z).sample, pair[1].decode(z).sample, rtol=0, atol=2e-5)


def test_x1_no_tile_is_decoded_twice(pair):
    """A tile that would lie inside the one before it is left out; stock decodes it and fades it in as a thin strip."""
    for vae, stock, tiles in zip(pair, (False, True), (2, 3), strict=True):
        calls = []
        vae.decoder = Enlarge(stock)
        vae.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        assert vae.decode(torch.randn(1, 4, 1, 11, 4)).sample.shape == (1, 3, 1, 88, 32)
        assert len(calls) == tiles


@pytest.mark.parametrize(("height", "width", "overlap"), CUSTOM)
def test_every_tile_size_gives_the_right_output_size(vae, height, width, overlap):
    vae.enable_tiling(height, width, overlap, overlap, blended=True)
    with torch.no_grad():
        assert vae.decode(torch.randn(1, 4, 1, 7, 9)).sample.shape == (1, 3, 1, 56, 72)
        assert vae.encode(torch.randn(1, 3, 1, 56, 72)).latent_dist.mean.shape == (1, 4, 1, 7, 9)


def test_v4_an_overlap_of_zero_is_honoured(vae):
    """Without overlap every tile is decoded alone and stands unblended; stock takes 0.0 for "not given"."""
    vae.enable_tiling(32, 32, 0.0, 0.0, blended=True)
    z = torch.randn(1, 4, 1, 8, 4)
    with torch.no_grad():
        tiled = vae.decode(z).sample
        vae.disable_tiling()
        alone = torch.cat([vae.decode(part).sample for part in z.split(4, dim=-2)], dim=-2)
    torch.testing.assert_close(tiled, alone)
    stock = StockVAE(**TINY_VAE)
    stock.enable_tiling(32, 32, 0.0, 0.0)
    assert stock.tile_overlap_factor_height == 1 / 6


def test_small_pictures_are_not_tiled(vae):
    z = torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad():
        whole = vae.decode(z).sample
        vae.enable_tiling(32, 48, blended=True)
        torch.testing.assert_close(vae.decode(z).sample, whole, rtol=0, atol=0)


def test_a_second_call_keeps_what_it_does_not_name(vae):
    vae.enable_tiling(24, 40, 0.0, 0.25, blended=True)
    vae.disable_tiling()
    vae.enable_tiling(tile_sample_min_height=32)
    assert (vae.tile_latent_min_height, vae.tile_latent_min_width) == (4, 5)
    assert (vae.tile_sample_min_height, vae.tile_sample_min_width) == (32, 40)
    assert (vae.tile_overlap_factor_height, vae.tile_overlap_factor_width) == (0.0, 0.25)


@pytest.mark.parametrize("name", ["tile_latent_min_height", "tile_latent_min_width"])
def test_sizes_that_follow_from_others_cannot_be_set(vae, name):
    """Stock keeps pixels and cells apart; setting one of the two here would have no effect."""
    with pytest.raises(AttributeError):
        setattr(vae, name, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_sample_min_height": 7}, "tile_sample_min_height=7 is smaller than one latent cell: choose at least 8"),
        ({"tile_sample_min_width": 0}, "tile_sample_min_width=0"),
        ({"tile_overlap_factor_height": 1.0}, r"tile_overlap_factor_height=1.0 must lie in \[0, 1\)"),
        ({"tile_overlap_factor_height": 0.2}, "tile_overlap_factor_height=0.2 needs blended=True"),
        ({"tile_overlap_factor_width": -0.1}, "tile_overlap_factor_width=-0.1"),
    ],
)
def test_impossible_tiles_are_refused_and_change_nothing(vae, options, message):
    with pytest.raises(ValueError, match=message):
        vae.enable_tiling(**options)
    assert not vae.use_tiling
    assert not vae.blended_tiling
    assert vae.tile_sample_min_height == TINY_VAE["sample_height"] // 2
