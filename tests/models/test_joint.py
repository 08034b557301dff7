"""Two streams of tokens as one: without a copy where they lie so, and never where they do not."""

import pytest
import torch

from diffusers_cogvideox.models.joint import joined, room_for_both
from transformer_cases import inputs, tiny_twins


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def filled(text=3, video=5):
    of_text, of_video = room_for_both(torch.empty(2, text, 4), torch.empty(2, video, 4), torch.bfloat16)
    return of_text.copy_(torch.randn(2, text, 4)), of_video.copy_(torch.randn(2, video, 4))


def test_room_for_both_is_one_tensor():
    text, video = filled()
    joint = joined(text, video)
    assert joint.dtype == torch.bfloat16 and torch.equal(joint, torch.cat([text, video], dim=1))
    assert joint.data_ptr() == text.data_ptr() and joint.is_contiguous()


@pytest.mark.parametrize(
    "change",
    [
        lambda text, video: (video, text),
        lambda text, video: (text, video[:, 1:]),
        lambda text, video: (text[:, :2], video),
        lambda text, video: (text, video.clone()),
        lambda text, video: (text, video.flip(1)),
        lambda text, video: (text.float(), video.float()),
        lambda text, video: (text[:1], video[1:]),
    ],
)
def test_other_streams_are_copied(change):
    text, video = change(*filled())
    joint = joined(text, video)
    assert torch.equal(joint, torch.cat([text, video], dim=1))
    assert joint.data_ptr() not in (text.data_ptr(), video.data_ptr())


def test_with_gradients_streams_are_copied():
    text, video = filled()
    with torch.enable_grad():
        assert joined(text, video).data_ptr() != text.data_ptr()


def test_blocks_join_their_streams_without_a_copy(monkeypatch):
    """Copies do not become more with the blocks; with gradients there are two in each."""
    copies, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args, **kwargs: copies.append(1) or cat(*args, **kwargs))

    def counted(layers):
        ours, _ = tiny_twins("5b", num_layers=layers)
        given = inputs(ours)
        copies.clear()
        ours(**given)
        return len(copies)

    assert counted(1) == counted(3)
    with torch.enable_grad():
        assert counted(3) == counted(1) + 4
