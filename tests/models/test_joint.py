"""Two streams of tokens as one: without a copy where they lie so, and never where they do not."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def test_what_hooks_have_kept_is_not_written_to():
    """Neither what the norms give, nor what comes through where there is none."""
    ours, _ = tiny_twins("5b")
    attention, kept = ours.transformer_blocks[0].attn1, []
    attention.norm_k = torch.nn.Identity()
    for layer in (attention.norm_q, attention.to_k):
        layer.register_forward_hook(lambda _, __, result: kept.append((result, result.clone())))
    ours(**inputs(ours))
    assert len(kept) == 2 and all(torch.equal(result, before) for result, before in kept)


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")  # used by torch.func itself
@sdpa_kernel(SDPBackend.MATH)  # others have no rules for these
def test_transforms_of_functions_need_no_gradients():
    """Derivatives forwards are those that gradients give, and a batch by `vmap` is that batch."""
    ours, _ = tiny_twins("5b")
    given = inputs(ours)
    x, others = given.pop("hidden_states"), {**given, "timestep": given["timestep"][:1]}
    text = others.pop("encoder_hidden_states")

    def of_one(x, text):
        return ours(hidden_states=x[None], encoder_hidden_states=text[None], **others)[0][0]

    expected = torch.stack([of_one(*one) for one in zip(x, text, strict=True)])
    torch.testing.assert_close(torch.func.vmap(of_one)(x, text), expected, rtol=0, atol=1e-5)

    direction, weights = torch.randn_like(x[0]), torch.randn_like(expected[0])
    _, tangent = torch.func.jvp(lambda one: of_one(one, text[0]), (x[0],), (direction,))
    with torch.enable_grad():
        start = x[0].clone().requires_grad_()
        (of_one(start, text[0]) * weights).sum().backward()
    assert float((tangent * weights).sum()) == pytest.approx(float((start.grad * direction).sum()), rel=1e-3, abs=1e-3)
