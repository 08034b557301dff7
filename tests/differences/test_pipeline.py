"""The pipeline around the loop: what diffusers does, and what we do."""

from importlib import import_module

import pytest
import torch
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from diffusers_cogvideox import (
    CogVideoXContinuationPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from diffusers_cogvideox.generation.model_folder import ModelFolder
from diffusers_cogvideox.generation.routes import choose_pipeline
from diffusers_cogvideox.presets import PRESETS
from parity import StockPipeline, StockTransformer
from tiny_pipeline import call, save_stock_folder


@pytest.fixture
def pipes(loaded):
    """Our pipeline and diffusers'."""
    return [cls(**loaded(cls).components) for cls in (CogVideoXPipeline, StockPipeline)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # other pipelines of diffusers
def test_d14_the_class_for_a_model_and_what_there_is(tmp_path):
    """The automatic pipelines of diffusers are for pictures and sound; the command chooses by the model and the files."""
    folder = save_stock_folder(tmp_path)
    with pytest.raises(ValueError, match="AutoPipeline can't find a pipeline linked to CogVideoXPipeline"):
        import_module("diffusers.pipelines.auto_pipeline").AutoPipelineForText2Image.from_pretrained(folder)
    chosen = [choose_pipeline(ModelFolder.open(folder).configs["transformer"], "X", files) for files in ((), ("video",), ("extend",))]
    assert chosen == [CogVideoXPipeline, CogVideoXVideoToVideoPipeline, CogVideoXContinuationPipeline]
    assert [cls.from_pretrained(folder).transformer.config.num_layers for cls in chosen] == [2, 2, 2]


def test_d20_the_scale_that_was_asked_for_stays(pipes):
    scales = []
    for pipe in pipes:
        call(pipe, use_dynamic_cfg=True, output_type="latent")
        scales.append(pipe.guidance_scale)
    assert scales[0] == 6
    assert scales[1] != 6


def test_x20_latents_survive_a_decoding_that_runs_out_of_memory(pipes, monkeypatch):
    """Of the latents of ours, the video is made later."""
    expected = call(pipes[0])
    carried = []
    for pipe in pipes:
        with monkeypatch.context() as patch:
            patch.setattr(type(pipe.vae.decoder), "forward", no_memory)
            with pytest.raises(torch.OutOfMemoryError) as caught:
                call(pipe)
        carried.append(getattr(caught.value, "latents", None))
    assert torch.equal(pipes[0].decode_frames(carried[0], output_type="pt"), expected)
    assert carried[1] is None


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.gpu
def test_x21_no_decoded_video_stays_on_the_device(folders):
    places = []
    for cls in (CogVideoXPipeline, StockPipeline):
        pipe = cls.from_pretrained(folders()).to("cuda")
        places.append(call(pipe, output_type="pt").device.type)
    assert places == ["cpu", "cuda"]


# --- found besides ----------------------------------------------------------------------------------------------------


class Reached(Exception):  # noqa: N818 - no error: what there was to see has been seen
    """Ends a call of stock's pipeline with the size that it would make."""


class Watched(StockPipeline):
    def prepare_latents(self, *sizes):
        raise Reached(*sizes[2:5])  # frames, height, width


@pytest.mark.parametrize(("name", "size"), [("2b", (49, 480, 720)), ("1.5-5b", (85, 2400, 2400))])
def test_x8_native_size(name, size, pipes):
    """Stock counts the frame of 1.5 that its patch size asks for as four frames: 85 for 81."""
    preset, parts = PRESETS[name], pipes[1].components
    with torch.device("meta"):
        ours, stock = (cls(**preset.transformer) for cls in (CogVideoXTransformer3DModel, StockTransformer))
    with pytest.raises(Reached) as reached:
        Watched(**parts | {"transformer": stock})("a red circle")
    assert reached.value.args == size
    defaults = CogVideoXPipeline(**parts | {"transformer": ours}).call_defaults()
    assert [defaults[key] for key in ("num_frames", "height", "width")] == [preset.num_frames, preset.height, preset.width]


def test_x9_the_unconditional_half(pipes):
    """The embedding of "" in both; the zeros of the original code on demand."""
    ours, stock = pipes
    short = {"num_inference_steps": 2, "output_type": "latent"}
    usual, empty, zero = (call(ours, **short, **o) for o in ({}, {"negative_prompt": ""}, {"zero_unconditional": True}))
    torch.testing.assert_close(usual, empty, rtol=0, atol=0)
    torch.testing.assert_close(usual, call(stock, **short), rtol=0, atol=1e-3)
    assert (usual - zero).abs().max() > 1e-2


def test_x10_callbacks(pipes):
    ours, stock = pipes
    other = ours.encode_prompt("blue", do_classifier_free_guidance=False, max_sequence_length=7)[0]
    swap = {
        "callback_on_step_end": lambda *_: {"negative_prompt_embeds": other},
        "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"],
    }
    changed = [bool((call(p, output_type="latent", **swap) != call(p, output_type="latent")).any()) for p in (ours, stock)]
    assert changed == [True, False]
    call(stock, callback_on_step_end=lambda *_: {"noise": 0}, output_type="latent")
    with pytest.raises(ValueError, match=r"returned \['noise'\]"):
        call(ours, callback_on_step_end=lambda *_: {"noise": 0})


def test_x11_missing_tensors(tmp_path):
    folder = save_stock_folder(tmp_path)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("proj_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        assert type(StockPipeline.from_pretrained(folder).transformer) is StockTransformer
    finally:
        logging.set_verbosity(verbosity)
    with pytest.raises(OSError, match=r"transformer lack 1 of the model's tensors, among them 'proj_out.weight'"):
        CogVideoXPipeline.from_pretrained(folder)
