"""A video has exactly the frames and pixels that were asked for; what is generated around them is cropped."""

import pytest
import torch

from diffusers_cogvideox import (
    PRESETS,
    CogVideoXFunControlPipeline,
    CogVideoXFunInpaintPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
)
from diffusers_cogvideox.pipelines.framing import crop_video, pad_video
from parity import TINY_TRANSFORMERS
from pictures import clip, images, picture
from tiny_pipeline import call

PIPELINES = {
    "2b": CogVideoXPipeline,
    "5b": CogVideoXPipeline,
    "1.5-5b": CogVideoXPipeline,
    "5b-i2v": CogVideoXImageToVideoPipeline,
    "1.5-5b-i2v": CogVideoXImageToVideoPipeline,
    "fun-control": CogVideoXFunControlPipeline,
    "fun-1.5-control": CogVideoXFunControlPipeline,
    "fun-inp": CogVideoXFunInpaintPipeline,
    "fun-1.5-inp": CogVideoXFunInpaintPipeline,
}


def make(loaded, variant: str, frames: int, height: int, width: int) -> torch.Tensor:
    """One call of any variant, with the inputs that its task wants."""
    own = {
        CogVideoXImageToVideoPipeline: {"image": picture(height, width)},
        CogVideoXFunControlPipeline: {"control_video": images(clip(frames, height, width))},
    }.get(PIPELINES[variant], {})
    size = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": 1, "guidance_scale": 1}
    return call(loaded(PIPELINES[variant], variant), **size, **own)


def test_every_variant_is_here():
    assert set(PIPELINES) == set(TINY_TRANSFORMERS)


@pytest.mark.parametrize("size", [(2, 33, 17), (1, 112, 16)], ids=["odd and portrait", "higher than trained"])
@pytest.mark.parametrize("variant", PIPELINES)
def test_exactly_what_was_asked_for(loaded, variant, size):
    frames, height, width = size
    assert make(loaded, variant, *size).shape == (1, frames, 3, height, width)


def test_the_beginning_and_the_middle_are_kept(pipe):
    once = {"num_inference_steps": 1, "guidance_scale": 1}
    whole = call(pipe, num_frames=17, height=48, width=64, **once)
    cropped = call(pipe, num_frames=10, height=40, width=53, **once)
    torch.testing.assert_close(cropped, whole[:, :10, :, 4:44, 5:58], atol=1e-6, rtol=0)


def test_own_latents_have_the_padded_shape(pipe):
    noise = {"latents": torch.randn(1, 3, 4, 2, 4), "num_inference_steps": 1, "guidance_scale": 1}
    whole = call(pipe, num_frames=9, height=16, width=32, **noise)
    torch.testing.assert_close(call(pipe, num_frames=8, height=16, width=31, **noise), whole[:, :8, ..., :31], atol=1e-6, rtol=0)


def test_cropping_is_logged(pipe, reported):
    call(pipe, num_inference_steps=1, num_frames=9)
    assert not reported.messages
    call(pipe, num_inference_steps=1, num_frames=8)
    assert reported.messages == ["Generating 9 frames of 32x48, the next that the model can make, and cropping them to 8 frames of 32x48."]


@pytest.mark.parametrize("size", [(1, 16, 16), (10, 33, 47), (9, 32, 48)])
def test_padding_is_taken_back_by_cropping(pipe, size):
    frames, height, width = size
    video = clip(*size).transpose(0, 1)[None]
    padded = pad_video(video, pipe.geometry)
    assert padded.shape[2:] == (pipe.geometry.padded_frames(frames), *pipe.geometry.padded_size(height, width))
    torch.testing.assert_close(crop_video(padded, frames=frames, height=height, width=width), video)


def test_padding_repeats_the_edges(pipe):
    video = torch.rand(1, 1, 8, 31, 46)
    padded = pad_video(video, pipe.geometry)
    torch.testing.assert_close(padded[:, :, 8], padded[:, :, 7])
    torch.testing.assert_close(padded[:, :, :8, 31, 1:47], video[..., 30, :])  # a row of 31 + 1 at the bottom, columns 1 + 46 + 1
    torch.testing.assert_close(padded[:, :, :8, :31, 0], video[..., 0])
    torch.testing.assert_close(padded[:, :, :8, :31, 47], video[..., 45])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_released_models_read_as_much_text_as_they_were_trained_with(loaded, name):
    """A transformer whose config is that of the release; its weights do not matter here."""
    pipe = CogVideoXPipeline.from_pipe(loaded(CogVideoXPipeline, "5b"))
    pipe.transformer = type(pipe.transformer)(**TINY_TRANSFORMERS["5b"])
    pipe.transformer.register_to_config(**PRESETS[name].transformer)
    row = PRESETS[name]
    expected = {"num_frames": row.num_frames, "height": row.height, "width": row.width, "max_sequence_length": row.max_sequence_length}
    assert pipe.call_defaults() == expected
    pipe.transformer.register_to_config(max_text_seq_length=300)  # fine-tuned with longer prompts
    assert pipe.call_defaults()["max_sequence_length"] == 300
