"""Whole models: release folders, training checkpoints, pipeline folders; what tensors do not tell; and who loads the result."""

import json

import pytest
import torch
from transformers import T5EncoderModel

import diffusers_cogvideox as ours
from diffusers_cogvideox import PRESETS
from diffusers_cogvideox.conversion.convert import convert
from diffusers_cogvideox.conversion.options import ConvertOptions
from parity import StockImageToVideoPipeline, StockPipeline, StockTransformer, StockVAE
from sat_cases import converted, sat_transformer, sat_vae, tiny_transformer, tiny_vae, write_release, write_sat
from tiny_pipeline import call

CLASSES = {"CogVideoXPipeline": StockPipeline, "CogVideoXImageToVideoPipeline": StockImageToVideoPipeline}


def same(found, made):
    """Whether two models have the same weights, to the bit."""
    states = found.state_dict(), made.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def with_text_encoder(release, folder):
    """A release folder with the text encoder of a pipeline folder, in one folder as the original code has it."""
    t5 = release / "t5-v1_1-xxl"
    t5.mkdir()
    for name in ("text_encoder", "tokenizer"):
        for file in (folder / name).iterdir():
            (t5 / file.name).write_bytes(file.read_bytes())
    return release


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_a_release_folder_becomes_the_pipeline_of_its_variant(tmp_path, folders, variant):
    release, preset = with_text_encoder(write_release(tmp_path / "release", variant), folders("5b")), PRESETS[variant]
    folder = converted(release, tmp_path / "pipeline")
    for cls in (CLASSES[preset.pipeline], getattr(ours, preset.pipeline)):
        pipe = cls.from_pretrained(folder)
        assert type(pipe.transformer).__name__ == "CogVideoXTransformer3DModel"
        assert same(pipe.transformer, tiny_transformer(variant))
        vae, scheduler = pipe.vae.config, pipe.scheduler.config
        assert (vae.scaling_factor, vae.invert_scale_latents) == (preset.vae["scaling_factor"], preset.vae["invert_scale_latents"])
        assert scheduler.snr_shift_scale == preset.scheduler["snr_shift_scale"]
        assert {key: scheduler[key] for key in preset.scheduler} == preset.scheduler
        assert type(pipe.scheduler).__name__ == "CogVideoXDDIMScheduler"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == preset.pipeline
    assert index["transformer"] == ["diffusers", "CogVideoXTransformer3DModel"]


def test_a_pipeline_goes_to_sat_and_back_and_makes_the_same_video(tmp_path, folders):
    """Also the text encoder and the tokenizer; what the original code's layout has no place for comes back from the configs beside it."""
    text = converted(folders("2b"), tmp_path / "sat")
    assert sorted(path.name for path in text.iterdir()) == ["diffusers_configs.json", "t5-v1_1-xxl", "transformer", "vae"]
    folder = converted(tmp_path / "sat", tmp_path / "pipeline")
    videos = [call(StockPipeline.from_pretrained(place)) for place in (folders("2b"), folder)]
    torch.testing.assert_close(*videos, rtol=0, atol=0)
    assert same(*(T5EncoderModel.from_pretrained(place / "text_encoder") for place in (folders("2b"), folder)))


