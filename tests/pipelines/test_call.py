"""What each argument of a call does."""

from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.utils import logging
from torch.utils.hooks import RemovableHandle

from diffusers_cogvideox import CogVideoXPipeline, CogVideoXPipelineOutput, CogVideoXScheduler
from parity import StockDDIMScheduler
from tiny_pipeline import call as call_for_frames


@pytest.fixture
def warnings_of(caplog) -> Callable[..., str]:
    """warnings_of(function, ...) is what the package logs during that call; diffusers' loggers do not propagate by themselves."""

    def run(function: Callable, *args, **kwargs) -> str:
        caplog.clear()
        logging.enable_propagation()
        try:
            function(*args, **kwargs)
        finally:
            logging.disable_propagation()
        return caplog.text

    return run


def call(pipe: CogVideoXPipeline, **options) -> torch.Tensor:
    """Latents of a short call: all that most arguments change."""
    return call_for_frames(pipe, **{"output_type": "latent", **options})


def count_batches(pipe: CogVideoXPipeline) -> tuple[list[int], RemovableHandle]:
    """A list that grows by the batch size at every call of the transformer, and the handle that stops it."""
    batches = []

    def count(_, __, inputs):
        batches.append(len(inputs["hidden_states"]))

    return batches, pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def test_videos_per_prompt_follow_their_prompt(pipe):
    prompts = ["a red circle", "a green square"]
    together = call(pipe, prompt=prompts, num_videos_per_prompt=2, generator=seeds(1, 2, 3, 4))
    assert together.shape == (4, 3, 4, 4, 6)
    for position, (prompt, seed) in enumerate([(prompts[0], 1), (prompts[0], 2), (prompts[1], 3), (prompts[1], 4)]):
        torch.testing.assert_close(together[position], call(pipe, prompt=prompt, generator=seeds(seed))[0], atol=1e-4, rtol=0)


def test_generators_may_come_in_a_tuple(pipe):
    prompts = ["a red circle", "a green square"]
    torch.testing.assert_close(call(pipe, prompt=prompts, generator=tuple(seeds(1, 2))), call(pipe, prompt=prompts, generator=seeds(1, 2)))


def test_passed_embeddings_are_repeated_too(pipe):
    embeds, negative = pipe.encode_prompt("a red circle moves right", max_sequence_length=7)
    two = call(pipe, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=negative, num_videos_per_prompt=2, generator=seeds(3, 4))
    torch.testing.assert_close(two[:1], call(pipe), atol=1e-4, rtol=0)


def test_every_output_type(pipe):
    tensor, array, images = (call(pipe, output_type=kind) for kind in ("pt", "np", "pil"))
    assert tensor.shape == (1, 9, 3, 32, 48)
    np.testing.assert_allclose(array, tensor.permute(0, 1, 3, 4, 2).numpy(), atol=1e-6)
    assert isinstance(images[0][0], PIL.Image.Image)
    assert images[0][0].size == (48, 32)
    assert isinstance(pipe("a", num_frames=1, height=16, width=16, num_inference_steps=1), CogVideoXPipelineOutput)
    (frames,) = pipe("a", num_frames=1, height=16, width=16, num_inference_steps=1, output_type="pt", return_dict=False)
    assert frames.shape == (1, 1, 3, 16, 16)


def test_latents_of_the_padded_model_can_be_decoded(loaded):
    pipe = loaded(CogVideoXPipeline, "1.5-5b")
    latents = call(pipe, output_type="latent")
    assert latents.shape[1] == 3  # not the 4 that patch_size_t = 2 needs
    video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="pt")
    torch.testing.assert_close(video, call(pipe, output_type="pt"))


def test_guidance_off_predicts_once_per_step(pipe):
    batches, handle = count_batches(pipe)
    call(pipe, guidance_scale=1.0)
    call(pipe, guidance_scale=1.5)
    call(pipe, guidance_scale=1.5, sequential_guidance=True)
    handle.remove()
    assert batches == [1] * 3 + [2] * 3 + [1] * 6


