"""What diffusers' own tests demand of every pipeline, for each of ours: saving, hooks, callbacks, batches, parts that work alone."""

from inspect import Parameter, signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_cogvideox as ours
from parity import StockFunControlPipeline, StockImageToVideoPipeline, StockPipeline, StockVideoToVideoPipeline
from pictures import clip, picture
from tiny_pipeline import call as call_for_frames

VARIANTS = {
    ours.CogVideoXPipeline: "5b",
    ours.CogVideoXImageToVideoPipeline: "1.5-5b-i2v",
    ours.CogVideoXVideoToVideoPipeline: "1.5-5b",
    ours.CogVideoXFunControlPipeline: "fun-control",
    ours.CogVideoXFunInpaintPipeline: "fun-1.5-inp",
    ours.CogVideoXContinuationPipeline: "5b",
}
STOCK = [StockPipeline, StockImageToVideoPipeline, StockVideoToVideoPipeline, StockFunControlPipeline]
PROMPTS = ["a red circle", "a green square"]
VIDEOS = [clip(9, 32, 48, seed) for seed in (1, 2)]
PICTURES = [picture(32, 48, seed) for seed in (1, 2)]

OWN = {
    ours.CogVideoXImageToVideoPipeline: {"image": PICTURES},
    ours.CogVideoXVideoToVideoPipeline: {"video": VIDEOS, "num_frames": None, "strength": 1.0},
    ours.CogVideoXFunControlPipeline: {"control_video": VIDEOS, "num_frames": None},
    ours.CogVideoXFunInpaintPipeline: {"image": PICTURES, "last_image": PICTURES[0]},
    ours.CogVideoXContinuationPipeline: {"video": VIDEOS, "num_frames": 3, "overlap_frames": 1, "output_type": "pt"},
}
"""What each task is given, for two prompts; num_frames=None leaves the argument out."""


def arguments(pipe: Any, *which: int) -> dict[str, Any]:
    """Arguments of a call for the prompts `which`, each with its own source and generator."""
    own = OWN.get(type(pipe), {})
    chosen = {name: [value[i] for i in which] if isinstance(value, list) else value for name, value in own.items()}
    return {"prompt": [PROMPTS[i] for i in which], "generator": [torch.Generator().manual_seed(i) for i in which]} | chosen


def call(pipe: Any, *which: int, **options: Any) -> torch.Tensor:
    """Latents, or frames where a task has no latents to show, of a call of two steps."""
    options = {"output_type": "latent", "num_inference_steps": 2} | arguments(pipe, *(which or (0,))) | options
    if options.get("num_frames", 9) is not None:
        return call_for_frames(pipe, **options)
    del options["num_frames"]
    pipe.set_progress_bar_config(disable=True)
    return pipe(height=32, width=48, max_sequence_length=7, **options).frames


@pytest.fixture(params=VARIANTS, ids=lambda cls: cls.__name__.removeprefix("CogVideoX").removesuffix("Pipeline") or "Text")
def pipe(loaded, request) -> DiffusionPipeline:
    """A pipeline of each class, over models that are shared."""
    return request.param(**loaded(request.param, VARIANTS[request.param]).components)


@pytest.fixture
def own(folders, pipe) -> DiffusionPipeline:
    """The same over models that no other test sees."""
    return type(pipe).from_pretrained(folders(VARIANTS[type(pipe)]))


def test_every_pipeline_is_here():
    assert set(VARIANTS) == {value for name, value in vars(ours).items() if name.startswith("CogVideoX") and name.endswith("Pipeline")}


# --- saved and moved --------------------------------------------------------------------------------------------------


def test_what_is_saved_loads_here_and_in_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(call(type(pipe).from_pretrained(tmp_path)), call(pipe))
    found = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(found) is getattr(diffusers, type(pipe).__name__)
    if type(found) is not type(pipe):
        assert {type(part).__module__.partition(".")[0] for part in found.components.values()} == {"diffusers", "transformers"}


def test_components_pass_through_another_pipeline_and_back(pipe):
    there = ours.CogVideoXPipeline.from_pipe(pipe)
    assert there.components == pipe.components
    torch.testing.assert_close(call(type(pipe).from_pipe(there)), call(pipe))


def test_half_precision(own, pipe):
    expected = call(pipe)
    own.to(torch.bfloat16)
    found = call(own)
    assert own.transformer.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert found.shape == expected.shape


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_model_offloading_changes_nothing(own, pipe):
    own.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are in place again after a call
        torch.testing.assert_close(call(own), call(pipe))


def test_another_task_over_offloaded_models(folders, loaded):
    """`from_pipe` brings the hooks along, as in diffusers, and the models work as before."""
    offloaded = ours.CogVideoXPipeline.from_pretrained(folders())
    offloaded.enable_model_cpu_offload(device="cpu")
    there = ours.CogVideoXVideoToVideoPipeline.from_pipe(offloaded)
    assert hasattr(there.transformer, "_hf_hook")
    expected = ours.CogVideoXVideoToVideoPipeline(**loaded(ours.CogVideoXPipeline).components)
    torch.testing.assert_close(call(there), call(expected))


def test_layers_may_be_stored_in_fewer_bits(folders, loaded):
    pipe = ours.CogVideoXPipeline.from_pretrained(folders())
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    found, exact = call(pipe), call(ours.CogVideoXPipeline(**loaded(ours.CogVideoXPipeline).components))
    assert 0 < (found - exact).abs().mean() < 0.5 * exact.abs().mean()