def test_the_text_encoder_may_come_from_elsewhere(tmp_path, folders):
    release = write_release(tmp_path / "release", "5b")
    with pytest.raises(ValueError, match=r"no text encoder, which a pipeline needs: pass --text-encoder"):
        converted(release, tmp_path / "pipeline")
    folder = converted(release, tmp_path / "pipeline", text_encoder=str(folders("5b")), dtype="float16", max_shard_size="30KB")
    pipe = StockPipeline.from_pretrained(folder, dtype=torch.float16)
    assert {model.dtype for model in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {torch.float16}
    with pytest.raises(FileNotFoundError, match=r"no folder 'nowhere', and repositories are named"):
        converted(release, tmp_path / "other", text_encoder="nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no T5 text encoder"):
        converted(release, tmp_path / "other", text_encoder=str(release))


def test_the_scale_of_a_vae(tmp_path):
    """Told by the transformer beside it, by an option, or assumed and said."""
    release = write_release(tmp_path / "release", "2b")
    for number, source in enumerate((release / "vae" / "3d-vae.pt", release / "vae")):
        folder = converted(source, tmp_path / f"vae{number}")
        assert StockVAE.from_pretrained(folder).config.scaling_factor == 1.15258426
    alone = tmp_path / "elsewhere" / "deep" / "vae.pt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes((release / "vae" / "3d-vae.pt").read_bytes())
    text = convert(ConvertOptions(str(alone), str(tmp_path / "assumed")))
    assert "assumed: scaling_factor 0.7" in text
    assert "--like 2b" in text
    folder = converted(release, tmp_path / "only", only="vae")
    assert StockVAE.from_pretrained(folder).config.scaling_factor == 1.15258426
    text = convert(ConvertOptions(str(alone), str(tmp_path / "named"), like="1.5-5b-i2v"))
    assert "assumed" not in text
    assert StockVAE.from_pretrained(tmp_path / "named").config.invert_scale_latents is True


def test_a_training_checkpoint_that_holds_everything(tmp_path, folders):
    model, vae = tiny_transformer("1.5-5b-i2v"), tiny_vae()
    text = {f"conditioner.embedders.0.transformer.{name}": torch.ones(2) for name in ("shared.weight", "encoder.block.0.x.weight")}
    everything = sat_transformer(model) | {f"first_stage_model.{name}": tensor for name, tensor in sat_vae(vae).items()} | text
    run = write_sat(tmp_path / "run", everything)
    report = convert(ConvertOptions(str(run), str(tmp_path / "pipeline"), text_encoder=str(folders("5b")), verify=True))
    assert "left out: 2 tensors of the text encoder" in report
    assert "left out: a part of the training loss (2)" in report
    pipe = StockImageToVideoPipeline.from_pretrained(tmp_path / "pipeline")
    assert same(pipe.transformer, model)
    assert same(pipe.vae, vae)
    StockVAE.from_pretrained(converted(run, tmp_path / "vae", only="vae"))
    StockTransformer.from_pretrained(converted(run / "1000", tmp_path / "transformer", only="transformer"))
    with pytest.raises(ValueError, match=r"--only lora: .*run holds only transformer, vae, text_encoder"):
        converted(run, tmp_path / "lora", only="lora")


@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model.", "_orig_mod.", "transformer."])
def test_single_files_of_diffusers(tmp_path, prefix):
    """Under the prefixes that frameworks put before the names."""
    model = tiny_transformer("1.5-5b-i2v")
    torch.save({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}, tmp_path / "model.pt")
    folder = converted(tmp_path / "model.pt", tmp_path / "model")
    assert same(StockTransformer.from_pretrained(folder), model)


def test_what_may_be_two_models_is_asked(tmp_path, folders):
    """Control and image-to-video models read equally many channels."""
    release = write_release(tmp_path / "release", "fun-control")
    torch.save(tiny_transformer("fun-control").state_dict(), tmp_path / "release" / "transformer" / "model.pt")
    (release / "transformer" / "latest").unlink()
    options = {"text_encoder": str(folders("5b"))}
    with pytest.raises(ValueError, match=r"rotary \(as in 5B\) or sin-cos"):
        converted(release, tmp_path / "pipeline", **options)
    folder = converted(release, tmp_path / "pipeline", like="fun-5b-control", **options)
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "CogVideoXFunControlPipeline"


def test_the_shipped_model_and_its_way_back(tmp_path):
    from diffusers_cogvideox.demo import demo_model

    report = convert(ConvertOptions(str(demo_model()), str(tmp_path / "sat")))
    assert "written for the original code (SAT)" in report
    pipe = ours.CogVideoXPipeline.from_pretrained(converted(tmp_path / "sat", tmp_path / "pipeline"), dtype=torch.float16)
    theirs = ours.CogVideoXPipeline.from_pretrained(demo_model(), dtype=torch.float16)
    for name in ("transformer", "vae", "text_encoder"):
        assert same(getattr(pipe, name), getattr(theirs, name))
    with pytest.raises(ValueError, match="is a checkpoint of the original code already"):
        converted(tmp_path / "sat", tmp_path / "again", to="sat")


def test_configs_of_early_uploads(tmp_path):
    """The first CogVideoX-2B had two keys in its VAE's config that no version of the model reads."""
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"sample_size": 256, "mid_block_add_attention": True}))
    again = converted(converted(tmp_path / "vae", tmp_path / "sat"), tmp_path / "again")
    assert same(StockVAE.from_pretrained(again), vae)
