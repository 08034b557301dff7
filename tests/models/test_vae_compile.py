"""The VAE under torch.compile: no graph breaks, one graph for the first chunk and one for all that follow, the same results."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffusers_cogvideox.models import autoencoder
from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from parity import TINY_VAE, randomize

SMALL = TINY_VAE | {
    "block_out_channels": (8, 16),
    "down_block_types": ("CogVideoXDownBlock3D",) * 2,
    "up_block_types": ("CogVideoXUpBlock3D",) * 2,
    "layers_per_block": 1,
    "temporal_compression_ratio": 2,
}
INPUTS = {"decode": (1, 4, 7, 2, 3), "encode": (1, 3, 25, 4, 6)}  # three chunks each
TOWERS = {"decode": "decoder", "encode": "encoder"}


@pytest.fixture
def vae():
    torch.compiler.reset()
    yield randomize(AutoencoderKLCogVideoX(**SMALL)).eval()
    torch.compiler.reset()


def code(vae, direction, x):
    with torch.no_grad():
        return vae.decode(x).sample if direction == "decode" else vae.encode(x).latent_dist.parameters


def compile_in_place(vae, direction, options):
    getattr(vae, TOWERS[direction]).compile(**options)


def compile_method(vae, direction, options):
    setattr(vae, direction, torch.compile(getattr(vae, direction), **options))


@pytest.mark.parametrize(
    ("way", "direction", "graphs"),
    [
        (compile_in_place, "decode", 2),
        (compile_in_place, "encode", 2),
        (compile_method, "decode", 1),
        (compile_method, "encode", 1),
    ],
)
def test_compiled_coding_has_no_graph_breaks(vae, way, direction, graphs):
    """`fullgraph=True` would raise at one. A compiled method is one graph of all chunks, a compiled tower one of each kind of chunk."""
    x = torch.randn(INPUTS[direction])
    expected = code(vae, direction, x)
    counter = CompileCounter()
    way(vae, direction, {"fullgraph": True, "backend": counter})
    torch.testing.assert_close(code(vae, direction, x), expected, rtol=0, atol=2e-5)
    assert counter.frame_count == graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # by the compiler, of its own doing
def test_compiled_gradients_are_the_same(vae):
    z = torch.randn(1, 4, 4, 2, 3)
    parameter = vae.decoder.conv_in.conv.weight
    expected = torch.autograd.grad(vae.decode(z).sample.square().mean(), parameter)
    vae.decoder.compile(fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(vae.decode(z).sample.square().mean(), parameter)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["decoder", "decoder.up_blocks.0", "decoder.up_blocks.0.resnets.1"])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_part_is_seen(vae, monkeypatch, part, in_place):
    """Also one that `torch.compile` was wrapped around; nothing is compiled here, and the path that no compiler can follow is barred."""
    z = torch.randn(1, 4, 2, 2, 3)
    expected = code(vae, "decode", z)
    if in_place:
        vae.get_submodule(part).compile(backend="eager")
    else:
        vae.set_submodule(part, torch.compile(vae.get_submodule(part), backend="eager"))
    monkeypatch.setattr(autoencoder, "Rowwise", lambda *_: pytest.fail("not as written down"))
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(code(vae, "decode", z), expected, rtol=0, atol=2e-5)
