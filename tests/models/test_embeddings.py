"""Patches, absolute positions and scalar embeddings: inverses, stock's tables, and the sizes that stock gets wrong."""

import logging

import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps, get_3d_sincos_pos_embed

from diffusers_cogvideox.geometry import Geometry
from diffusers_cogvideox.models.embeddings import embed_scalar, patchify, resize_table, sincos_table, unpatchify
from transformer_cases import tiny_twins


@pytest.mark.parametrize("patch_size_t", [1, 2])
def test_unpatchify_inverts_patchify(patch_size_t):
    geometry = Geometry(patch_size_t=patch_size_t)
    latents = torch.randn(2, 4, 3, 6, 8)
    tokens = patchify(latents, geometry)
    grid = geometry.token_grid(4, 6, 8)
    assert tokens.shape == (2, grid[0] * grid[1] * grid[2], 3 * patch_size_t * 4)
    torch.testing.assert_close(unpatchify(tokens, grid, geometry), latents, rtol=0, atol=0)


def test_feature_and_token_order():
    latents = torch.arange(2 * 3 * 4 * 4).view(1, 2, 3, 4, 4)  # B F C H W
    tokens = patchify(latents, Geometry(patch_size_t=2))
    assert tokens[0, 1].view(3, 2, 2, 2)[2, 1, 0, 1] == latents[0, 1, 2, 0, 3]  # second column of patches


def test_convolution_is_a_linear_layer_on_patches():
    ours, _ = tiny_twins("5b")
    embed, latents = ours.patch_embed, torch.randn(2, 3, 4, 8, 12)
    expected = torch.nn.functional.linear(patchify(latents, embed.geometry), embed.proj.weight.flatten(1), embed.proj.bias)
    torch.testing.assert_close(embed._embed_patches(latents), expected)


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 4, 6), (2, 6, 4)])
def test_sincos_table_is_stocks(grid):
    t, h, w = grid
    theirs = get_3d_sincos_pos_embed(64, (w, h), t, 1.875, 1.5, output_type="pt").flatten(0, 1).float()
    torch.testing.assert_close(sincos_table(grid, 64, 1.875, 1.5, like=theirs), theirs, rtol=0, atol=1e-7)


def test_width_must_split():
    with pytest.raises(ValueError, match=r"width of 24.*multiple of 16"):
        sincos_table((1, 1, 1), 24, 1.0, 1.0, like=torch.zeros(1))


def test_fresh_learned_table_is_stocks():
    ours, stock = tiny_twins("5b-i2v")
    fresh = type(ours).from_config(ours.config).patch_embed.pos_embedding
    torch.testing.assert_close(fresh, type(stock).from_config(stock.config).patch_embed.pos_embedding.float())
    assert ours.state_dict()["patch_embed.pos_embedding"].shape == (1, 7 + 72, 64)


def test_learned_table_of_fewer_frames_is_its_beginning():
    table = torch.randn(3 * 4 * 6, 16)
    torch.testing.assert_close(resize_table(table, (3, 4, 6), (2, 4, 6)), table[:48], rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(3, 8, 12), (2, 6, 4), (7, 4, 6)])
def test_learned_table_of_other_sizes_is_interpolated_with_a_warning(grid, caplog):
    trained = (3, 4, 6)
    rows = torch.arange(4.0)[None, :, None, None].expand(*trained, 16)  # a table that holds its row number
    with caplog.at_level(logging.WARNING, logger="diffusers_cogvideox.models.embeddings"):
        resized = resize_table(rows.reshape(-1, 16), trained, grid).view(*grid, 16)
        resize_table(rows.reshape(-1, 16), trained, grid)
    assert caplog.text.count(f"interpolated to {'x'.join(map(str, grid))}") == 1, "warned once per size"
    assert (resized == resized[:1, :, :1]).all(), "depends on the row only"
    expected = (torch.arange(grid[1]) + 0.5) * 4 / grid[1] - 0.5  # pixel centres
    torch.testing.assert_close(resized[0, :, 0, 0], expected.clamp(0, 3), atol=1e-5, rtol=0)


def scalar_modules():
    return Timesteps(16, True, 0), TimestepEmbedding(16, 8)


def test_embed_scalar_takes_numbers_and_tensors():
    like = torch.zeros(2, 1)
    modules = scalar_modules()
    expected = embed_scalar(torch.tensor([3, 3]), *modules, like, "timestep")
    assert expected.shape == (2, 8)
    for value in (3, 3.0, torch.tensor(3), torch.tensor([3.0])):
        torch.testing.assert_close(embed_scalar(value, *modules, like, "timestep").expand(2, -1), expected)


def test_embed_scalar_refuses_another_batch():
    with pytest.raises(ValueError, match="ofs has 3 values for a batch of 2"):
        embed_scalar(torch.ones(3), *scalar_modules(), torch.zeros(2, 1), "ofs")
