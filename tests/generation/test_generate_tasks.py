"""`generate` from pictures and videos, with LoRA, with a preview, and after an interruption: the frames are those of the pipelines."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffusers_cogvideox as package
import diffusers_cogvideox.generation.generate as generating
import diffusers_cogvideox.generation.writing as writing
from diffusers_cogvideox import cli
from diffusers_cogvideox.generation.generate import generate
from diffusers_cogvideox.generation.plan import plan
from diffusers_cogvideox.generation.settings import load_pipeline, make_videos
from diffusers_cogvideox.generation.story import read_story
from diffusers_cogvideox.options import GenerateOptions
from diffusers_cogvideox.video_io import probe_video, read_video, write_image, write_video
from lora_cases import factors, spelled

PROMPT = "a red circle moves right"
SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Pictures and videos that somebody may have, by name."""
    folder, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 255, (11, 5, 6, 3), np.uint8), 8, axis=1).repeat(8, axis=2)  # 11 frames of 40x48
    paths = {"picture": write_image(folder / "picture.png", frames[0]), "video": write_video(folder / "video.mp4", frames, 12)}
    paths["last"] = write_image(folder / "last.png", frames[-1])
    return {name: str(path) for name, path in paths.items()}


def asked(folder: Path, output: Path, **changes) -> GenerateOptions:
    defaults = {"model": str(folder), "output": str(output), "steps": 2, "device": "cpu", "size": "32x48", "seed": 3}
    return GenerateOptions(PROMPT, **{**defaults, **changes})


# variant, options, the pipeline to call by hand, its arguments; frames and rate of the result
TASKS = {
    "image": ("5b-i2v", {"image": "picture"}, "ImageToVideo", {"image": "picture"}, (9, 8)),
    "video": ("5b", {"video": "video", "strength": 0.5}, "VideoToVideo", {"video": "video", "strength": 0.5}, (11, 12)),
    "control": ("fun-control", {"control": "video"}, "FunControl", {"control_video": "video"}, (11, 12)),
    "few frames": ("fun-control", {"control": "video", "frames": 4}, "FunControl", {"control_video": "video", "num_frames": 4}, (4, 12)),
    "ends": ("fun-inp", {"image": "picture", "last_image": "last"}, "FunInpaint", {"image": "picture", "last_image": "last"}, (9, 8)),
    "mask": ("fun-inp", {"video": "video", "mask": "picture"}, "FunInpaint", {"video": "video", "mask_video": "picture"}, (11, 12)),
    "inpaint from words": ("fun-inp", {"fps": 5}, "FunInpaint", {}, (9, 5)),
    "extend by image": ("5b-i2v", {"extend": "video", "frames": 3}, "Continuation", {"video": "video", "num_frames": 3}, (14, 12)),
}


