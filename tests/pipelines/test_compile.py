"""A whole call with compiled blocks: one compilation, whatever the prompt, the step and the half of guidance."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_cogvideox import CogVideoXPipeline
from tiny_pipeline import call


@pytest.fixture
def compiled(folders):
    """A pipeline of its own, and what counts its compilations."""
    torch.compiler.reset()
    pipe, counter = CogVideoXPipeline.from_pretrained(folders()), CompileCounterWithBackend("eager")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    yield pipe, counter
    torch.compiler.reset()


@pytest.mark.parametrize("sequential", [False, True], ids=["both halves at once", "one after the other"])
def test_d5_one_compilation_for_all_calls(compiled, pipe, sequential):
    ours, counter = compiled
    for prompt in ("a red circle moves right", "the blue square"):
        options = {"prompt": prompt, "sequential_guidance": sequential}
        expected = call(pipe, generator=torch.Generator().manual_seed(3), **options)
        torch.testing.assert_close(call(ours, **options), expected, rtol=0, atol=1e-4)
    assert counter.frame_count == 1
