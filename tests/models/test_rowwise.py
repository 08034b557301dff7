"""The fast way of computing the VAE against the textbook, cut in every way, and what it must not leave behind."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cogvideox.models import norms
from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.causal_conv import ConvCache
from diffusers_cogvideox.models.frames import Bands
from diffusers_cogvideox.models.leaves import Conv3d
from diffusers_cogvideox.models.vae_memory import Saving
from parity import TINY_VAE, randomize

# Widths that change where the released ones do, and stay where those stay.
CONFIG = TINY_VAE | {"block_out_channels": (8, 16, 16, 24), "norm_num_groups": 4}
PICTURE = 24  # rows
WAYS = [
    Saving(Bands(None, rows, PICTURE), lean, offload)
    for rows, lean, offload in [(1, False, False), (1, True, True), (5, True, False), (5, False, True), (24, True, False)]
]


@pytest.fixture
def vae():
    return randomize(AutoencoderKLCogVideoX(**CONFIG)).eval()


def coded(vae, x, z):
    with torch.no_grad():
        return vae.encode(x).latent_dist.parameters, vae.decode(z).sample


def textbook(vae, x, z):
    vae.textbook = True
    result = coded(vae, x, z)
    vae.textbook = False
    return result


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert (a - b).square().mean().sqrt() <= 5e-6 * b.std()


@pytest.mark.parametrize("way", WAYS, ids=[f"{w.bands.rows} rows{' lean' * w.lean}{' offload' * w.offload}" for w in WAYS])
@pytest.mark.parametrize("latents", [1, 2, 3, 4, 5])
def test_bands_of_any_height_change_nothing(vae, latents, way):
    """Odd sizes in latents, two videos at once; with caches that are kept elsewhere too."""
    x, z = torch.randn(2, 3, 4 * latents - 3, PICTURE, 40), torch.randn(2, 4, latents, PICTURE // 8, 5)
    expected = textbook(vae, x, z)
    vae.saving = way
    assert_equal(coded(vae, x, z), expected)


@pytest.mark.parametrize("latents", [7, 13])
def test_long_videos(vae, latents):
    x, z = torch.randn(1, 3, 4 * latents - 3, 16, 24), torch.randn(1, 4, latents, 2, 3)
    assert_equal(coded(vae, x, z), textbook(vae, x, z))


@pytest.mark.parametrize("tile", [(8, 8), (16, 24), (40, 17), (1000, 8)])
def test_exact_tiling_changes_nothing(vae, tile):
    x, z = torch.randn(1, 3, 9, 56, 72), torch.randn(1, 4, 3, 7, 9)
    whole = coded(vae, x, z)
    vae.enable_tiling(*tile)
    assert_equal(coded(vae, x, z), whole)


def test_a_band_has_no_more_pixels_than_a_tile(vae):
    heights = []
    vae.enable_tiling(16, 24)
    before = torch.nn.functional.conv2d

    def spy(x, *args, **kwargs):
        heights.append(x.shape[2])
        return before(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", spy)
        coded(vae, torch.randn(1, 3, 1, 56, 72), torch.randn(1, 4, 1, 7, 9))
    assert max(heights) == 16 * 24 // 72 + 2  # with a row of halo on either side


def test_means_far_from_zero_lose_nothing(vae):
    """GroupNorm's statistics do not come from large sums of squares."""
    x, z = torch.randn(1, 3, 5, 16, 16), torch.randn(1, 4, 3, 2, 2)
    with torch.no_grad():
        vae.encoder.conv_in.conv.bias.add_(20)
        vae.decoder.conv_in.conv.bias.add_(20)
    assert_equal(coded(vae, x, z), textbook(vae, x, z))


def test_pictures_of_one_colour(vae):
    """Nothing but the border gives the groups a variance."""
    x = torch.tensor([0.7, -0.8, -0.6]).view(1, 3, 1, 1, 1).expand(-1, -1, 9, 64, 96)
    found, expected = coded(vae, x, torch.zeros(1, 4, 3, 8, 12)), textbook(vae, x, torch.zeros(1, 4, 3, 8, 12))
    for mine, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-4)


def test_real_latents(vae, reference):
    """A part of a real video's latents, 13 frames of them, through random weights."""
    latents = load_file(reference / "latents" / "real_13x60x90.safetensors")["latents"][:, :, :, 20:27, 40:49].float()
    wide = randomize(AutoencoderKLCogVideoX(**CONFIG | {"latent_channels": 16})).eval()
    x = torch.randn(1, 3, 1, 8, 8)
    assert_equal(coded(wide, x, latents), textbook(wide, x, latents))


