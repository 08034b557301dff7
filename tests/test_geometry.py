"""Size rules: against stock's models and pipelines, the published numbers, and their own inverses."""

import pytest
import torch

from diffusers_cogvideox.geometry import DECODE_CHUNK, ENCODE_CHUNK, MAX_FRAMES, MAX_SIDE, Geometry, chunk_spans
from diffusers_cogvideox.presets import PRESETS
from parity import TINY_VAE, StockVAE

V1 = Geometry()
V15 = Geometry(patch_size_t=2)


@pytest.fixture(scope="module")
def vae():
    return StockVAE(**TINY_VAE).eval()


# --- against stock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 9, 17])
@torch.no_grad()
def test_stock_encodes_and_decodes_what_we_say(vae, frames):
    geometry = Geometry.from_configs(vae.config, PRESETS["5b"].transformer)
    height, width = 32, 48
    latents = vae.encode(torch.zeros(1, 3, frames, height, width)).latent_dist.mode()
    assert latents.shape[2:] == (geometry.latent_frames(frames), *geometry.latent_size(height, width))
    assert vae.decode(latents).sample.shape[2:] == (frames, height, width)


@pytest.mark.parametrize("latent_frames", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_stock_decodes_even_numbers_of_latents_as_we_say(vae, latent_frames):
    decoded = vae.decode(torch.zeros(1, 4, latent_frames, 2, 2)).sample
    assert decoded.shape[2] == V1.decoded_frames(latent_frames)


def test_stocks_chunks(vae):
    """Chunk sizes are those that stock's VAE carries as attributes."""
    assert (vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size) == (ENCODE_CHUNK, DECODE_CHUNK)


# --- published numbers ------------------------------------------------------------------------------------------------


def test_published_chunks():
    assert [stop - start for start, stop in chunk_spans(49, ENCODE_CHUNK)] == [9, 8, 8, 8, 8, 8]
    assert [stop - start for start, stop in chunk_spans(13, DECODE_CHUNK)] == [3, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("geometry", "frames", "size", "grid"), [(V1, 49, (480, 720), (13, 30, 45)), (V15, 81, (768, 1360), (11, 48, 85))])
def test_published_token_grids(geometry, frames, size, grid):
    latent_frames = geometry.latent_frames(frames)
    padded = latent_frames + geometry.front_padding(latent_frames)
    assert geometry.token_grid(padded, *geometry.latent_size(*size)) == grid


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_ratios_come_from_the_configs(name):
    expected = V15 if "1.5" in name else V1
    assert Geometry.from_configs(PRESETS[name].vae, PRESETS[name].transformer) == expected


def test_another_vae_gives_other_ratios():
    vae = {"temporal_compression_ratio": 8, "block_out_channels": (8, 8, 8)}
    transformer = {"temporal_compression_ratio": 4, "patch_size": 1, "patch_size_t": None}
    geometry = Geometry.from_configs(vae, transformer)
    assert geometry == Geometry(temporal_ratio=8, spatial_ratio=4, patch_size=1)
    assert Geometry.from_transformer(transformer) == Geometry(patch_size=1)
    assert (geometry.frame_step, geometry.pixel_multiple) == (16, 4)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 8])
def test_chunks_cover_everything_once(size):
    for length in range(1, 70):
        spans = chunk_spans(length, size)
        assert [frame for start, stop in spans for frame in range(start, stop)] == list(range(length))
        assert all(stop - start == size for start, stop in spans[1:])
        assert size <= spans[0][1] < 2 * size or len(spans) == 1


@pytest.mark.parametrize("geometry", [V1, V15, Geometry(temporal_ratio=8)])
def test_legal_frame_counts_are_exactly_those_that_come_back(geometry):
    """A count is legal when encoding, front padding, dropping it again and decoding return that count."""
    for frames in range(1, 170):
        latent_frames = geometry.latent_frames(frames)
        returned = geometry.decoded_frames(latent_frames)
        if returned == frames and latent_frames % 2:
            assert geometry.check_frames(frames) == frames
            assert geometry.frames(latent_frames) == frames
        else:
            with pytest.raises(ValueError, match=f"num_frames={frames} cannot be decoded exactly"):
                geometry.check_frames(frames)


@pytest.mark.parametrize("geometry", [V1, V15, Geometry(temporal_ratio=8)])
def test_padded_frames_are_the_next_legal_ones(geometry):
    legal = [n for n in range(1, 200) if geometry.decoded_frames(geometry.latent_frames(n)) == n and geometry.latent_frames(n) % 2]
    for frames in range(1, legal[-1] + 1):
        assert geometry.padded_frames(frames) == min(n for n in legal if n >= frames)