@pytest.mark.parametrize(("variant", "options", "pipeline", "arguments", "form"), TASKS.values(), ids=TASKS)
def test_every_task(variant, options, pipeline, arguments, form, folders, loaded, files, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(writing, "write_video", lambda path, frames, fps: write_video(path, watched(frames, made), fps))
    (path,) = generate(asked(folders(variant), tmp_path / "a.mp4", **{k: files.get(v, v) for k, v in options.items()}))
    info = probe_video(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (*form, 32, 48)

    pipe = loaded(getattr(package, f"CogVideoX{pipeline}Pipeline"), variant)
    pipe.set_progress_bar_config(disable=True)
    by_hand = {name: files.get(value, value) for name, value in arguments.items()} | ({"fit": "cover"} if set(arguments) else {})
    generator = torch.Generator().manual_seed(3)
    frames = pipe(prompt=PROMPT, num_inference_steps=2, generator=generator, output_type="np", **SIZE, **by_hand).frames[0]
    np.testing.assert_array_equal(np.concatenate(made), np.rint(frames * 255))


def watched(chunks, made):
    for chunk in chunks:
        made.append(chunk)
        yield chunk


def test_a_story_in_windows(folders, tmp_path, monkeypatch):
    """With memory for one window: the plan knows that no pass sees more."""
    made, loaded = [], []
    monkeypatch.setattr(generating, "load_pipeline", lambda *given: loaded.append(load_pipeline(*given)) or loaded[0])
    monkeypatch.setattr(writing, "write_video", lambda path, frames, fps: write_video(path, watched(frames, made), fps))
    told = replace(asked(folders(), tmp_path / "a.mp4", steps=1, frames=25, window=17), prompt=f"{PROMPT} [12:] a blue square")
    (path,) = generate(told)
    assert json.loads(path.with_suffix(".json").read_text())["settings"]["window"] == 17
    work = loaded[0]._fitted.plan.work
    assert (work.num_frames, work.seen_frames, work.prompts) == (25, 17, 2)
    pipe = package.CogVideoXPipeline.from_pretrained(folders())
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(3), "output_type": "np", "num_frames": 25, **SIZE}
    windows = package.ContextWindows(frames=17)
    frames = pipe(prompt={0: PROMPT, 12: "a blue square"}, context=windows, **options).frames[0]
    np.testing.assert_array_equal(np.concatenate(made), np.rint(frames * 255))


def test_a_mark_behind_a_backslash_is_text():
    assert read_story(r"a sign: \[80:]") == "a sign: [80:]"
    assert read_story(r"a sign: \[ 8 :] [80:] it falls") == {0: "a sign: [ 8 :]", 80: "it falls"}
    assert read_story("[0:] a dog [80:] a cat") == {0: "a dog", 80: "a cat"}
    assert read_story(r"C:\[x] stays") == r"C:\[x] stays"


def test_continuation_by_words(folders, files, tmp_path):
    """The known frames of a window leave room for new ones: the tiny model counts as trained for 17 frames."""
    own = Path(shutil.copytree(folders(), tmp_path / "model"))
    config = own / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"sample_frames": 9', '"sample_frames": 17'))
    (path,) = generate(asked(own, tmp_path / "a.mp4", extend=files["video"], frames=10, steps=1))
    frames, rate = read_video(path)
    assert (len(frames), rate) == (21, 12)
    given = read_video(files["video"])[0][:, 4:36]  # of 40 rows, the middle 32
    assert np.abs(frames[:11].astype(int) - given).mean() < 12  # two passes of a lossy codec
    assert np.abs(frames[11:].astype(int) - given[-1]).mean() > 12


def test_what_becomes_of_pictures_is_told(folders, files, tmp_path, capsys):
    arguments = ["--model", str(folders("5b-i2v")), "--output", str(tmp_path / "a.mp4"), "--steps", "1", "--size", "32x48"]
    assert cli.main(["generate", PROMPT, *arguments, "--image", files["picture"]]) == 0
    shown = capsys.readouterr().err
    assert "cogvideox generate: A picture of 40x48 (height x width) is scaled to 40x48 and cropped to 32x48." in shown


def test_loras(folders, tmp_path):
    """Two files, one of them at half strength, are what they are by hand; the recipe knows them."""
    paths = []
    for seed in (1, 2):
        tensors = {name: 20 * tensor for name, tensor in spelled(factors(seed=seed), "diffusers", alpha=4.0).items()}
        save_file(tensors, tmp_path / f"{seed}.safetensors")
        paths.append(str(tmp_path / f"{seed}.safetensors"))
    options = asked(folders(), tmp_path / "a.mp4", lora=(f"{paths[0]}:0.5", paths[1]))
    (job,) = plan(options)
    ours = make_videos(load_pipeline(job.settings), [PROMPT], [3], job.settings)

    pipe = package.CogVideoXPipeline.from_pretrained(folders())
    for name, path in zip("ab", paths, strict=True):
        pipe.load_lora_weights(path, adapter_name=name)
    call = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "np", **SIZE}
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    by_hand = pipe(generator=torch.Generator().manual_seed(3), **call).frames
    np.testing.assert_array_equal(ours, np.rint(by_hand * 255))
    pipe.set_adapters(["a", "b"], [1.0, 1.0])
    assert not np.array_equal(ours, np.rint(pipe(generator=torch.Generator().manual_seed(3), **call).frames * 255))

    (path,) = generate(options)
    (again,) = generate(GenerateOptions(str(path.with_suffix(".json")), output=str(tmp_path / "b.mp4")))
    assert again.read_bytes() == path.read_bytes()
    save_file({"other": torch.zeros(1)}, paths[1])
    with pytest.raises(ValueError, match=r"2\.safetensors has changed since"):
        plan(GenerateOptions(str(path.with_suffix(".json")), output=str(tmp_path / "c.mp4")))


def saved(folder: Path, name: str, **alpha: float) -> str:
    """Path of a LoRA file of the tiny model."""
    folder.mkdir(exist_ok=True)
    save_file(spelled(factors(), "fun", **alpha), folder / name)
    return str(folder / name)


