"""How many videos, frames, pixels and text tokens: what diffusers does with the request, and what we do."""

import math

import pytest
import torch

from diffusers_cogvideox import PRESETS, CogVideoXPipeline
from parity import TINY_TRANSFORMERS, StockPipeline
from tiny_pipeline import call

ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 1, "height": 16, "width": 16}


@pytest.fixture
def pipes(loaded):
    """pipes(variant="5b"): our pipeline and diffusers'."""
    return lambda variant="5b": [cls(**loaded(cls, variant).components) for cls in (CogVideoXPipeline, StockPipeline)]


def test_d15_num_videos_per_prompt(pipes):
    assert [len(call(pipe, num_videos_per_prompt=3, output_type="latent", **ONE_STEP)) for pipe in pipes()] == [3, 1]


def test_d20_dynamic_guidance_follows_the_timestep(pipes):
    """The formula wants the share of the steps that is done; diffusers and the original code put (n - t) / n there."""
    ours, stock = pipes()
    scales, steps = [], 10

    def note(pipe, *_):
        scales.append(pipe.guidance_scale)
        return {}

    call(stock, use_dynamic_cfg=True, num_inference_steps=steps, output_type="latent", callback_on_step_end=note)
    assert scales != sorted(scales)  # swings
    call(ours, use_dynamic_cfg=True, num_inference_steps=steps, output_type="latent", callback_on_step_end=note)
    assert scales[steps:] == [6] * steps  # what was asked for stays readable
    swinging, meant = (call(ours, use_dynamic_cfg=rule, num_inference_steps=steps, output_type="latent") for rule in (True, "progress"))
    torch.testing.assert_close(
        swinging, call(stock, use_dynamic_cfg=True, num_inference_steps=steps, output_type="latent"), atol=1e-3, rtol=0
    )
    by_hand = iter([1 + 6 * (1 - math.cos(math.pi * (i / steps) ** 5)) / 2 for i in range(1, steps)])

    def rise(pipe, index, *_):
        pipe._guidance_scale = next(by_hand, 1)
        return {}

    smooth = call(ours, guidance_scale=1 + 1e-12, num_inference_steps=steps, output_type="latent", callback_on_step_end=rise)
    torch.testing.assert_close(meant, smooth, atol=1e-4, rtol=0)


def test_d21_sizes_that_are_no_multiples_of_16(pipes):
    ours, stock = pipes()
    size = ONE_STEP | {"height": 72, "width": 64, "num_frames": 1}
    with pytest.raises(RuntimeError, match="must match"):
        call(stock, **size)
    assert call(ours, **size).shape[-2:] == (72, 64)


def test_d22_frame_counts_that_are_not_8k_plus_1(pipes):
    ours, stock = pipes()
    asked = [10, 12, 13, 5, 2]
    assert [call(stock, num_frames=n, **ONE_STEP).shape[1] for n in asked] == [9, 9, 16, 8, 1]
    assert [call(ours, num_frames=n, **ONE_STEP).shape[1] for n in asked] == asked


def test_d24_latents_without_the_padding_of_1_5(pipes):
    assert [call(pipe, output_type="latent", **ONE_STEP).shape[1] for pipe in pipes("1.5-5b")] == [3, 4]


def test_d27_embeddings_of_any_length_on_2b(pipes):
    ours, stock = pipes("2b")
    embeds = {"prompt": None, "prompt_embeds": torch.randn(1, 5, 24), "negative_prompt_embeds": torch.randn(1, 5, 24), **ONE_STEP}
    with pytest.raises(RuntimeError, match="must match the size"):
        call(stock, **embeds)
    assert call(ours, **embeds).isfinite().all()


class Reached(Exception):  # noqa: N818 - no error: what there was to see has been seen
    """Ends a call where the prompt is encoded."""


def test_d37_text_length_of_1_5(pipes, monkeypatch):
    """1.5 was trained with 224 tokens; its config, and diffusers' default for every model, say 226."""
    lengths = []
    for pipe in pipes():
        pipe.transformer = type(pipe.transformer)(**TINY_TRANSFORMERS["5b"])
        pipe.transformer.register_to_config(**PRESETS["1.5-5b"].transformer)

        def encode_prompt(*_, max_sequence_length, **__):
            lengths.append(max_sequence_length)
            raise Reached

        monkeypatch.setattr(pipe, "encode_prompt", encode_prompt)
        with pytest.raises(Reached):
            pipe("a red circle")
    assert lengths == [224, 226]
