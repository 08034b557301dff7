"""The VAE: what diffusers does, and what we do."""

import pytest
import torch

from diffusers_cogvideox import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.causal_conv import ConvCache
from diffusers_cogvideox.models.textbook import Textbook
from diffusers_cogvideox.presets import PRESETS
from parity import TINY_VAE, StockVAE, twins


class Resize(torch.nn.Module):
    """Stands in for a decoder, at full size in no time."""

    def __init__(self, stock: bool):
        super().__init__()
        self.stock = stock

    def forward(self, z, *_, **__):
        video = torch.nn.functional.interpolate(z[:, :3, 0], scale_factor=8).unsqueeze(2)
        return (video, None) if self.stock else video


@pytest.fixture
def pair() -> tuple[AutoencoderKLCogVideoX, StockVAE]:
    return twins(AutoencoderKLCogVideoX, StockVAE, TINY_VAE)


def kept(cache: dict, names: tuple[str, ...] = ()) -> int:
    """Numbers that diffusers' nested cache holds, under the given names or under all."""
    total = 0
    for name, entry in cache.items():
        if isinstance(entry, dict):
            total += kept(entry, names)
        elif entry is not None and (not names or name in names):
            total += entry.numel()
    return total


@torch.no_grad()
def test_v1_the_cache_holds_only_what_is_read(pair):
    """Diffusers also keeps the whole input of every convolution of one frame: half the cache of the released decoder."""
    ours, stock = pair
    z = torch.randn(1, 4, 3, 4, 6)
    entries, cache = stock.decoder(z)[1], ConvCache()
    ours.decoder(z, Textbook(cache, z))
    never_read = kept(entries, ("conv_y", "conv_b"))
    assert never_read > 0.3 * kept(entries)
    assert sum(tensor.numel() for tensor in cache.current.values()) == kept(entries) - never_read


@torch.no_grad()
def test_v2_latents_are_projected_before_they_are_enlarged(pair):
    """The same numbers: a 1x1x1 convolution and a repetition commute."""
    largest = []
    pair[0].textbook = True  # otherwise layers are not called with tensors
    for vae in pair:
        sizes = []
        for name, module in vae.named_modules():
            if name.endswith("conv_y.conv"):
                module.register_forward_pre_hook(lambda _, args, sizes=sizes: sizes.append(args[0].shape[-2:].numel()))
        vae.decode(torch.randn(1, 4, 1, 4, 6))
        largest.append(max(sizes))
    assert largest == [4 * 6, 32 * 48]


@pytest.mark.parametrize(("tile", "size"), [((240, 360), (480, 720)), ((240, 240), (480, 720)), ((256, 256), (492, 735))])
def test_v3_tile_sizes(pair, tile, size):
    made = []
    for vae, stock in zip(pair, (False, True), strict=True):
        vae.decoder = Resize(stock)
        vae.enable_tiling(*tile, **({} if stock else {"blended": True}))
        made.append(tuple(vae.decode(torch.zeros(1, 4, 1, 60, 90)).sample.shape[-2:]))
    assert made == [(480, 720), size]


def test_v3_tiles_that_diffusers_cannot_encode(pair):
    ours, stock = pair
    ours.enable_tiling(64, 64, blended=True)
    stock.enable_tiling(64, 64)
    video = torch.zeros(1, 3, 1, 56, 72)
    assert ours.encode(video).latent_dist.mean.shape[-2:] == (7, 9)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        stock.encode(video)


@torch.no_grad()
def test_v5_tiling_keeps_the_picture(pair):
    """The picture without tiling; with diffusers each tile has group statistics of its own, and tiles are blended."""
    z, changes = torch.randn(1, 4, 1, 8, 8), []
    for vae in pair:
        whole = vae.decode(z).sample
        vae.enable_tiling(48, 40)
        changes.append((vae.decode(z).sample - whole).abs().max())
    assert changes[0] < 2e-5
    assert changes[1] > 1e-2


def test_v6_large_images():
    """On the meta device: shapes are computed, values are not."""
    with torch.device("meta"):
        ours, stock = (cls(**PRESETS["2b"].vae) for cls in (AutoencoderKLCogVideoX, StockVAE))
        small, large = torch.zeros(1, 3, 1, 1664, 1664), torch.zeros(1, 3, 1, 1680, 1680)
        assert stock.encode(small).latent_dist.mean.shape[-2:] == (208, 208)
        assert ours.encode(large).latent_dist.mean.shape[-2:] == (210, 210)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            stock.encode(large)