def test_frames_move_no_further_than_they_are(vae):
    """In half precision and under autocast the result has the precision that was asked for."""
    z = torch.randn(1, 4, 3, 2, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        video = vae.decode(z).sample
    assert video.dtype == torch.bfloat16
    exact = coded(vae, torch.randn(1, 3, 1, 8, 8), z)[1]
    assert (video.float() - exact).square().mean().sqrt() < 0.05 * exact.std()


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepare", ["enable_tiling", "enable_slicing", "disable_slicing"])
@pytest.mark.parametrize("latents", [1, 2, 7])
def test_a_decoded_stream_is_the_video_bit_for_bit(vae, latents, prepare):
    getattr(vae, prepare)()
    z = torch.randn(2, 4, latents, 2, 3)
    pieces = list(vae.decode_stream(z))
    assert [piece.shape[2] for piece in pieces] == {1: [1], 2: [8], 7: [9, 8, 8]}[latents]
    assert torch.equal(torch.cat(pieces, dim=2), coded(vae, torch.randn(1, 3, 1, 8, 8), z)[1])


def test_a_stream_of_blended_tiles_comes_at_once(vae):
    vae.enable_tiling(16, 16, blended=True)
    z = torch.randn(1, 4, 5, 4, 4)
    (video,) = vae.decode_stream(z)
    assert torch.equal(video, coded(vae, torch.randn(1, 3, 1, 8, 8), z)[1])


@pytest.mark.parametrize("pieces", [[25], [1] * 25, [3, 0, 9, 13], [20, 5]])
def test_an_encoded_stream_is_the_encoding_bit_for_bit(vae, pieces):
    x = torch.randn(1, 3, 25, 16, 16)
    whole = coded(vae, x, torch.randn(1, 4, 1, 1, 1))[0]
    parts = list(vae.encode_stream((piece for piece in x.split(pieces, dim=2) if piece.shape[2]), num_frames=25))
    assert [part.shape[2] for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("said", [24, 26])
def test_streams_of_another_length_are_refused(vae, said):
    with pytest.raises(ValueError, match=f"num_frames={said}, but the pieces have 25 frames"):
        list(vae.encode_stream(torch.zeros(1, 3, 25, 8, 8).split(5, dim=2), num_frames=said))


def test_streams_that_cannot_be(vae):
    with pytest.raises(ValueError, match="multiples of 8, got 8x12"):
        list(vae.encode_stream([torch.zeros(1, 3, 1, 8, 12)], num_frames=1))
    with pytest.raises(ValueError, match="decode takes"):
        next(vae.decode_stream(torch.zeros(1, 5, 1, 2, 2)))
    vae.enable_tiling(blended=True)
    with pytest.raises(ValueError, match="without blended"):
        next(vae.encode_stream([torch.zeros(1, 3, 1, 8, 8)], num_frames=1))


def test_a_stream_keeps_nothing_of_what_it_gave(vae):
    stream = vae.decode_stream(torch.randn(1, 4, 7, 2, 2))
    piece = weakref.ref(next(stream))
    next(stream)
    gc.collect()
    assert piece() is None


def test_gradients_are_on_again_between_pieces(vae):
    for _ in vae.decode_stream(torch.randn(1, 4, 3, 2, 2)):
        assert torch.is_grad_enabled()


# --- weights in another form ------------------------------------------------------------------------------------------


def derived(vae):
    return [value for layer in vae.modules() if isinstance(layer, Conv3d) for _, value in layer._derived.values()]


@pytest.fixture
def used(vae):
    coded(vae, torch.randn(1, 3, 9, 8, 8), torch.randn(1, 4, 3, 2, 2))
    assert derived(vae)
    return vae


def test_changed_weights_are_used(used):
    """In place, by loading, and by moving to another precision and back."""
    x, z = torch.randn(1, 3, 9, 8, 8), torch.randn(1, 4, 3, 2, 2)
    other = randomize(AutoencoderKLCogVideoX(**CONFIG), seed=9)
    with torch.no_grad():
        used.decoder.mid_block.resnets[0].conv1.conv.weight.mul_(1.5)
    assert_equal(coded(used, x, z), textbook(used, x, z))
    used.load_state_dict(other.state_dict())
    assert_equal(coded(used, x, z), textbook(other, x, z))
    used.load_state_dict(copy.deepcopy(used.state_dict()), assign=True)
    assert_equal(coded(used, x, z), textbook(other, x, z))


@pytest.mark.parametrize("move", [lambda vae: vae.to(torch.float64), lambda vae: vae.half(), lambda vae: vae.to("meta")])
def test_what_was_derived_goes_when_the_model_moves(used, move):
    move(used)
    assert not derived(used)


def test_what_was_derived_is_not_saved_or_copied(used, tmp_path):
    names = set(AutoencoderKLCogVideoX(**CONFIG).state_dict())
    assert set(used.state_dict()) == names
    used.save_pretrained(tmp_path)
    loaded = AutoencoderKLCogVideoX.from_pretrained(tmp_path)
    assert all(torch.equal(value, used.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not derived(copy.deepcopy(used))


def test_gradients_take_the_textbook_and_release_what_was_derived(used):
    x = torch.randn(1, 3, 9, 8, 8)
    used(x).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in used.parameters())
    assert not derived(used)


def test_frozen_weights_pass_gradients_to_the_input(vae):
    vae.requires_grad_(False)
    z = torch.randn(1, 4, 3, 2, 2, requires_grad=True)
    vae.decode(z).sample.sum().backward()
    assert z.grad.abs().max() > 0
    assert not vae.decode(z.detach()).sample.requires_grad


def test_inference_mode(vae):
    z = torch.randn(1, 4, 3, 2, 2)
    expected = coded(vae, torch.randn(1, 3, 1, 8, 8), z)[1]
    with torch.inference_mode():
        assert torch.equal(vae.decode(z).sample, expected)
        inside = randomize(AutoencoderKLCogVideoX(**CONFIG)).eval()
        torch.testing.assert_close(inside.decode(z).sample, expected, rtol=0, atol=1e-4)


def test_threads_do_not_meet(vae):
    inputs = [torch.randn(1, 4, latents, 2, 3) for latents in (3, 5, 1, 4)]
    expected = [coded(vae, torch.randn(1, 3, 1, 8, 8), z)[1] for z in inputs]
    vae.to(torch.float32)
    results = [None] * len(inputs)

    def work(place):
        results[place] = coded(vae, torch.randn(1, 3, 1, 8, 8), inputs[place])[1]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, expected))


# --- too little memory ------------------------------------------------------------------------------------------------


def failing(vae, patch, below):
    """Makes the first chunk fail for lack of memory unless its bands have less than `below` rows; returns the ways that were tried."""
    from diffusers_cogvideox.models import autoencoder

    ways, real = [], autoencoder._Coder.exactly

    def exactly(coder, x, cache, saving, share):
        ways.append(saving)
        if saving.bands.rows >= below:
            raise torch.OutOfMemoryError("no memory left")
        return real(coder, x, cache, saving)

    patch.setattr(autoencoder._Coder, "exactly", exactly)
    return ways


def test_smaller_bands_are_tried_when_memory_runs_out(vae, monkeypatch):
    z = torch.randn(1, 4, 5, 16, 2)
    expected = coded(vae, torch.randn(1, 3, 1, 8, 8), z)[1]
    vae.enable_tiling(128, 128)
    ways = failing(vae, monkeypatch, below=16)
    found = torch.cat(list(vae.decode_stream(z)), dim=2)
    assert [way.bands.rows for way in ways] == [1024, 64, 16, 4, 4]  # the last one is the second chunk
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_error_is_shown_when_nothing_helps(vae, monkeypatch):
    vae.enable_tiling(128, 128)
    failing(vae, monkeypatch, below=0)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        coded(vae, torch.randn(1, 3, 1, 16, 16), torch.randn(1, 4, 1, 2, 2))


def test_caches_are_left_for_the_next_chunk_only():
    cache, conv = ConvCache(), torch.nn.Identity()
    cache.keep(conv, torch.zeros(1))
    following = cache.advance()
    assert following.take(conv) is not None
    assert following.take(conv) is None


def test_the_place_of_the_video_decides_where_weights_are_offloaded(vae, monkeypatch):
    """Between the calls of its layers, a model that is offloaded layer by layer is on the meta device."""
    from diffusers_cogvideox.models import autoencoder

    asked, real = [], autoencoder.savings
    monkeypatch.setattr(autoencoder, "savings", lambda height, device, rows: asked.append(device.type) or real(height, device, rows))
    monkeypatch.setattr(AutoencoderKLCogVideoX, "device", torch.device("meta"))
    coded(vae, torch.randn(1, 3, 1, 8, 8), torch.randn(1, 4, 1, 1, 1))
    assert asked == ["cpu", "cpu"]


def test_a_stream_that_is_broken_off_leaves_no_weights_of_an_offloaded_model(vae):
    from accelerate import cpu_offload

    cpu_offload(vae, execution_device=torch.device("cpu"))
    stream = vae.decode_stream(torch.randn(1, 4, 7, 2, 2))
    next(stream)
    assert derived(vae)
    stream.close()
    assert not derived(vae)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.GELU()], ids=["silu", "gelu"])
