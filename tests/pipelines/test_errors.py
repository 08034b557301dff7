"""Every call that cannot give what it asks for says so before anything runs."""

import pytest
import torch

from diffusers_cogvideox import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.pipelines import Condition
from parity import StockDDIMScheduler, StockDPMScheduler
from tiny_pipeline import call

EMBEDS = torch.randn(1, 7, 24)


@pytest.fixture
def still(pipe):
    """The pipeline with a transformer that must not be called."""

    def fail(*_):
        raise AssertionError("the transformer ran")

    handle = pipe.transformer.register_forward_pre_hook(fail)
    yield pipe
    handle.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 10, "output_type": "latent"}, r"latent' cannot be cropped.* num_frames=10 .* 8k\+1 .* 9 or 17"),
        ({"num_frames": 0}, "num_frames=0 is not possible.* Nearest legal: 1"),
        ({"num_frames": 100_000}, "num_frames=100000 .* between 1 and 8193"),
        ({"height": 72, "width": 64, "output_type": "latent"}, "latent' cannot be cropped.* 72x64 .* multiples of 16.* 64x64"),
        ({"width": -16}, "32x-16 .* between 16 and 8192 pixels.* 32x16"),
        ({"height": 7}, "7x48 .* Nearest legal size: 16x48"),
        ({"width": 10_000}, "32x10000 .* Nearest legal size: 32x8192"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 .* between 1 and 1000"),
        ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
        ({"timesteps": [10, 20]}, "must decrease"),
        ({"prompt": []}, "prompt is an empty list"),
        ({"prompt": None}, "exactly one of prompt and prompt_embeds"),
        ({"prompt_embeds": EMBEDS}, "exactly one of prompt and prompt_embeds"),
        ({"negative_prompt": ["a", "b"]}, "lists 2 texts for 1 prompts"),
        ({"negative_prompt_embeds": EMBEDS}, "goes with prompt_embeds only"),
        ({"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS[:, 1:]}, r"\(1, 7, 24\).*\(1, 6, 24\).*same shape"),
        ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"prompt_embeds must be of shape"),
        ({"prompt": None, "prompt_embeds": torch.randn(1, 7, 32)}, "32 wide.*width 24"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
        ({"max_sequence_length": 0}, "max_sequence_length=0"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 videos"),
        ({"latents": torch.randn(1, 2, 4, 4, 6)}, r"\(1, 2, 4, 4, 6\).*need \(1, 3, 4, 4, 6\)"),
        ({"latents": torch.randn(1, 3, 4, 4, 6), "num_frames": 10, "width": 50}, r"10 frames of 32x50 need \(1, 5, 4, 4, 8\)"),
        ({"output_type": "gif"}, "output_type='gif'.*latent"),
        ({"use_dynamic_cfg": "cosine"}, "'cosine' is unknown"),
        ({"callback_on_step_end_tensor_inputs": ["noise_pred"]}, r"\['noise_pred'\].*'latents'"),
        ({"zero_unconditional": True, "negative_prompt": "blue"}, "leaves no place"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan .* finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_arguments(still, options, message: str):
    with pytest.raises(ValueError, match=message):
        call(still, **options)


@pytest.mark.parametrize("prompt", [7, ["a", 7], ("a", "b")])
def test_prompts_are_text(still, prompt):
    with pytest.raises(TypeError, match="prompt must be a string or a list of strings"):
        call(still, prompt=prompt)


@pytest.mark.parametrize("name", ["num_frames", "height", "width", "num_inference_steps", "num_videos_per_prompt", "max_sequence_length"])
def test_numbers_of_things_are_whole(still, name: str):
    with pytest.raises(TypeError, match=f"{name}=16.0 .* whole number"):
        call(still, **{name: 16.0})


def test_text_needs_a_text_encoder(still):
    pipe = CogVideoXPipeline(**{**still.components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="no tokenizer and no text_encoder"):
        call(pipe)
    with pytest.raises(ValueError, match="negative_prompt_embeds or zero_unconditional"):
        call(pipe, prompt=None, prompt_embeds=EMBEDS)


@pytest.mark.parametrize(("name", "remedy"), [("vae", "output_type='latent'"), ("transformer", "load it with one")])
def test_a_component_that_was_left_out(still, name: str, remedy: str):
    with pytest.raises(ValueError, match=f"The pipeline has no {name}: .*{remedy}"):
        call(CogVideoXPipeline(**{**still.components, name: None}))


def test_embeddings_alone_are_enough(pipe):
    pipe = CogVideoXPipeline(**{**pipe.components, "text_encoder": None, "tokenizer": None, "vae": None})
    latents = call(pipe, prompt=None, prompt_embeds=EMBEDS, zero_unconditional=True, output_type="latent")
    assert latents.shape == (1, 3, 4, 4, 6)


@pytest.mark.parametrize("scheduler", [StockDDIMScheduler, StockDPMScheduler])
def test_eta_without_effect(still, scheduler):
    still.scheduler = scheduler.from_config(still.scheduler.config)
    with pytest.raises(ValueError, match=r"eta=0.5 has no effect in CogVideoXD.*diffusers_cogvideox.CogVideoXDDIMScheduler"):
        call(still, eta=0.5)


def test_components_on_different_devices(still):
    with torch.device("meta"):
        elsewhere = CogVideoXTransformer3DModel.from_config(still.transformer.config)
    with pytest.raises(ValueError, match=r"transformer is on meta, but the pipeline runs on cpu. .*pipe.to\('cpu'\)"):
        call(CogVideoXPipeline(**{**still.components, "transformer": elsewhere}))


def test_the_unconditional_half_needs_the_text_encoder_in_place(folders):
    """The transformer is brought to the accelerator when it runs, so that the pipeline runs there; the text encoder is not."""
    pipe = CogVideoXPipeline.from_pretrained(folders())
    pipe.transformer.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level")  # which needs none before it runs
    with pytest.raises(ValueError, match="text_encoder is on cpu, but the pipeline runs on cuda"):
        call(pipe, prompt=None, prompt_embeds=EMBEDS, output_type="latent")


def test_a_transformer_of_another_task(still):
    wide = CogVideoXTransformer3DModel.from_config(still.transformer.config, in_channels=8)
    with pytest.raises(ValueError, match=r"reads 8 channels, 4 more .* not a text-to-video model"):
        call(CogVideoXPipeline(**{**still.components, "transformer": wide}))


def test_extra_channels_must_fit():
    with pytest.raises(ValueError, match="only the channel axis may differ"):
        Condition(latents=torch.zeros(1, 3, 4, 8, 12), extra=torch.zeros(1, 2, 4, 8, 12))