def test_sequential_guidance_makes_the_same_video(pipe):
    torch.testing.assert_close(call(pipe, sequential_guidance=True), call(pipe), atol=1e-4, rtol=0)


def test_zero_unconditional_is_a_zero_embedding(pipe):
    positive, _ = pipe.encode_prompt("a red circle moves right", max_sequence_length=7)
    by_hand = call(pipe, prompt=None, prompt_embeds=positive, negative_prompt_embeds=torch.zeros_like(positive))
    torch.testing.assert_close(call(pipe, zero_unconditional=True), by_hand)
    assert not torch.allclose(by_hand, call(pipe), atol=1e-3)


def test_the_unconditional_half_is_as_long_as_the_embeddings(pipe):
    positive, _ = pipe.encode_prompt("a red circle moves right", max_sequence_length=11)
    by_hand = call(pipe, prompt=None, prompt_embeds=positive)
    torch.testing.assert_close(by_hand, call(pipe, max_sequence_length=11))


def test_guidance_scale_is_not_changed_by_a_schedule(pipe):
    for rule in (True, "stock", "progress"):
        call(pipe, use_dynamic_cfg=rule)
        assert pipe.guidance_scale == 6
    assert torch.equal(call(pipe, use_dynamic_cfg=True), call(pipe, use_dynamic_cfg="stock"))
    assert not torch.allclose(call(pipe, use_dynamic_cfg="progress"), call(pipe, use_dynamic_cfg="stock"), atol=1e-3)


def test_eta_takes_effect(pipe):
    assert not torch.allclose(call(pipe, eta=1.0), call(pipe), atol=1e-3)


def test_defaults_are_what_the_model_was_trained_for(pipe):
    assert pipe.call_defaults() == {"num_frames": 9, "height": 64, "width": 96, "max_sequence_length": 7}
    assert pipe("a red circle", num_inference_steps=1, output_type="pt").frames.shape == (1, 9, 3, 64, 96)


def test_a_long_prompt_is_cut_and_says_so(pipe, warnings_of):
    prompt = "a red circle moves slowly right on the white background"
    words = pipe.tokenizer.decode(pipe.tokenizer(prompt).input_ids[6:-1])
    assert f"cuts off: {words!r}" in warnings_of(call, pipe, prompt=["a", prompt])
    assert not warnings_of(call, pipe, prompt="a red circle")


@pytest.mark.parametrize("option", [{"negative_prompt": "blue"}, {"use_dynamic_cfg": True}, {"zero_unconditional": True}])
def test_guidance_without_effect_is_reported(pipe, warnings_of, option):
    assert "turns guidance off" in warnings_of(call, pipe, guidance_scale=1.0, **option)


def test_custom_timesteps(pipe):
    seen = []

    def note(_, step, timestep, tensors):
        seen.append((step, int(timestep)))

    call(pipe, timesteps=[999, 700, 20], callback_on_step_end=note)
    assert seen == [(0, 999), (1, 700), (2, 20)]
    assert pipe.num_timesteps == 3


def test_our_general_scheduler(pipe):
    pipe.scheduler = CogVideoXScheduler.from_config(pipe.scheduler.config, algorithm_type="dpmsolver++")
    assert call(pipe, num_inference_steps=7).isfinite().all()


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_a_callback_may_replace_the_latents(pipe):
    fixed = torch.randn(1, 3, 4, 4, 6)

    def replace(_, step, timestep, tensors):
        return {"latents": fixed} if step == 2 else tensors

    latents = call(pipe, callback_on_step_end=replace)
    torch.testing.assert_close(latents, fixed)


