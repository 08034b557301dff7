"""Every way of convolving along time is the convolution: against torch's own, in float64."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_cogvideox.models.filtering import (
    DIRECT,
    DOUBLED,
    FIRST,
    MINIMAL_2,
    MINIMAL_4,
    filter_frames,
    steps_for,
    transformed_taps,
)


def matrices(filtering):
    return [torch.tensor(m, dtype=torch.float64) for m in (filtering.data, filtering.taps, filtering.result)]


@pytest.mark.parametrize("filtering", [DIRECT, MINIMAL_2, MINIMAL_4], ids=["direct", "minimal 2", "minimal 4"])
def test_matrices_are_a_three_tap_filter(filtering):
    """Output f is w0 x[f] + w1 x[f + 1] + w2 x[f + 2], for every tap and frame that there can be: the map is bilinear."""
    data, taps, result = matrices(filtering)
    found = torch.einsum("op,pt,pw->otw", result, taps, data)
    expected = torch.zeros_like(found)
    for output in range(filtering.outputs):
        for tap in range(3):
            expected[output, tap, output + tap] = 1
    torch.testing.assert_close(found, expected)


def test_doubled_frames_are_a_filter_over_equal_pairs():
    data, taps, result = matrices(DOUBLED)
    pairs = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]], dtype=torch.float64)  # x', x', x, x
    expected = torch.stack([torch.stack([pairs[output + tap] for tap in range(3)]) for output in range(2)])
    torch.testing.assert_close(torch.einsum("op,pt,pw->otw", result, taps, data), expected)


@pytest.mark.parametrize("filtering", [FIRST, DIRECT, MINIMAL_2, MINIMAL_4, DOUBLED])
def test_the_products_carry_one_bias_together(filtering):
    shares, result = torch.tensor(filtering.bias, dtype=torch.float64), matrices(filtering)[2]
    torch.testing.assert_close(result @ shares, torch.ones(filtering.outputs, dtype=torch.float64))


@pytest.mark.parametrize("largest", [1, 2, 4])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("frames", range(1, 16))
def test_steps_make_every_output_once(frames, first, largest):
    made = []
    for filtering, start, windows, out in steps_for(frames, first=first, doubled=False, single=False, largest=largest):
        assert filtering.outputs <= largest
        for window in range(windows):
            outputs = range(out + window * filtering.outputs, out + (window + 1) * filtering.outputs)
            made.extend(outputs)
            # Output f reads up to frame f of the chunk, which lies behind a history of one or two.
            assert start + window * filtering.stride + filtering.window - 1 == outputs[-1] + (1 if first else 2) - (filtering is FIRST)
    assert sorted(made) == list(range(frames))


def causal(frames, history, weight, bias):
    """The reference, channels-last: history (B, 2, ...) in front of frames (B, F, H, W, C)."""
    video = torch.cat([history, frames], dim=1).movedim(-1, 1)
    return F.conv3d(video, weight, bias, padding=(0, 1, 1)).movedim(1, -1)


def by_steps(work, count, weight, bias, dtype, by_rows=None, **kind):
    out = torch.full((len(work), count, *work.shape[2:4], len(weight)), float("nan"), dtype=dtype)
    rows = F.pad(work, (0, 0, 0, 0, 1, 1)).to(dtype)
    for step in steps_for(**kind):
        taps = transformed_taps(weight, step.filtering, dtype, by_rows)
        filter_frames(rows, taps, bias.to(dtype), step, out, add=False, rows=by_rows)
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("largest", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_later_chunks_equal_the_convolution(count, largest, dtype, tolerance):
    x, history = torch.randn(2, count, 4, 5, 6), torch.randn(2, 2, 4, 5, 6)
    weight, bias = torch.randn(7, 6, 3, 3, 3) / 162**0.5, torch.randn(7)
    kind = {"frames": count, "first": False, "doubled": False, "single": False, "largest": largest}
    found = by_steps(torch.cat([history, x], dim=1), count, weight, bias, dtype, **kind)
    torch.testing.assert_close(found.float(), causal(x, history, weight, bias), rtol=0, atol=tolerance)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_a_first_chunk_is_preceded_by_copies_of_its_first_frame(count):
    x = torch.randn(1, count, 4, 5, 6)
    weight, bias = torch.randn(7, 6, 3, 3, 3) / 162**0.5, torch.randn(7)
    kind = {"frames": count, "first": True, "doubled": False, "single": False, "largest": 4}
    found = by_steps(torch.cat([x[:, :1], x], dim=1), count, weight, bias, torch.float32, **kind)
    torch.testing.assert_close(found, causal(x, x[:, :1].expand(-1, 2, -1, -1, -1), weight, bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "single"), [(True, True), (True, False), (False, False)])
def test_doubled_frames_equal_the_convolution_of_both(first, single):
    x, before = torch.randn(1, 3, 4, 5, 6), torch.randn(1, 1, 4, 5, 6)
    weight, bias = torch.randn(7, 6, 3, 3, 3) / 162**0.5, torch.randn(7)
    both = x.repeat_interleave(2, dim=1)[:, int(single) :]
    history = (x[:, :1] if first else before).expand(-1, 2, -1, -1, -1)
    front = before[:, : 0 if first else 1] if single or not first else x[:, :1]
    kind = {"frames": 3, "first": first, "doubled": True, "single": single, "largest": 4}
    found = by_steps(torch.cat([front, x], dim=1), both.shape[1], weight, bias, torch.float32, **kind)
    torch.testing.assert_close(found, causal(both, history, weight, bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_rows", [DIRECT, MINIMAL_2, MINIMAL_4], ids=["direct", "minimal 2", "minimal 4"])
@pytest.mark.parametrize("height", [1, 4, 7])
@pytest.mark.parametrize("first", [False, True])
def test_rows_can_be_filtered_as_frames_are(first, height, by_rows):
    """Heights that windows of rows divide and do not; every kind of step."""
    x, before = torch.randn(2, 8, height, 5, 6), torch.randn(2, 2, height, 5, 6)
    history = x[:, :1].expand(-1, 2, -1, -1, -1) if first else before
    weight, bias = torch.randn(7, 6, 3, 3, 3) / 162**0.5, torch.randn(7)
    kind = {"frames": 8, "first": first, "doubled": False, "single": False, "largest": 4}
    found = by_steps(torch.cat([history[:, int(first) :], x], dim=1), 8, weight, bias, torch.float32, by_rows, **kind)
    torch.testing.assert_close(found, causal(x, history, weight, bias), rtol=0, atol=1e-5)


def test_the_sum_of_taps_is_not_rounded_to_half_precision():
    """As diffusers computes it: the first frame and its copies each meet their own tap."""
    x, weight, bias = torch.randn(1, 1, 4, 5, 6).bfloat16(), torch.randn(7, 6, 3, 3, 3).bfloat16(), torch.zeros(7)
    kind = {"frames": 1, "first": True, "doubled": False, "single": False, "largest": 1}
    found = by_steps(x.expand(-1, 2, -1, -1, -1), 1, weight, bias, torch.bfloat16, **kind)
    exact = causal(x.double(), x.double().expand(-1, 2, -1, -1, -1), weight.double(), bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)  # one rounding


def test_outputs_can_be_added():
    x, weight, bias = torch.randn(1, 6, 4, 5, 6), torch.randn(7, 6, 3, 3, 3), torch.randn(7)
    (step,) = steps_for(4, first=False, doubled=False, single=False, largest=4)
    taps = transformed_taps(weight, step.filtering, torch.float32)
    plain, onto = torch.zeros(1, 4, 2, 5, 7), torch.randn(1, 4, 2, 5, 7)
    expected = onto.clone()
    filter_frames(x, taps, bias, step, plain, add=False)
    filter_frames(x, taps, bias, step, onto, add=True)
    torch.testing.assert_close(onto, expected + plain, rtol=1e-5, atol=1e-5)