def test_offloaded_models_give_way_to_the_next(own, monkeypatch):
    """Pixels are encoded before the text encoder comes; the transformer is gone when the video is decoded."""
    ran = []
    for name, method in (("text_encoder", "forward"), ("transformer", "forward"), ("vae", "encode"), ("vae", "decode_stream")):
        model = getattr(own, name)
        original = getattr(model, method)
        monkeypatch.setattr(model, method, lambda *a, _o=original, _n=f"{name}.{method}", **k: ran.append(_n) or _o(*a, **k))
    call(own, output_type="pt")
    first = list(dict.fromkeys(ran))
    encodes = ["vae.encode"] if "vae.encode" in ran else []
    if not isinstance(own, ours.CogVideoXContinuationPipeline):  # which encodes its text once for all windows, before them
        assert first == [*encodes, "text_encoder.forward", "transformer.forward", "vae.decode_stream"]
    own.enable_model_cpu_offload(device="cpu")
    assert own.vae._hf_hook.prev_module_hook.model is own.transformer
    assert own.transformer._hf_hook.prev_module_hook.model is own.text_encoder


def test_group_offloading_changes_nothing(own, pipe):
    own.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(call(own), call(pipe))


def test_group_offloading_counts_as_being_in_place(folders):
    """The models wait on the CPU, and diffusers' hooks bring them; a pipeline then says that it runs on the accelerator."""
    pipe = ours.CogVideoXPipeline.from_pretrained(folders())
    pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level")  # which needs none before it runs
    assert (pipe._execution_device.type, pipe.text_encoder.device.type) == ("cuda", "cpu")
    for name in ("text_encoder", "transformer", "vae"):
        pipe.check_component(name)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload"])
def test_offloading_from_an_accelerator_changes_nothing(own, method: str):
    own.to("cuda")
    expected = call(own, output_type="pt")
    options = {"onload_device": torch.device("cuda"), "offload_type": "leaf_level"} if method == "enable_group_offload" else {}
    getattr(own.to("cpu"), method)(**options)
    for _ in range(2):
        torch.testing.assert_close(call(own, output_type="pt"), expected, atol=1e-3, rtol=0)


def test_attention_slicing_changes_nothing(own, pipe):
    own.transformer.set_attn_processor(type(next(iter(own.transformer.attn_processors.values())))())
    own.enable_attention_slicing(slice_size=1)
    torch.testing.assert_close(call(own), call(pipe))
    own.disable_attention_slicing()


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", STOCK, ids=lambda cls: cls.__name__)
def test_diffusers_signatures_are_accepted(stock):
    """Whatever is passed to diffusers' class by position or by name arrives here under the same name."""
    for method in ("__init__", "__call__", "encode_prompt", "decode_latents"):
        found, known = (signature(getattr(cls, method)).parameters for cls in (getattr(ours, stock.__name__), stock))
        assert list(found)[: len(known)] == list(known)
        assert {found[name].kind for name in known} == {Parameter.POSITIONAL_OR_KEYWORD}


def test_each_video_of_a_batch_is_what_it_would_be_alone(pipe):
    torch.testing.assert_close(call(pipe, 0, 1), torch.cat([call(pipe, 0), call(pipe, 1)]), atol=1e-4, rtol=0)


def test_callbacks_see_and_replace_what_the_class_names(pipe):
    names = pipe._callback_tensor_inputs
    seen = []

    def look(p, index, timestep, tensors):
        seen.append(set(tensors))
        last = index == p.num_timesteps - 1
        return {"latents": torch.zeros_like(tensors["latents"])} if last else tensors

    zeros = call(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert seen[:2] == [set(names)] * 2
    if not isinstance(pipe, ours.CogVideoXContinuationPipeline):
        assert not zeros.any()


def test_callbacks_may_raise_the_guidance(pipe):
    def more(p, *_):
        p._guidance_scale += 1
        return {}

    call(pipe, callback_on_step_end=more, guidance_scale=2.0)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps


def test_a_tuple_holds_what_an_output_holds(pipe):
    options = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 7, "num_frames": 9, "output_type": "latent"}
    options = {name: value for name, value in (options | arguments(pipe, 0)).items() if value is not None}
    (found,) = pipe(**options, return_dict=False)
    torch.testing.assert_close(found, call(pipe))


def test_the_progress_bar_can_be_named_and_hidden(pipe, capsys):
    call(pipe)  # which hides it
    assert not capsys.readouterr().err
    pipe.set_progress_bar_config(disable=False, desc="steps")
    with pipe.progress_bar(total=2) as bar:
        assert bar.desc.startswith("steps")
    assert "steps" in capsys.readouterr().err


def test_text_is_encoded_without_the_other_models_and_they_work_without_it(pipe):
    """One process encodes, another one makes the video: as diffusers' test of `encode_prompt` in isolation."""
    texts = {"tokenizer": pipe.tokenizer, "text_encoder": pipe.text_encoder}
    nothing = dict.fromkeys(pipe.components)
    positive, negative = type(pipe)(**nothing | texts).encode_prompt(PROMPTS[0], "blue", max_sequence_length=7)
    rest = type(pipe)(**pipe.components | dict.fromkeys(texts))
    found = call(rest, prompt=None, prompt_embeds=positive, negative_prompt_embeds=negative)
    torch.testing.assert_close(found, call(pipe, negative_prompt="blue"), atol=1e-4, rtol=0)


def test_arguments_that_all_tasks_share_are_in_every_signature(pipe):
    shared = {
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "generator",
        "output_type",
        "return_dict",
    }
    assert shared <= set(signature(pipe.__call__).parameters)