def test_lora_alpha_is_for_the_files_that_leave_it_open(folders, tmp_path):
    files = saved(tmp_path, "open.safetensors"), saved(tmp_path, "says.safetensors", alpha=2.0)
    (job,) = plan(asked(folders(), tmp_path / "a.mp4", lora=files, lora_alpha=64.0))
    assert [lora.alpha for lora in job.settings.loras] == [64.0, None]
    layers = [layer for layer in load_pipeline(job.settings).transformer.modules() if hasattr(layer, "scaling")]
    assert len(layers) == len(factors())
    assert all(layer.scaling == {"lora0": 64.0 / 4, "lora1": 2.0 / 4} for layer in layers)
    with pytest.raises(ValueError, match=r"--lora-alpha 64 has no effect: .*says\.safetensors says it already\. .* --lora FILE:STRENGTH"):
        plan(asked(folders(), tmp_path / "a.mp4", lora=files[1:], lora_alpha=64.0))


def test_lora_alpha_must_not_contradict_a_part_of_a_file(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(generating, "load_pipeline", lambda *_: pytest.fail("the weights were loaded"))
    tensors = spelled(factors(), "fun", alpha=2.0)
    tensors.pop(next(name for name in tensors if name.endswith(".alpha")))
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"lora_alpha=64 contradicts .*part\.safetensors, which says 2"):
        generate(asked(folders(), tmp_path / "a.mp4", lora=(str(tmp_path / "part.safetensors"),), lora_alpha=64.0))


def test_a_folder_of_a_lora(folders, tmp_path):
    file = saved(tmp_path / "lora", "pytorch_lora_weights.safetensors", alpha=2.0)
    (job,) = plan(asked(folders(), tmp_path / "a.mp4", lora=(f"{tmp_path / 'lora'}:0.5",)))
    (lora,) = job.settings.loras
    assert (lora.file.path, lora.scale) == (str(Path(file).resolve()), 0.5)


def test_a_lora_of_another_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(generating, "load_pipeline", lambda *_: pytest.fail("the weights were loaded"))
    save_file(spelled(factors(width=128), "diffusers", alpha=4.0), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"wide\.safetensors"):
        generate(asked(folders(), tmp_path / "a.mp4", lora=(str(tmp_path / "wide.safetensors"),)))


# --- recipes ----------------------------------------------------------------------------------------------------------------


def test_a_recipe_repeats_a_task(folders, files, tmp_path):
    own = shutil.copy(files["video"], tmp_path / "own.mp4")
    (path,) = generate(asked(folders("5b"), tmp_path / "a.mp4", video=str(own), strength=0.5, fit="contain"))
    recipe = json.loads(path.with_suffix(".json").read_text())
    assert recipe["settings"]["pipeline"] == "CogVideoXVideoToVideoPipeline"
    assert set(recipe["sources"]) == {"video", "strength", "fit"}
    (again,) = generate(GenerateOptions(str(path.with_suffix(".json")), output=str(tmp_path / "b.mp4")))
    assert again.read_bytes() == path.read_bytes()
    write_video(own, read_video(own)[0][::-1], 12)
    with pytest.raises(ValueError, match=r"own\.mp4 has changed since"):
        plan(GenerateOptions(str(path.with_suffix(".json")), output=str(tmp_path / "c.mp4")))


def test_changed_files_make_another_video(folders, files, tmp_path):
    own = shutil.copy(files["picture"], tmp_path / "own.png")
    options = asked(folders("5b-i2v"), tmp_path / "a.mp4", image=str(own), steps=1)
    generate(options)
    (job,) = plan(options)
    assert job.is_finished()
    shutil.copy(files["last"], own)
    with pytest.raises(FileExistsError, match="exists already"):
        plan(options)


# --- refused before anything is loaded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "options", "message"),
    [
        ("5b", {"image": "picture"}, r"--image needs an image-to-video model \(such as demo-i2v or zai-org/CogVideoX-5b-I2V\)"),
        ("5b-i2v", {}, "A prompt alone needs a text-to-video model"),
        ("5b", {"control": "video"}, "--control needs a Fun Control model"),
        ("5b", {"video": "video", "mask": "video"}, "--video with --mask needs a Fun InP model"),
        ("5b", {"video": "picture.png"}, "there is no file picture.png"),
        ("5b", {"video": "video", "strength": 0.1}, "strength=0.1 leaves none of 2 steps: use at least 0.5"),
        ("fun-control", {"control": "video", "frames": 12}, "--frames 12 is not possible: the video to start from has 11"),
        ("5b", {"lora": ("nowhere",)}, "there is no file nowhere"),
        ("5b", {"lora": ("picture",)}, "picture.png"),
        ("5b", {"window": 10}, "Context windows of frames=10 are not possible"),
        ("5b", {"prompt": "red [8:] blue"}, "2 prompts needs context windows, .* on the command line --window"),
        ("5b", {"prompt": "a list [ 8 : ] of words"}, "in a prompt begins another one: write .*FRAME"),
        ("5b", {"prompt": "red [17:] blue", "frames": 17, "window": 9}, "frame 17 on begins after the end"),
        ("5b", {"prompt": "red [8:] blue [8:] green"}, "names frame 8 after frame 8"),
        ("5b", {"prompt": "[8:] blue"}, "says nothing to show from frame 0 on"),
        ("5b", {"window": 9, "extend": "video"}, "--window is not possible with --extend"),
        ("5b", {"window": 9, "cache": "auto"}, "--window is not possible with --cache"),
    ],
)
def test_impossible_tasks(variant, options, message, folders, files, tmp_path, monkeypatch):
    monkeypatch.setattr(generating, "load_pipeline", lambda *_: pytest.fail("the weights were loaded"))
    given = {k: tuple(files.get(e, e) for e in v) if isinstance(v, tuple) else files.get(v, v) for k, v in options.items()}
    with pytest.raises((ValueError, OSError), match=message):
        generate(replace(asked(folders(variant), tmp_path), **given))


