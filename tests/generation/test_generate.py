"""The verbs `generate` and `info` on tiny folders: files, replay, defaults, facts, and every mistake before a weight is loaded."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusers_cogvideox.generation.generate as generating
import diffusers_cogvideox.generation.model_folder as model_folder
import diffusers_cogvideox.generation.writing as writing
from diffusers_cogvideox import CogVideoXDPMScheduler, CogVideoXPipeline, cli
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.generation.generate import generate
from diffusers_cogvideox.generation.info import describe
from diffusers_cogvideox.generation.model_folder import ModelFolder
from diffusers_cogvideox.generation.plan import plan
from diffusers_cogvideox.generation.settings import Settings, choose_settings, load_pipeline, make_videos
from diffusers_cogvideox.options import GenerateOptions
from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.video_io import probe_video, read_video

PROMPT = "a red circle moves right"


@pytest.fixture
def folder(folders) -> Path:
    return folders()


@pytest.fixture
def own_folder(folder, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def no_loading(monkeypatch):
    """Fails the test when weights are loaded."""
    monkeypatch.setattr(generating, "load_pipeline", lambda *_: pytest.fail("the weights were loaded"))


def options(folder: Path, output: Path, prompt: str = PROMPT, /, **changes) -> GenerateOptions:
    return GenerateOptions(prompt, **{"model": str(folder), "output": str(output), "steps": 2, "device": "cpu", **changes})


def settings_of(asked: GenerateOptions) -> Settings:
    """The settings of the only video that is asked for."""
    (job,) = plan(asked)
    return job.settings


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is made -------------------------------------------------------------------------------------------------------


def test_video_sheet_and_recipe(folder, tmp_path):
    (path,) = generate(options(folder, tmp_path / "out", seed=3, fps=6, size="36x50", frames=7))
    assert path == tmp_path / "out" / "a-red-circle-moves-right-3.mp4"
    assert names(path.parent) == [path.with_suffix(suffix).name for suffix in (".json", ".mp4", ".png")]
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width, info.fps) == (7, 36, 50, 6)
    with Image.open(path.with_suffix(".png")) as sheet:
        assert sheet.width > 7 * 50
    recipe = json.loads(path.with_suffix(".json").read_text())
    assert (recipe["prompt"], recipe["seed"]) == (PROMPT, 3)
    assert recipe["settings"]["model"] == str(folder.resolve())
    assert recipe["settings"]["num_inference_steps"] == 2
    assert recipe["scheduler"]["class"] == "CogVideoXDDIMScheduler"
    assert recipe["versions"]["torch"] == torch.__version__
    assert set(recipe["seconds"]) == {"load", "denoise", "decode", "write"}


def test_frames_are_those_of_the_pipeline(folder):
    """Independent of the verb: the pipeline called by hand, with the sampler class by its name."""
    settings = choose_settings(options(folder, Path(), sampler="dpm", guidance_scale=3.0), str(folder), negative_prompt="blue")
    ours = make_videos(load_pipeline(settings), [PROMPT], [5], settings)
    pipe = CogVideoXPipeline.from_pretrained(folder)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(5)
    by_hand = pipe(PROMPT, "blue", num_inference_steps=2, guidance_scale=3.0, generator=generator, output_type="np").frames
    np.testing.assert_array_equal(ours, np.rint(by_hand * 255))


def test_replay_gives_the_same_file(folder, tmp_path):
    (first,) = generate(options(folder, tmp_path / "one", seed=4, sampler="dpm", negative_prompt="blue", num_videos=1))
    (again,) = generate(GenerateOptions(str(first.with_suffix(".json")), output=str(tmp_path / "two")))
    assert first.name == again.name
    assert first.read_bytes() == again.read_bytes()


def test_videos_of_one_prompt_have_consecutive_seeds(folder, tmp_path):
    both = generate(options(folder, tmp_path / "both", seed=1, num_videos=2))
    assert [path.name for path in both] == ["a-red-circle-moves-right-1.mp4", "a-red-circle-moves-right-2.mp4"]
    (second,) = generate(options(folder, tmp_path / "second.mp4", seed=2))
    assert read_video(both[1])[0].tobytes() == read_video(second)[0].tobytes() != read_video(both[0])[0].tobytes()


def test_a_prompt_file_gives_one_video_per_line(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square!  \na red circle\n")
    jobs = plan(options(folder, tmp_path / "out", str(tmp_path / "prompts.txt"), num_videos=2))
    assert [job.prompt for job in jobs] == ["a red circle"] * 2 + ["a blue square!"] * 2 + ["a red circle"] * 2
    assert [job.output.name for job in jobs][1:4] == ["001-a-red-circle-1.mp4", "002-a-blue-square-0.mp4", "002-a-blue-square-1.mp4"]
    assert len({job.output for job in jobs}) == 6


def test_an_existing_video_is_replaced_only_on_demand(folder, tmp_path):
    target = tmp_path / "a.mp4"
    target.with_suffix(".png").write_text("somebody's picture")
    with pytest.raises(FileExistsError, match=r"a\.png exists already: .* --overwrite"):
        generate(options(folder, target))
    generate(options(folder, target, overwrite=True))
    assert probe_video(target).num_frames == 9


@pytest.mark.parametrize(
    ("module", "moment", "name"),
    [
        (generating, "stream_videos", "SIGINT"),
        (writing, "write_video", "SIGTERM"),
        (writing, "contact_sheet", "SIGTERM"),
        (writing, "write_image", "SIGINT"),
    ],
)
def test_an_interrupted_run_leaves_nothing_but_latents(module, moment, name, folder, tmp_path, monkeypatch):
    """Ctrl-C sends SIGINT, batch systems SIGTERM; here it arrives when that function has done its work."""
    whole = getattr(module, moment)

    def interrupted(*args, **kwargs):
        result = whole(*args, **kwargs)
        signal.raise_signal(getattr(signal, name))
        return result

    monkeypatch.setattr(module, moment, interrupted)
    arguments = ["generate", PROMPT, "--model", str(folder), "--steps", "1", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(arguments) == 130
    assert names(tmp_path / "out") == ["a-red-circle-moves-right-0.latents.safetensors"] * (module is writing)


# --- what the checkpoint decides ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_released_models_are_sampled_as_recommended(name):
    preset = PRESETS[name]
    found = ModelFolder(Path(), {"transformer": preset.transformer, "vae": preset.vae, "scheduler": preset.scheduler}).recommended
    for field in ("height", "width", "num_frames", "fps", "sampler", "num_inference_steps", "guidance_scale", "dtype", "use_dynamic_cfg"):
        assert getattr(found, field) == getattr(preset, field)


def test_a_folder_says_how_it_wants_to_be_sampled(own_folder, tmp_path):
    own = {"sampler": "dpm", "num_inference_steps": 7, "guidance_scale": 3.5, "fps": 5, "height": 32, "width": 48, "num_frames": 17}
    (own_folder / "cogvideox.json").write_text(json.dumps(own))
    settings = settings_of(GenerateOptions(PROMPT, model=str(own_folder), output=str(tmp_path), device="cpu"))
    assert {name: getattr(settings, name) for name in own} == own
    settings = settings_of(options(own_folder, tmp_path, sampler="ddim", size="64x64", frames=9))
    assert (settings.sampler, settings.height, settings.num_frames, settings.fps, settings.num_inference_steps) == ("ddim", 64, 9, 5, 2)


def test_a_folder_that_says_nothing(folder, tmp_path):
    settings = settings_of(GenerateOptions(PROMPT, model=str(folder), output=str(tmp_path), device="cpu"))
    assert (settings.height, settings.width, settings.num_frames, settings.max_sequence_length) == (64, 96, 9, 7)
    assert (settings.sampler, settings.dtype) == ("ddim", "float32")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"steps": 7}', r"unknown keys \['steps'\]: known are"),
        ('{"sampler": "euler"}', "--sampler euler is unknown: it must be one of ddim, dpm"),
        ('{"dtype": "half"}', "--dtype half is unknown: it must be one of float32, bfloat16, float16"),
        ('{"height": "64"}', r"cogvideox\.json: height '64' is not possible: expected a whole number"),
        ('{"use_dynamic_cfg": 1}', "use_dynamic_cfg 1 is not possible: expected true or false"),
    ],
)
def test_unknown_recommendations_are_errors(content, message, own_folder, tmp_path):
    (own_folder / "cogvideox.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        plan(options(own_folder, tmp_path))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("num_inference_steps", "many", r"edited\.json is not .*: num_inference_steps 'many' is not possible: expected a whole number"),
        ("fps", None, "fps None is not possible: expected a number"),
        ("fps", 0, "fps=0 is not possible"),
        ("pipeline", "Mine", r"edited\.json names the pipeline Mine, but its model and sources are for CogVideoXPipeline"),
        ("pipeline", "CogVideoXVideoToVideoPipeline", "its model and sources are for CogVideoXPipeline"),
    ],
)
def test_an_edited_recipe_is_an_error(setting, value, message, folder, tmp_path):
    (job,) = plan(options(folder, tmp_path))
    recipe = job.recipe()
    recipe["settings"][setting] = value
    (tmp_path / "edited.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=message):
        plan(GenerateOptions(str(tmp_path / "edited.json"), output=str(tmp_path / "again"), device="cpu"))


def test_float16_models_run_in_bfloat16_on_a_cpu(own_folder, tmp_path):
    (own_folder / "cogvideox.json").write_text('{"dtype": "float16"}')
    assert settings_of(options(own_folder, tmp_path)).dtype == "bfloat16"


def test_the_fingerprint_notices_other_weights_and_configs(own_folder):
    seen = {ModelFolder.open(own_folder).fingerprint()}
    file = own_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: tensor + (name == "proj_out.bias") for name, tensor in weights.items()}, file)
    seen.add(ModelFolder.open(own_folder).fingerprint())
    config = own_folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.7', '"scaling_factor": 0.8'))
    seen.add(ModelFolder.open(own_folder).fingerprint())
    assert len(seen) == 3


def test_a_repository_is_known_by_its_commit(folder, monkeypatch, tmp_path):
    snapshot = Path(shutil.copytree(folder, tmp_path / "0123abcd", ignore=shutil.ignore_patterns("*.safetensors")))
    monkeypatch.setattr(model_folder, "snapshot_download", lambda name, **_: str(snapshot) if name == "owner/name" else None)
    settings = choose_settings(options(folder, tmp_path), "owner/name")
    assert (settings.model, settings.fingerprint, settings.num_frames) == ("owner/name", "0123abcd", 9)


def test_a_repository_without_a_pipeline(monkeypatch, tmp_path):
    monkeypatch.setattr(model_folder, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"the repository owner/lora holds no model_index\.json"):
        describe("owner/lora")


# --- mistakes, before anything is loaded --------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "nowhere/prompts.txt"}, "there is no file nowhere/prompts.txt"),
        ({"prompt": "nowhere/video.json"}, "there is no file nowhere/video.json"),
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "{tmp}/notes.md"}, r"notes\.md is a file, but files of prompts end in \.txt or \.jsonl"),
        ({"fps": 2000}, "fps=2000 is not possible: choose 0.01 to 1000"),
        ({"output": "{tmp}/a.avi"}, r"--output .*a\.avi is not possible: name a folder, or a file that ends in \.mp4"),
        ({"output": "{tmp}/a.GIF"}, r"a\.GIF is not possible"),
        ({"size": "8x100"}, "8x100 .* each must be between 16 and .* Nearest legal size: 16x100"),
        ({"size": "65x100"}, "--size 65x100 is not possible: a video file .* needs even sizes"),
        ({"frames": 10**6}, "num_frames=1000000 is not possible"),
        ({"steps": 1001}, "--steps 1001 is not possible: it must be between 1 and 1000"),
        ({"model": "nowhere"}, "there is no folder 'nowhere'"),
        ({"model": "/nowhere/at/all"}, "there is no folder"),
        ({"model": "owner/name"}, "no such repository on the hub"),
        ({"dtype": "float16"}, "--dtype float16 does not work on a CPU"),
        ({"device": "tpu"}, "--device tpu is not available: this machine has cpu"),
        ({"device": "cuda:99"}, "--device cuda:99 is not available"),
        ({"output": "/proc/nothing"}, "cannot write /proc/nothing/a-red-circle.*mp4: .* Choose a file in a folder that you may write to"),
        ({"output": "{tmp}/occupied"}, "occupied is a file, not a folder"),
        ({"output": "{tmp}/a.mp4", "num_videos": 2}, "names one file for 2 videos: name a folder"),
    ],
)
def test_impossible_options(changes, message, folder, tmp_path):
    (tmp_path / "occupied").write_text("a file where a folder should be")
    (tmp_path / "notes.md").touch()
    changes = {name: value.format(tmp=tmp_path) if name in ("prompt", "output") else value for name, value in changes.items()}
    prompt = changes.pop("prompt", PROMPT)
    with pytest.raises((ValueError, OSError), match=message):
        generate(options(folder, tmp_path, prompt, **changes))


def test_a_prompt_may_look_like_a_file_or_be_long(folder, tmp_path):
    assert len(plan(options(folder, tmp_path, "version 1.5 of a red circle"))) == len(plan(options(folder, tmp_path, "a." * 9999))) == 1


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "is empty: write one prompt per line"), (b"\xff\xfe\x00", "is not UTF-8 text")]
)
def test_unusable_prompt_files(content, message, folder, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        generate(options(folder, tmp_path, str(tmp_path / "prompts.txt")))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", Path.unlink, "holds a config.json but no weight file"),
        ("transformer/diffusion_pytorch_model.safetensors", cut, "is corrupt or was not copied completely"),
        ("vae/config.json", lambda file: file.write_text("{"), "is not valid JSON"),
        ("vae/config.json", lambda file: file.write_text("[]"), "not a JSON object"),
        ("text_encoder", shutil.rmtree, "text_encoder is missing"),
        ("model_index.json", Path.unlink, "not a pipeline folder"),
    ],
)
def test_folders_that_are_not_whole(file, damage, message, own_folder, tmp_path):
    damage(own_folder / file)
    with pytest.raises(OSError, match=message):
        generate(options(own_folder, tmp_path))


@pytest.mark.usefixtures("no_loading")
def test_models_of_other_tasks_are_refused(own_folder, tmp_path):
    config = own_folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 8}))
    with pytest.raises(
        ValueError, match=r"A prompt alone needs a text-to-video model .* is a Fun Control model or an image-to-video model"
    ):
        generate(options(own_folder, tmp_path))
    with pytest.raises(ValueError, match="lacks scheduler, text_encoder, tokenizer, transformer: a whole pipeline folder is needed"):
        generate(options(own_folder / "vae", tmp_path))


@pytest.mark.usefixtures("no_loading")
def test_a_pipeline_without_a_text_encoder(own_folder, tmp_path):
    index = own_folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))
    assert set(describe(str(own_folder))["components"]) == {"transformer", "vae"}
    with pytest.raises(ValueError, match="lacks text_encoder: a whole pipeline folder is needed"):
        generate(options(own_folder, tmp_path))


@pytest.fixture
def recipe(own_folder, tmp_path) -> Path:
    """The JSON file of a video that was made with `own_folder`."""
    (path,) = generate(options(own_folder, tmp_path / "made", steps=1))
    return path.with_suffix(".json")


def test_a_recipe_cannot_be_changed_by_flags(recipe, own_folder):
    with pytest.raises(ValueError, match="--steps, --seed cannot be combined with"):
        plan(GenerateOptions(str(recipe), steps=3, seed=1))


def test_a_recipe_knows_its_weights(recipe, own_folder):
    (own_folder / "cogvideox.json").write_text('{"fps": 5}')
    plan(GenerateOptions(str(recipe), overwrite=True))  # recommendations are not part of the model
    config = own_folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.7', '"scaling_factor": 0.8'))
    with pytest.raises(ValueError, match="was made with other weights or configs"):
        plan(GenerateOptions(str(recipe), overwrite=True))


def test_a_recipe_must_be_one(recipe):
    recipe.write_text('{"prompt": "a red circle"}')
    with pytest.raises(ValueError, match="is not a file that `generate` wrote beside a video"):
        plan(GenerateOptions(str(recipe)))


def test_an_installation_without_the_small_model(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers_cogvideox.demo._ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="lacks the weights of the small model"):
        demo_model()


# --- info ---------------------------------------------------------------------------------------------------------------


def test_facts_about_a_folder(folder, loaded):
    facts = describe(str(folder))
    components = loaded(CogVideoXPipeline).components
    for name in ("transformer", "vae", "text_encoder"):
        assert facts["components"][name]["parameters"] == sum(p.numel() for p in components[name].parameters())
        assert facts["components"][name]["dtypes"] == ["float32"]
    assert set(facts["components"]) == {"transformer", "vae", "text_encoder"}
    assert (facts["variant"], facts["pipeline"]) == (None, "CogVideoXPipeline")
    assert (facts["geometry"]["size_multiple"], facts["geometry"]["frame_step"]) == (16, 8)
    assert facts["legal_frames"] == [1, 9, 17]
    assert facts["scheduler"]["prediction_type"] == "v_prediction"


def test_facts_about_shards_and_variants(own_folder):
    before = describe(str(own_folder))["components"]["transformer"]
    part = own_folder / "transformer"
    file = part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(shards, halves, strict=True):
        save_file(half, part / name)
    index = {"weight_map": {key: name for name, half in zip(shards, halves, strict=True) for key in half}}
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    file.rename(part / "diffusion_pytorch_model.fp16.safetensors")  # another variant of the same weights does not count
    assert describe(str(own_folder))["components"]["transformer"] == before


@pytest.mark.parametrize(("part", "known"), [("transformer", {"recommended", "legal_frames"}), ("vae", set())])
def test_facts_about_one_component(part, known, folder):
    facts = describe(str(folder / part))
    assert facts["components"][part] == describe(str(folder))["components"][part]
    assert set(facts) == {"model", "variant", "pipeline", "components", "geometry"} | known


def test_facts_about_a_released_model(own_folder, capsys):
    preset = PRESETS["1.5-5b"]
    for name, config in (("transformer", preset.transformer), ("vae", preset.vae)):
        (own_folder / name / "config.json").write_text(json.dumps(config))
    assert cli.main(["info", str(own_folder)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["variant"] == "1.5-5b"
    assert lines["native"] == "768x1360 pixels (height x width), 81 frames at 16 fps"
    assert lines["recommended"] == "bfloat16, sampler dpm, 50 steps, guidance 6.0 (dynamic)"
    assert lines["legal"].endswith("8k+1: 1, 9, 65, 73, 81, 89, ...")


def test_facts_about_a_damaged_component(own_folder):
    cut(own_folder / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(OSError, match="is corrupt"):
        describe(str(own_folder / "vae"))


def test_facts_about_a_repository(folder, monkeypatch, tmp_path):
    """Headers come from the hub: the counts are those of the same files on disk."""
    import diffusers_cogvideox.generation.info as module

    snapshot = Path(shutil.copytree(folder, tmp_path / "0123abcd", ignore=shutil.ignore_patterns("*.safetensors")))
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    class Metadata:
        def __init__(self, repository: str, file: str, revision: str) -> None:
            assert (repository, revision) == ("owner/name", "0123abcd")
            self.tensors = {part.name: part for part in module.read_header(folder / file)}

    monkeypatch.setattr(model_folder, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr(module.HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(module, "parse_safetensors_file_metadata", Metadata)
    facts = describe("owner/name")
    assert facts["model"] == "owner/name at 0123abcd"
    assert facts["components"] == describe(str(folder))["components"]
