"""The causal convolution and its cache: only the past is seen, and chunks give what the whole gives."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_cogvideox.models.causal_conv import CausalConv3d, ConvCache


def run_in_chunks(conv, x, sizes):
    """Results of `conv` on consecutive chunks of x (B, C, F, H, W), each handed the cache of the one before."""
    cache, parts = ConvCache(), []
    for chunk in x.split(sizes, dim=2):
        parts.append(conv(chunk, cache))
        cache = cache.advance()
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_equals_a_convolution_padded_with_copies_of_the_first_frame(kernel):
    conv = CausalConv3d(2, 3, kernel)
    x = torch.randn(2, 2, 6, 5, 4)
    past = x[:, :, :1].repeat(1, 1, kernel - 1, 1, 1)
    pad = kernel // 2
    expected = F.conv3d(F.pad(torch.cat([past, x], 2), (pad,) * 4), conv.conv.weight, conv.conv.bias)
    torch.testing.assert_close(conv(x, ConvCache()), expected)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("sizes", [[9], [3, 2, 2, 2], [1] * 9, [1, 8], [2, 7]])
def test_chunked_equals_whole(kernel, sizes):
    """Chunks shorter than the history included: their cache still reaches into the chunk before."""
    conv = CausalConv3d(2, 3, kernel)
    x = torch.randn(1, 2, 9, 4, 4)
    torch.testing.assert_close(run_in_chunks(conv, x, sizes), conv(x, ConvCache()))


@pytest.mark.parametrize("k", range(5))
def test_changing_a_frame_changes_nothing_before_it(k):
    conv = CausalConv3d(2, 2, 3)
    x = torch.randn(1, 2, 5, 4, 4)
    changed = x.clone()
    changed[:, :, k] += 1
    before, after = conv(x, ConvCache()), conv(changed, ConvCache())
    torch.testing.assert_close(after[:, :, :k], before[:, :, :k], rtol=0, atol=0)
    assert (after[:, :, k] != before[:, :, k]).any()


def test_pointwise_convolutions_keep_no_frames():
    """A 1x1x1 convolution has no past; caching its whole input is where much of the memory went elsewhere."""
    cache = ConvCache()
    CausalConv3d(2, 2, 1)(torch.randn(1, 2, 4, 4, 4), cache)
    assert not cache.current


def test_the_cache_holds_two_frames_and_not_the_chunk_behind_them():
    conv, cache = CausalConv3d(2, 2, 3), ConvCache()
    conv(torch.randn(1, 2, 8, 4, 4), cache)
    kept = cache.current[conv]
    assert kept.shape == (1, 2, 2, 4, 4)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_a_recomputed_chunk_reads_what_it_read_before_and_replaces_nothing():
    """Gradient checkpointing runs a chunk again during the backward pass, after later chunks have been computed."""
    conv, first = CausalConv3d(2, 2, 3), ConvCache()
    a, b = torch.randn(1, 2, 8, 4, 4).split(4, dim=2)
    conv(a, first)
    kept = first.current[conv]
    second = first.advance()
    once = conv(b, second)
    conv(a, first)
    torch.testing.assert_close(conv(b, second), once, rtol=0, atol=0)
    assert first.current[conv] is kept