# --- interruption -------------------------------------------------------------------------------------------------------------


FOUR_STEPS = ["generate", PROMPT, "--steps", "4", "--size", "32x48", "--device", "cpu", "--sampler", "dpm"]


@pytest.fixture(scope="module")
def whole(folders, tmp_path_factory) -> bytes:
    """The video of a command that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole") / "a.mp4"
    assert cli.main([*FOUR_STEPS, "--model", str(folders()), "--output", str(path)]) == 0
    return path.read_bytes()


@pytest.mark.parametrize(("every", "moment"), [(1, 3), (2, 2), (2, 4)])
def test_ctrl_c_and_the_same_command_again(every, moment, whole, folders, tmp_path, monkeypatch, capsys):
    """The state is saved at the interruption, too: no step that was finished is made twice."""
    make, steps = generating.stream_videos, []

    def stream_videos(*args, callback_on_step_end, **kwargs):
        def callback(*state):
            steps.append(1)
            if len(steps) == moment:
                signal.raise_signal(signal.SIGINT)
            return callback_on_step_end(*state)

        return make(*args, callback_on_step_end=callback, **kwargs)

    monkeypatch.setattr(generating, "stream_videos", stream_videos)
    capsys.readouterr()
    command = [*FOUR_STEPS, "--model", str(folders()), "--checkpoint-every", str(every), "--preview", "--output", str(tmp_path / "a.mp4")]
    assert cli.main(command) == 130
    assert f"a.mp4: stopped after step {moment - 1} of 4; the same command goes on from there." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.preview.png", "a.resume"]
    assert cli.main(command) == 0
    assert f"going on after step {moment - 1} of 4" in capsys.readouterr().err
    assert len(steps) == 1 + 4
    assert sorted(path.name for path in tmp_path.glob("a.*")) == ["a.json", "a.mp4", "a.png"]
    assert (tmp_path / "a.mp4").read_bytes() == whole


def test_the_state_of_another_video_is_not_used(folders, tmp_path):
    options = asked(folders(), tmp_path / "a.mp4", checkpoint_every=1)
    (tmp_path / "a.resume").write_text("somebody's file")
    with pytest.raises(OSError, match=r"a\.resume is not a saved state"):
        generate(options)
    generate(asked(folders(), tmp_path / "a.mp4", checkpoint_every=1, overwrite=True))
    assert not (tmp_path / "a.resume").exists()


# --- preview --------------------------------------------------------------------------------------------------------------------


def test_the_preview_is_there_while_the_video_is_made(folders, tmp_path, monkeypatch):
    sizes, write = [], writing.write_video

    def write_video(*args):
        with Image.open(tmp_path / "a.preview.png") as sheet:
            sizes.append(sheet.size)
        return write(*args)

    monkeypatch.setattr(writing, "write_video", write_video)
    generate(asked(folders(), tmp_path / "a.mp4", preview=True))
    ((width, height),) = sizes
    assert width == 3 * (48 + 4) + 4 and height > 32 + 8
    assert not (tmp_path / "a.preview.png").exists()


def test_a_folder_brings_its_own_map(folders, tmp_path, monkeypatch):
    own = Path(shutil.copytree(folders(), tmp_path / "model"))
    black = {"weight": [[0.0] * 4] * 3, "bias": [-1.0, -1.0, 1.0]}
    (own / "cogvideox.json").write_text(json.dumps({"preview": black}))
    colours = []
    show = generating.Preview.frames
    monkeypatch.setattr(generating.Preview, "frames", lambda self, latents: colours.append(show(self, latents)) or colours[-1])
    generate(asked(own, tmp_path / "a.mp4", preview=True))
    assert {tuple(pixel) for frames in colours for pixel in frames.reshape(-1, 3)} == {(0, 0, 255)}
