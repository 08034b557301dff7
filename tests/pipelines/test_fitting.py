"""Pipelines that fit themselves into memory: the same videos, plans that are kept, reports, and errors before anything runs."""

import json

import pytest
import torch

from diffusers_cogvideox import CogVideoXImageToVideoPipeline, CogVideoXPipeline, ContextWindows
from diffusers_cogvideox.runtime.memory.costs import Costs, TransformerMode
from diffusers_cogvideox.runtime.memory.facts import ModelFacts
from diffusers_cogvideox.runtime.memory.staged import Staged
from diffusers_cogvideox.runtime.memory.workload import MACHINES, Workload
from diffusers_cogvideox.runtime.quantisation import QUANTISATIONS, quantisation_of, quantise
from diffusers_cogvideox.runtime.streaming import is_streamed
from live_storages import LiveStorages
from tiny_pipeline import call

SIZES = {"height": 32, "width": 48, "num_frames": 9}


@pytest.fixture
def folder(folders):
    return folders()


@pytest.fixture
def fresh(folder):
    """A pipeline of its own, whose models may be changed."""
    return CogVideoXPipeline.from_pretrained(folder)


@pytest.fixture
def from_disk(monkeypatch):
    """No other place for what has blocks: a tiny model would always fit."""
    monkeypatch.setattr(Costs, "possible", lambda _, part: ["resident"] if part == "vae" else ["disk"])


def test_what_fits_changes_nothing(fresh, pipe):
    plan = fresh.fit(**SIZES)
    assert set(plan.placements.values()) == {"resident"}
    assert torch.equal(call(fresh), call(pipe))


def test_from_disk_gives_the_same_video(folder, pipe, from_disk):
    fitted = CogVideoXPipeline.from_pretrained(folder, memory={"ram": "1GB", **SIZES})
    assert is_streamed(fitted.transformer) and is_streamed(fitted.text_encoder)
    assert {"transformer streamed", "text_encoder streamed"} <= set(fitted.report().active)
    torch.testing.assert_close(call(fitted), call(pipe), rtol=0, atol=1e-5)


def test_parts_move_when_a_second_fit_says_so(fresh, pipe, monkeypatch):
    expected = call(pipe, output_type="latent")
    for place in ("disk", "resident", "disk"):
        monkeypatch.setattr(Costs, "possible", lambda _, part, place=place: ["resident"] if part == "vae" else [place])
        fresh.fit(ram="1GB", **SIZES)
        assert is_streamed(fresh.transformer) == is_streamed(fresh.text_encoder) == (place == "disk")
        torch.testing.assert_close(call(fresh, output_type="latent"), expected, rtol=0, atol=1e-5)


def test_measures_are_carried_out_and_undone(fresh, pipe, monkeypatch):
    one_way = [TransformerMode(None, True, 16, False)]
    looped = Costs._looped
    monkeypatch.setattr(
        Costs, "_denoising", lambda self, place, _: (looped(self, mode, self.transformer_pass(mode), place) for mode in one_way)
    )
    fresh.fit(**SIZES)
    block = fresh.transformer.transformer_blocks[1]
    assert (block.one_by_one, block.ff_tokens) == (True, 16)
    torch.testing.assert_close(call(fresh, output_type="latent"), call(pipe, output_type="latent"), rtol=0, atol=5e-5)
    monkeypatch.undo()
    fresh.fit(**SIZES)
    assert (block.one_by_one, block.ff_tokens) == (False, None)


def test_a_larger_call_is_planned_for_or_refused_before_it_runs(fresh, monkeypatch):
    fresh.fit(ram="64GB", **SIZES)
    call(fresh, num_frames=17, num_inference_steps=1, output_type="latent")
    assert fresh.memory_plan.work.num_frames == 17
    small = fresh.fit(ram="64GB", **SIZES).host_peak
    fresh.fit(ram=small, **SIZES)
    monkeypatch.setattr(fresh, "encode_prompt", lambda *_, **__: pytest.fail("it ran"))
    before = fresh.memory_plan
    with pytest.raises(ValueError, match=r"does not fit into .* of RAM\. The smallest budget that works is"):
        call(fresh, num_frames=65, height=320, width=480)
    assert fresh.memory_plan is before


def test_nothing_is_loaded_for_a_budget_that_is_too_small(folder, monkeypatch):
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match="smallest budget that works"):
        CogVideoXPipeline.from_pretrained(folder, memory="1MB")
    with pytest.raises(ValueError, match="Did you mean 8GB"):
        CogVideoXPipeline.from_pretrained(folder, memory="8")


def test_auto_takes_what_there_is(folder):
    plan = CogVideoXPipeline.from_pretrained(folder, memory="auto").memory_plan
    assert set(plan.placements.values()) == {"resident"}
    assert plan.ram is not None


@pytest.fixture
def quantises(monkeypatch):
    """What is allowed is the only way: a tiny model would always fit without."""
    monkeypatch.setattr(Costs, "quantisations", property(lambda self: (self.facts.quantised or self.quantisation,)))