@pytest.mark.parametrize("grid", [(4, 3), (4, 1), (1, 1)])
def test_norms_in_pieces_are_those_of_float32(monkeypatch, dtype, activation, grid):
    """Several pieces of 3 rows and a last one of 1, from inside a cell on; rounded once, and only where they belong."""
    monkeypatch.setattr(norms, "_AT_ONCE", 300)
    batch, frames, rows, height, width, channels, top = 2, 5, 7, 12, 6, 8, 4
    assert norms.piece_rows((batch, frames, rows, width, channels), torch.device("cpu")) == 3
    x = torch.randn(batch, frames, rows, width, channels).to(dtype)
    affine = tuple(torch.randn(batch, 3, *grid, channels) for _ in range(2))
    scale, shift = (
        value[:, [0, 1, 1, 2, 2]].repeat_interleave(height // grid[0], 2)[:, :, top : top + rows].repeat_interleave(width // grid[1], 3)
        for value in affine
    )
    around = torch.full((batch, frames, rows + 2, width, channels), 9.0, dtype=dtype)
    out = around[:, :, 1:-1]
    norms.normalise(x, (top, top + rows), height, affine, activation, out)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), activation(scale * x.float() + shift), rtol=eps, atol=eps / 8 + 1e-6)
    out.fill_(9.0)
    assert (around == 9.0).all()