@pytest.mark.parametrize("geometry", [V1, V15, Geometry(spatial_ratio=4, patch_size=1)])
def test_the_asked_size_lies_in_the_middle_of_the_padded_one(geometry):
    m = geometry.pixel_multiple
    for height in range(m, 5 * m):
        width = 6 * m - height
        padded = geometry.padded_size(height, width)
        for asked, whole, before in zip((height, width), padded, geometry.margins(height, width), strict=True):
            after = whole - asked - before
            assert whole % m == 0 and 0 <= whole - asked < m
            assert 0 <= after - before <= 1


def test_latents_of_a_padded_video():
    assert V1.latent_shape(49, 480, 720) == (13, 60, 90)
    assert V1.latent_shape(42, 470, 705) == (13, 60, 90)
    assert V15.latent_shape(81, 768, 1360) == (21, 96, 170)


def test_padding_at_the_end_makes_whole_patches():
    """CogVideoX-Fun 1.5 was trained on 85 frames, 22 latent frames; 1.0 on 49."""
    assert [V15.patched_frames(n) for n in (1, 9, 10, 80, 81)] == [5, 13, 21, 85, 85]
    assert [V1.patched_frames(n) for n in (1, 9, 10, 48, 49)] == [1, 9, 17, 49, 49]


@pytest.mark.parametrize("geometry", [V1, V15])
def test_the_length_of_a_video_is_found_in_its_padded_latents(geometry):
    for frames in range(1, 100, geometry.frame_step):
        latent_frames = geometry.latent_frames(frames)
        assert geometry.unpadded_frames(latent_frames + geometry.front_padding(latent_frames)) == frames


def test_front_padding_makes_whole_patches():
    for latent_frames in range(1, 50):
        for p_t in (1, 2, 3):
            padding = Geometry(patch_size_t=p_t).front_padding(latent_frames)
            assert 0 <= padding < p_t and (latent_frames + padding) % p_t == 0


def test_pixels_and_latents_are_inverses():
    assert V1.pixel_size(*V1.latent_size(480, 720)) == (480, 720)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [
        (0, "1"),
        (-3, "1"),
        (2, "1 or 9"),
        (8, "1 or 9"),
        (10, "9 or 17"),
        (16, "9 or 17"),
        (48, "41 or 49"),
        (50, "49 or 57"),
        (85, "81 or 89"),
    ],
)
def test_nearest_legal_frame_counts_are_named(frames, nearest):
    with pytest.raises(ValueError, match=rf"must be 8k\+1 \(1 for a still image\)\. Nearest legal: {nearest}\."):
        V1.check_frames(frames)


@pytest.mark.parametrize(
    ("size", "nearest"), [((480, 721), "480x720"), ((72, 64), "64x64"), ((0, 0), "16x16"), ((-16, 32), "16x32"), ((90, 100), "96x96")]
)
def test_nearest_legal_size_is_named(size, nearest):
    with pytest.raises(ValueError, match=rf"must be positive multiples of 16\. Nearest legal size: {nearest}\."):
        V1.check_size(*size)


@pytest.mark.parametrize(("frames", "nearest"), [(0, 1), (-3, 1), (MAX_FRAMES + 1, MAX_FRAMES)])
def test_absurd_frame_counts_cannot_be_padded(frames, nearest):
    with pytest.raises(ValueError, match=rf"num_frames={frames} is not possible.*Nearest legal: {nearest}\."):
        V1.padded_frames(frames)
    assert V1.check_frames(nearest) == V1.padded_frames(nearest) == nearest


@pytest.mark.parametrize(("size", "nearest"), [((15, 48), (16, 48)), ((0, -5), (16, 16)), ((32, MAX_SIDE + 16), (32, MAX_SIDE))])
def test_absurd_sizes_cannot_be_padded(size, nearest):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} .*Nearest legal size: {nearest[0]}x{nearest[1]}\."):
        V1.padded_size(*size)
    assert V1.check_size(*nearest) == V1.padded_size(*nearest) == nearest


def test_latents_that_no_patch_divides_are_refused():
    for latents in ((3, 4, 6), (4, 5, 6), (4, 4, 7)):
        with pytest.raises(ValueError, match=f"latents of {latents[0]}x{latents[1]}x{latents[2]} .* patches of 2x2x2"):
            V15.token_grid(*latents)