@pytest.mark.parametrize("loading", [True, False])
def test_a_plan_may_quantise_the_transformer(folder, pipe, quantises, loading):
    memory = {"ram": "8GB", "device": "cpu", "quantisation": "fp8-cast", **SIZES}
    fitted = CogVideoXPipeline.from_pretrained(folder, **({"memory": memory} if loading else {}))
    plan = fitted.memory_plan if loading else fitted.fit(**memory)
    assert plan.transformer.quantisation == quantisation_of(fitted.transformer) == "fp8-cast"
    assert fitted.transformer.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn
    assert "fp8-cast: weights stored as float8" in plan.table() and "quantised to fp8-cast" in fitted.report().active
    video = call(fitted)
    assert 1e-4 < (video - call(pipe)).abs().mean() < 0.05
    fitted.fit(**SIZES)  # it cannot be undone, and the next plan counts with it
    assert fitted.memory_plan.transformer.quantisation == "fp8-cast"
    assert torch.equal(call(fitted), video)
    call(fitted, num_frames=17)
    assert fitted.memory_plan.transformer.quantisation == "fp8-cast"


def test_a_fitted_window_covers_a_long_video_in_such_windows(fresh, folder):
    sizes = {"ram": "8GB", "device": "cpu", **SIZES, "num_frames": 25, "window": 17}
    plan = fresh.fit(**sizes)
    assert (plan.work.num_frames, plan.work.seen_frames) == (25, 17)
    call(fresh, num_frames=25, context=ContextWindows(frames=17))
    assert fresh.memory_plan is plan
    loaded = CogVideoXPipeline.from_pretrained(folder, memory=sizes)
    assert loaded.memory_plan.work == plan.work
    call(fresh, num_frames=25)
    assert fresh.memory_plan.work.seen_frames == 0
    with pytest.raises(ValueError, match="Context windows of frames=16 are not possible"):
        fresh.fit(window=16)


def test_a_transformer_that_is_passed_is_not_quantised_while_loading(folder, pipe, quantises, monkeypatch):
    """Not left out without a word."""
    monkeypatch.setattr(type(QUANTISATIONS["fp8-cast"]), "while_loading", True)
    memory = {"ram": "8GB", "device": "cpu", "quantisation": "fp8-cast", **SIZES}
    with pytest.raises(ValueError, match=r"fp8-cast quantises a transformer while it is loaded, and transformer=\.\.\. was passed"):
        CogVideoXPipeline.from_pretrained(folder, memory=memory, transformer=pipe.transformer)


def test_a_variant_is_quantised_while_it_is_loaded(pipe, quantises, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    memory = {"ram": "8GB", "device": "cpu", "quantisation": "fp8-cast", **SIZES}
    fitted = CogVideoXPipeline.from_pretrained(tmp_path, variant="fp16", memory=memory)
    assert quantisation_of(fitted.transformer) == "fp8-cast"


def test_a_larger_call_may_need_a_quantised_transformer(fresh, folder, from_disk, monkeypatch):
    """Read from disk at first: its weights come back into memory to be quantised."""
    monkeypatch.setattr(Costs, "quantisations", property(lambda _: (None,)))
    fresh.fit(ram="8GB", device="cpu", quantisation="fp8-cast", **SIZES)
    assert is_streamed(fresh.transformer) and fresh.memory_plan.transformer.quantisation is None
    monkeypatch.setattr(Costs, "possible", lambda *_: ["resident"])
    monkeypatch.setattr(Costs, "quantisations", property(lambda _: ("fp8-cast",)))
    video = call(fresh, num_frames=17)
    assert not is_streamed(fresh.transformer)
    twin = CogVideoXPipeline.from_pretrained(folder)
    quantise(twin.transformer, "fp8-cast", "cpu")
    torch.testing.assert_close(video, call(twin, num_frames=17), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [("int3", "'int3' is unknown"), ("nf4", "'nf4' does not run on cpu"), ("int4", "'int4' is not offered")],
)
def test_quantisations_that_are_not_possible_are_refused_before_loading(folder, fresh, monkeypatch, name, message):
    with pytest.raises(ValueError, match=message):
        fresh.fit(device="cpu", quantisation=name)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=message):
        CogVideoXPipeline.from_pretrained(folder, memory={"device": "cpu", "quantisation": name})


def test_a_transformer_of_another_quantisation_is_refused(fresh):
    layer = fresh.transformer.transformer_blocks[0].ff.net[2]
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(type("GGUFParameter", (torch.Tensor,), {})))
    with pytest.raises(ValueError, match=r"not in QUANTISATIONS \(GGUFParameter\)"):
        fresh.fit(**SIZES)


def test_device_memory_means_nothing_on_a_processor(fresh):
    with pytest.raises(ValueError, match="no meaning on a CPU"):
        fresh.fit(vram="8GB", device="cpu")


def test_offloaded_models_are_refused(fresh):
    fresh.vae.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=r"vae is offloaded already.*remove_all_hooks"):
        fresh.fit()