def test_a_callback_sees_what_it_asks_for(pipe):
    shapes = {}

    def look(p, step, timestep, tensors):
        assert p.current_timestep == timestep
        shapes.update({name: tuple(tensor.shape) for name, tensor in tensors.items()})

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    call(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert shapes == {"latents": (1, 3, 4, 4, 6), "prompt_embeds": (2, 7, 24), "negative_prompt_embeds": (1, 7, 24)}
    assert pipe.current_timestep is None


def test_a_callback_may_replace_the_negative_prompt(pipe):
    positive, other = pipe.encode_prompt("a red circle moves right", "blue square", max_sequence_length=7)

    def swap(_, step, timestep, tensors):
        return {"negative_prompt_embeds": other}

    def swap_by_hand(_, step, timestep, tensors):
        return {"prompt_embeds": torch.cat([other, positive])}

    torch.testing.assert_close(call(pipe, callback_on_step_end=swap), call(pipe, callback_on_step_end=swap_by_hand))
    assert not torch.allclose(call(pipe, callback_on_step_end=swap), call(pipe), atol=1e-4)


def test_diffusers_guidance_cutoff(pipe):
    batches, handle = count_batches(pipe)
    call(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0))
    handle.remove()
    assert batches == [2, 1, 1]


def test_half_a_cutoff_is_an_error(pipe):
    def drop(_, step, timestep, tensors):
        return {"prompt_embeds": torch.randn(1, 7, 24)}

    with pytest.raises(ValueError, match="_guidance_scale = 0"):
        call(pipe, callback_on_step_end=drop)


def test_a_callback_must_not_return_what_nobody_reads(pipe):
    with pytest.raises(ValueError, match=r"returned \['noise'\].*'latents'"):
        call(pipe, callback_on_step_end=lambda *_: {"noise": torch.zeros(1)})


def test_interrupt_stops_after_the_step_and_decodes_what_there_is(pipe):
    steps, latents = [], []

    def stop(p, step, timestep, tensors):
        steps.append(step)
        latents.append(tensors["latents"])
        p._interrupt = len(steps) == 2

    video = call(pipe, num_inference_steps=10, callback_on_step_end=stop, output_type="pt")
    assert steps == [0, 1]
    expected = pipe.video_processor.postprocess_video(pipe.decode_latents(latents[-1]), output_type="pt")
    torch.testing.assert_close(video, expected)
    call(pipe, callback_on_step_end=stop)
    assert len(steps) == 5  # the next call runs to its end again


# --- memory and hooks -------------------------------------------------------------------------------------------------


@pytest.fixture
def own(folders) -> CogVideoXPipeline:
    """A pipeline whose models no other test sees."""
    return CogVideoXPipeline.from_pretrained(folders())


def test_group_offloading_by_blocks_changes_nothing(pipe, own):
    own.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    torch.testing.assert_close(call(own), call(pipe))


def test_vae_tiling_and_slicing_are_reached(pipe, own):
    sizes = []
    own.vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append((len(args[0]), *args[0].shape[3:])))
    noise = torch.randn(2, 3, 4, 8, 12)
    own.vae.enable_slicing()
    own.decode_latents(noise)
    assert set(sizes) == {(1, 8, 12)}
    sizes.clear()
    own.vae.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=48, blended=True)
    own.decode_latents(noise)
    assert all(height <= 6 and width <= 6 for _, height, width in sizes)


def test_fused_projections_make_the_same_video(pipe, own):
    own.fuse_qkv_projections()
    torch.testing.assert_close(call(own), call(pipe), atol=1e-4, rtol=0)
    own.unfuse_qkv_projections()
    torch.testing.assert_close(call(own), call(pipe), atol=1e-4, rtol=0)


def test_components_of_different_precision_work_together(own, pipe):
    own.vae.to(torch.bfloat16)
    own.text_encoder.to(torch.bfloat16)
    assert own.transformer.dtype == torch.float32
    torch.testing.assert_close(call(own), call(pipe), atol=0.2, rtol=0)
    assert call(own, output_type="pt").isfinite().all()


def test_stock_scheduler_on_our_pipeline_keeps_its_grid(pipe):
    pipe.scheduler = StockDDIMScheduler.from_config(pipe.scheduler.config)
    call(pipe, num_inference_steps=5)
    assert pipe.num_timesteps == 5