@torch.no_grad()
def test_v7_the_remainder_joins_the_first_chunk(pair):
    """15 frames are one chunk in both, which is not what chunks of 7 and 8 frames would give: part of the trained function."""
    video = torch.randn(1, 3, 15, 16, 16)
    ours, stock = (vae.encode(video).latent_dist.mean for vae in pair)
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-5)
    alone = pair[0].encode(video[:, :, :7]).latent_dist.mean
    assert (ours[:, :, :2] - alone).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("frames", "latents", "decoded"), [(2, 1, 1), (4, 1, 1), (8, 2, 8), (9, 3, 9), (16, 4, 16)])
def test_v8_frame_counts_of_the_vae_itself(pair, frames, latents, decoded):
    """The same in both: it is the pipelines that pad a video to a count which comes back."""
    for vae in pair:
        z = vae.encode(torch.zeros(1, 3, frames, 16, 16)).latent_dist.mean
        assert z.shape[2] == latents
        assert vae.decode(z).sample.shape[2] == decoded


@torch.no_grad()
@pytest.mark.parametrize("latents", [1, 4, 7])
def test_v10_decoding_piece_by_piece(pair, latents):
    ours, stock = pair
    z = torch.randn(1, 4, latents, 2, 3)
    assert torch.equal(torch.cat(list(ours.decode_stream(z)), dim=2), ours.decode(z).sample)
    assert not hasattr(stock, "decode_stream")


@torch.no_grad()
def test_v11_tiling_for_one_direction(pair):
    """With diffusers, tiling for the sake of decoding changes encoding too."""
    ours, stock = pair
    video = torch.randn(1, 3, 1, 64, 64)
    whole = ours.encode(video).latent_dist.mean
    ours.enable_tiling(48, 40, directions=("decode",), blended=True)
    stock.enable_tiling(48, 40)
    assert torch.equal(ours.encode(video).latent_dist.mean, whole)
    assert (stock.encode(video).latent_dist.mean - whole).abs().max() > 1e-3
    tiled = [vae.decode(whole).sample for vae in pair]
    torch.testing.assert_close(*tiled, rtol=0, atol=2e-5)
    ours.disable_tiling()
    assert (ours.decode(whole).sample - tiled[0]).abs().max() > 1e-3


@pytest.mark.parametrize("directions", [(), ("decode", "both"), "decode"])
def test_v11_unknown_directions_are_refused(pair, directions):
    with pytest.raises(ValueError, match=r"name one or both of \('encode', 'decode'\)"):
        pair[0].enable_tiling(32, 32, directions=directions)
    assert not pair[0].use_tiling


# --- found besides ----------------------------------------------------------------------------------------------------


def test_x2_block_types():
    three = TINY_VAE | {"down_block_types": ("CogVideoXDownBlock3D",) * 3}
    assert len(StockVAE(**three).encoder.down_blocks) == 3
    with pytest.raises(ValueError, match="once for each"):
        AutoencoderKLCogVideoX(**three)


def test_x3_options_of_the_latents(pair):
    options = {"shift_factor": 0.5, "latents_mean": (1.0,) * 4, "latents_std": (2.0,) * 4}
    stock = pair[1]
    told = StockVAE(**TINY_VAE | options).eval()
    told.load_state_dict(stock.state_dict())
    video = torch.randn(1, 3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(told.encode(video).latent_dist.mean, stock.encode(video).latent_dist.mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"shift_factor=0\.5 would have no effect"):
        AutoencoderKLCogVideoX(**TINY_VAE | options)


def test_x4_sizes_that_do_not_fit(pair):
    ours, stock = pair
    video = torch.zeros(1, 3, 1, 16, 20)
    assert stock.encode(video).latent_dist.mean.shape[-2:] == (2, 2)
    with pytest.raises(ValueError, match="multiples of 8, got 16x20"):
        ours.encode(video)


def test_x5_chunk_sizes(pair):
    ours, stock = pair
    x, z = torch.randn(1, 3, 17, 16, 16), torch.randn(1, 4, 7, 2, 2)
    with torch.no_grad():
        usual = ours.encode(x).latent_dist.mean, ours.decode(z).sample
        for vae in (ours, stock):
            vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = 4, 4
        mine, theirs = ((vae.encode(x).latent_dist.mean, vae.decode(z).sample) for vae in (ours, stock))
        for other, expected, before in zip(mine, theirs, usual, strict=True):
            torch.testing.assert_close(other, expected, rtol=1e-5, atol=2e-5)
            assert (other - before).abs().max() > 1e-2
        for vae in (ours, stock):
            vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = 6, 1
        assert stock.decode(z).sample.shape[2] == 7  # not 25
        with pytest.raises(ValueError, match=r"num_latent_frames_batch_size=1 .* multiple of 2"):
            ours.decode(z)
        with pytest.raises(ValueError, match=r"num_sample_frames_batch_size=6 .* multiple of 4"):
            ours.encode(x)