def test_a_report_holds_predicted_against_measured(fresh):
    call(fresh)
    assert fresh.report().plan is None
    fresh.fit(**SIZES)
    call(fresh)
    report = fresh.report()
    told = json.loads(json.dumps(report.to_json()))
    assert list(told["stages"]) == ["encode", "text", "denoise", "decode"]
    for name in ("text", "denoise", "decode"):
        stage = told["stages"][name]
        assert stage["seconds"] > 0 and stage["host"] > 10**7 and stage["predicted_host"] > 10**7
    assert told["plan"]["work"]["num_frames"] == 9
    assert "predicted" in str(report)


def test_a_report_names_what_is_on(fresh):
    fresh.transformer.split_batch()
    fresh.vae.enable_tiling()
    call(fresh)
    assert {"samples one by one in each block", "VAE in its low-memory mode"} <= set(fresh.report().active)


def test_frames_that_are_streamed_are_measured_as_they_come(fresh):
    (stream,) = call(fresh, output_type="stream")
    assert "decode" not in fresh.report().stages
    list(stream)
    assert fresh.report().stages["decode"].seconds > 0


def test_staged_weights_come_when_they_are_called_and_leave_unchanged(monkeypatch):
    """The device is played by copies that are one larger."""
    monkeypatch.setattr("diffusers_cogvideox.runtime.memory.staged._brought", lambda value, _: value + 1)
    layer = torch.nn.Linear(3, 4, bias=False)
    weight, value = layer.weight, layer.weight.data
    x, made_room = torch.ones(2, 3), []
    at_home = layer(x)
    staged = Staged(layer, torch.device("cpu"), before=lambda: made_room.append(True))
    for _ in range(2):  # the second call finds them there
        torch.testing.assert_close(layer(x), at_home + 3)
    assert layer.weight is weight and made_room == [True]
    staged.offload()
    assert layer.weight.data_ptr() == value.data_ptr()
    staged.remove()
    torch.testing.assert_close(layer(x), at_home)
    assert not hasattr(layer, "_hf_hook")


def live_peaks(pipe, monkeypatch, **options):
    """Bytes that the operations of each stage keep alive at most, in one call."""
    peaks = {}
    weights = [tensor for model in (pipe.transformer, pipe.vae, pipe.text_encoder) for tensor in (*model.parameters(), *model.buffers())]
    inner = CogVideoXPipeline._stage

    def stage(self, name):
        class Measured:
            def __enter__(self):
                self.block, self.live = inner(pipe, name), LiveStorages()
                self.block.__enter__()
                self.live.ignore(weights)
                self.live.__enter__()

            def __exit__(self, *error):
                self.live.__exit__(*error)
                peaks[name] = max(peaks.get(name, 0), self.live.peak)
                return self.block.__exit__(*error)

        return Measured()

    monkeypatch.setattr(CogVideoXPipeline, "_stage", stage)
    call(pipe, **options)
    return peaks


@pytest.mark.parametrize("mode", ["plain", "split", "chunked", "lean"])
@pytest.mark.parametrize("size", [(9, 64, 96), (17, 96, 96)])
def test_stages_take_what_is_predicted(fresh, monkeypatch, mode, size):
    """Live storages of whole stages on the processor: the loop with its sampler, tables and guidance; the decoder with its pictures."""
    frames, height, width = size
    work = Workload(height=height, width=width, num_frames=frames, steps=3, text_tokens=7)
    costs = Costs(facts=ModelFacts.of_pipeline(fresh), work=work, dtype="float32", device="cpu", machine=MACHINES["cpu"])
    split, tokens = mode == "split", 64 if mode == "chunked" else None
    fresh.transformer.split_batch(split)
    fresh.transformer.chunk_feed_forward(tokens)
    decodings = costs.options("decode", "resident")
    decoding = decodings[2 if mode == "lean" else 0]
    fresh.vae.saving = decoding.mode.saving
    only = {"plain": {}, "lean": {"num_inference_steps": 1}}.get(mode, {"output_type": "latent"})  # the other stage is that of "plain"
    found = live_peaks(fresh, monkeypatch, num_frames=frames, height=height, width=width, **only)
    monkeypatch.setattr("diffusers_cogvideox.runtime.memory.costs._FF_TOKENS", (None, 64))
    loops = {(o.mode.split_batch, o.mode.ff_tokens): o.device for o in costs.options("denoise", "resident")}
    beside = costs.workspace()
    if mode != "lean":
        assert loops[split, tokens] - costs.weights("transformer") - beside == pytest.approx(found["denoise"], rel=0.1)
    if mode in ("plain", "lean"):
        assert decoding.device - costs.weights("vae") - beside == pytest.approx(found["decode"], rel=0.1)
    (reading,) = costs.options("text", "resident")
    assert reading.device - costs.weights("text_encoder") - beside == pytest.approx(found["text"], rel=0.1)


def test_a_picture_is_part_of_the_plan_of_image_to_video(folders):
    fitted = CogVideoXImageToVideoPipeline.from_pretrained(folders("5b-i2v"), memory="auto")
    assert [stage.name for stage in fitted.memory_plan.stages] == ["load", "encode", "text", "denoise", "decode"]
