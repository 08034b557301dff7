"""Feature caches in the pipelines: what diffusers does, and what we do."""

import pytest
import torch
from diffusers import PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

from diffusers_cogvideox import CogVideoXPipeline
from parity import StockPipeline
from tiny_pipeline import call


@pytest.fixture
def pipes(loaded):
    """Ours and diffusers', each with a transformer of its own."""
    made = []
    for cls in (CogVideoXPipeline, StockPipeline):
        pipe = cls(**loaded(cls).components)
        weights = pipe.transformer.state_dict()
        pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config).eval()
        pipe.transformer.load_state_dict(weights)
        made.append(pipe)
    return made


def latents(pipe, **options):
    return call(pipe, **{"num_inference_steps": 8, "output_type": "latent", **options})


def test_d10_the_timestep_is_told(pipes):
    ours, stock = pipes
    with pytest.raises(ValueError, match="current_timestep_callback` function must be provided"):
        stock.transformer.enable_cache(PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2))
    stock.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, current_timestep_callback=lambda: stock.current_timestep)
    )
    ours.transformer.enable_cache(PyramidAttentionBroadcastConfig())
    torch.testing.assert_close(latents(ours), latents(stock), rtol=0, atol=1e-4)


def test_d10_a_stopped_call_leaves_nothing_behind(pipes):
    def stop(_pipe, index, _timestep, _tensors):
        if index == 3:
            raise InterruptedError
        return {}

    differ = []
    for pipe in pipes:
        pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.attn1"]))
        expected = latents(pipe)
        with pytest.raises(InterruptedError):
            latents(pipe, prompt="a blue square moves left", callback_on_step_end=stop)
        differ.append(not torch.equal(latents(pipe), expected))
    assert differ == [False, True]


def test_d11_halves_made_apart_have_states_of_their_own(pipes):
    """What diffusers' transformer does to our pipeline's two passes: the second takes the first one's attention for its own."""
    ours, stock = pipes
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000), current_timestep_callback=lambda: 500
    )
    errors = []
    for transformer in (ours.transformer, stock.transformer):
        pipe = CogVideoXPipeline(**{**ours.components, "transformer": transformer})
        transformer.enable_cache(config)
        together, apart = latents(pipe), latents(pipe, sequential_guidance=True)
        errors.append(float((apart - together).abs().max()))
    assert errors[0] < 1e-4 < errors[1]
