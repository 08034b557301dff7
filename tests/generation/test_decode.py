"""The verb `decode`: latents that were kept become the files that `generate` would have written; files from elsewhere by clear rules."""

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import diffusers_cogvideox.generation.generate as generating
import diffusers_cogvideox.generation.writing as writing
from diffusers_cogvideox import AutoencoderKLCogVideoX, cli
from diffusers_cogvideox.generation.decode import decode
from diffusers_cogvideox.generation.generate import generate
from diffusers_cogvideox.generation.latents import with_layout
from diffusers_cogvideox.generation.writing import UnfinishedVideoError
from diffusers_cogvideox.options import DecodeOptions, GenerateOptions
from diffusers_cogvideox.video_io import probe_video, read_video, write_video

PROMPT = "a red circle moves right"
SUFFIXES = (".json", ".mp4", ".png")


@pytest.fixture
def folder(folders) -> Path:
    return folders()


@pytest.fixture
def asked(folder, tmp_path):
    """asked(**changes): one short video in `tmp_path`/a.mp4."""

    def options(**changes) -> GenerateOptions:
        given = {"model": str(folder), "output": str(tmp_path / "a.mp4"), "steps": 1, "size": "36x50", "frames": 7, "device": "cpu"}
        return GenerateOptions(PROMPT, **{**given, "guidance_scale": 1.0, "fps": 6, **changes})

    return options


@pytest.fixture
def no_memory(monkeypatch):
    """Decoding runs out of memory, also in low-memory mode, as long as `no_memory` holds something."""
    decode, reasons = AutoencoderKLCogVideoX.decode_stream, ["CUDA out of memory. Tried to allocate 2.00 GiB\nSee the documentation"]

    def decode_stream(vae, z):
        if reasons:
            raise torch.OutOfMemoryError(reasons[0])
        yield from decode(vae, z)

    monkeypatch.setattr(AutoencoderKLCogVideoX, "decode_stream", decode_stream)
    return reasons


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def facts(path: Path) -> dict:
    """What the JSON file beside a video says, but for what time decides."""
    content = json.loads(path.with_suffix(".json").read_text())
    assert set(content.pop("seconds")) == {"load", "denoise", "decode", "write"}
    content.pop("memory", None)  # of `generate`
    return content


# --- what generate keeps ------------------------------------------------------------------------------------------------


def test_out_of_memory_the_latents_are_kept_and_decode_finishes(asked, tmp_path, no_memory, capsys):
    """Bit for bit the files that an undisturbed run writes."""
    arguments = ["generate", PROMPT, "--size", "36x50", "--frames", "7", "--steps", "1", "--guidance-scale", "1", "--fps", "6"]
    arguments += ["--model", asked().model, "--device", "cpu", "--output", str(tmp_path / "a.mp4")]
    assert cli.main(arguments) == 2
    assert names(tmp_path) == ["a.latents.safetensors"]
    told = capsys.readouterr().err
    assert "error: " in told and "there is too little memory (CUDA out of memory. Tried to allocate 2.00 GiB); --device cpu uses" in told
    command = re.search(r"`cogvideox (decode .*?)`", told)[1].split()
    assert cli.main(command) == 2  # still no memory
    assert "is not finished: there is too little memory" in capsys.readouterr().err
    assert names(tmp_path) == ["a.latents.safetensors"]
    no_memory.clear()
    assert cli.main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.mp4'}\n"
    (whole,) = generate(asked(output=str(tmp_path / "whole.mp4")))
    for suffix in (".mp4", ".png"):
        assert (tmp_path / "a").with_suffix(suffix).read_bytes() == whole.with_suffix(suffix).read_bytes()
    assert facts(tmp_path / "a.mp4") == facts(whole)
    assert generate(asked()) == [tmp_path / "a.mp4"]  # it counts as finished
    assert (tmp_path / "a.latents.safetensors").exists()


def test_a_batch_goes_on_after_a_video_that_could_not_be_decoded(asked, tmp_path, no_memory):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    with pytest.raises(ValueError, match="2 of 2 videos failed") as caught:
        generate(GenerateOptions(**vars(asked()) | {"prompt": str(tmp_path / "prompts.txt"), "output": str(tmp_path / "out")}))
    assert all("cogvideox decode" in line for line in caught.value.lines[1:])
    assert names(tmp_path / "out") == ["001-a-red-circle-0.latents.safetensors", "002-a-blue-square-0.latents.safetensors"]


def test_other_failures_keep_the_latents_too(asked, tmp_path, monkeypatch, caplog):
    """A full disk is told in one line; a defect stays a defect; both leave the latents."""
    caplog.set_level("INFO")
    for error, raised in ((OSError("no space left on device"), UnfinishedVideoError), (TypeError("a defect"), TypeError)):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(writing, "write_video", fail)
        with pytest.raises(raised, match=str(error)):
            generate(asked(overwrite=True))
        assert names(tmp_path) == ["a.latents.safetensors"]
    assert "a.mp4 is not finished, but its latents are in" in caplog.text


def test_latents_that_cannot_be_saved_do_not_hide_the_reason(asked, monkeypatch, no_memory):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(generating.SavedLatents, "save", full)
    with pytest.raises(UnfinishedVideoError, match=r"could not be saved either: there is too little memory .*; OSError: no space left"):
        generate(asked())


def test_the_next_success_takes_the_latents_of_the_failure_away(asked, tmp_path, no_memory):
    with pytest.raises(UnfinishedVideoError):
        generate(asked())
    no_memory.clear()
    with pytest.raises(FileExistsError, match=r"a\.latents\.safetensors exists already, of another video"):
        generate(asked(seed=1))
    generate(asked())
    assert names(tmp_path) == [f"a{suffix}" for suffix in SUFFIXES]


def test_latents_can_be_kept_on_purpose(asked, tmp_path):
    generate(asked())
    generate(asked(save_latents=True))  # the video is there, its latents are not
    kept = tmp_path / "a.latents.safetensors"
    with safe_open(kept, "pt") as file:
        latents, metadata = file.get_tensor("latents"), file.metadata()
    assert latents.shape == (1, 3, 4, 6, 8)
    assert {name: metadata[name] for name in ("num_frames", "height", "width", "scaling_factor")} == {
        **{"num_frames": "7", "height": "36", "width": "50"},
        "scaling_factor": "0.7",
    }
    before = kept.stat().st_mtime_ns
    generate(asked(save_latents=True))
    assert kept.stat().st_mtime_ns == before


def test_ctrl_c_while_decoding(asked, tmp_path, monkeypatch, capsys):
    def interrupted(vae, z):
        signal.raise_signal(signal.SIGINT)
        yield z

    monkeypatch.setattr(AutoencoderKLCogVideoX, "decode_stream", interrupted)
    options = asked()
    flags = ["--model", options.model, "--output", options.output, "--steps", "1", "--size", "32x48", "--frames", "9", "--device", "cpu"]
    assert cli.main(["generate", PROMPT, *flags]) == 130
    assert "a.mp4 is not finished, but its latents are in" in capsys.readouterr().err
    assert names(tmp_path) == ["a.latents.safetensors"]


def test_a_continuation_that_cannot_be_decoded_goes_on_from_its_steps(asked, tmp_path, no_memory, monkeypatch, caplog):
    """Its windows need each other's frames, so the state of the loop is kept in place of latents."""
    own = Path(shutil.copytree(asked().model, tmp_path / "model"))
    config = own / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"sample_frames": 9', '"sample_frames": 17'))
    clip = write_video(tmp_path / "clip.mp4", np.full((9, 32, 48, 3), 128, np.uint8), 8)
    options = asked(model=str(own), extend=str(clip), frames=4, size="32x48")
    with pytest.raises(UnfinishedVideoError, match="there is too little memory"):
        generate(options)
    assert (tmp_path / "a.resume").exists() and not (tmp_path / "a.latents.safetensors").exists()
    no_memory.clear()
    caplog.set_level("INFO")
    generate(options)
    assert "going on after step 1 of 1" in caplog.text
    assert probe_video(tmp_path / "a.mp4").num_frames == 13
    assert not (tmp_path / "a.resume").exists()


def test_low_memory_from_the_start(asked, tmp_path, monkeypatch):
    modes, decode = [], AutoencoderKLCogVideoX.decode_stream
    monkeypatch.setattr(AutoencoderKLCogVideoX, "decode_stream", lambda vae, z: modes.append(vae.use_tiling) or decode(vae, z))
    generate(asked(tiling=True, save_latents=True))
    decode_options = {"tiling": True, "output": str(tmp_path / "b.mp4")}
    decode_verb(tmp_path, **decode_options)
    assert modes == [True, True]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def decode_verb(folder: Path, **options) -> list[Path]:
    return decode(DecodeOptions(str(folder / "a.latents.safetensors"), **options))


# --- the file of another run --------------------------------------------------------------------------------------------


@pytest.fixture
def kept(asked, tmp_path) -> Path:
    """Latents of a video that is not there."""
    generate(asked(save_latents=True))
    for suffix in SUFFIXES:
        (tmp_path / "a").with_suffix(suffix).unlink()
    return tmp_path / "a.latents.safetensors"


def test_what_is_there_is_not_replaced(kept, tmp_path):
    (tmp_path / "a.png").write_text("somebody's picture")
    with pytest.raises(FileExistsError, match=r"a\.png exists already"):
        decode_verb(tmp_path)
    (path,) = decode_verb(tmp_path, overwrite=True)
    before = path.stat().st_mtime_ns
    assert decode_verb(tmp_path) == [path]
    assert path.stat().st_mtime_ns == before
    (elsewhere,) = decode_verb(tmp_path, output=str(tmp_path / "folder"))
    assert elsewhere == tmp_path / "folder" / "a.mp4"
    assert elsewhere.read_bytes() == path.read_bytes()


def test_another_precision_is_written_down(kept, tmp_path):
    (path,) = decode_verb(tmp_path, dtype="bfloat16")
    assert facts(path)["decoded"]["dtype"] == "bfloat16"
    assert facts(path)["settings"]["dtype"] == "float32"


def test_another_model_must_be_named(kept, folder, tmp_path, caplog):
    own = Path(shutil.copytree(folder, tmp_path / "model"))
    config = own / "vae" / "config.json"
    config.write_text(config.read_text().replace('"sample_height": ', '"sample_height": 1'))
    (path,) = decode_verb(tmp_path, model=str(own))
    assert "were made with a model of fingerprint" in caplog.text
    assert facts(path)["decoded"]["model"] == str(own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 3}, r"--fps has no effect: .*a\.latents\.safetensors says it"),
        ({"layout": "vae"}, "--layout has no effect"),
        ({"dtype": "float16"}, "--dtype float16 does not work on a CPU"),
        ({"device": "tpu"}, "--device tpu is not available"),
        ({"output": "a.gif"}, r"--output a\.gif is not possible"),
        ({"model": "nowhere"}, "there is no folder 'nowhere'"),
    ],
)
def test_what_decode_refuses(kept, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        decode_verb(tmp_path, **options)


def test_a_damaged_file(kept, tmp_path):
    kept.write_bytes(kept.read_bytes()[:-10])
    with pytest.raises(OSError, match=r"is not a file of latents .* or is damaged"):
        decode_verb(tmp_path)


# --- latents from elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["pipeline", "vae"])
@pytest.mark.parametrize("count", [1, 2])
def test_plain_latents(folder, tmp_path, layout, count, caplog):
    """Two layouts of the same latents, told apart by the number of channels; against the VAE called by hand."""
    caplog.set_level("INFO")
    vae = AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
    z = torch.randn(count, 4, 3, 4, 6)
    stored = {"vae": z, "pipeline": z.transpose(1, 2).contiguous() * vae.config.scaling_factor}
    save_file({"anything": stored[layout]}, tmp_path / "z.safetensors")
    paths = decode(DecodeOptions(str(tmp_path / "z.safetensors"), model=str(folder), device="cpu", fps=7))
    assert [path.name for path in paths] == (["z.mp4"] if count == 1 else ["z-0.mp4", "z-1.mp4"])
    if layout == "pipeline":  # scaled there and back, in this precision
        z = stored["pipeline"].transpose(1, 2) / vae.config.scaling_factor
    with torch.no_grad():
        video = torch.cat([vae.decode(one).sample for one in z.split(1)])
    frames = ((video / 2 + 0.5).clamp(0, 1) * 255).round().byte().movedim(1, -1)
    for path, expected in zip(paths, frames, strict=True):
        assert np.array_equal(read_video(path)[0], read_video(write_video(tmp_path / "expected.mp4", expected, 7))[0])
        told = json.loads(path.with_suffix(".json").read_text())
        assert (told["layout"], told["fps"], told["num_frames"]) == (layout, 7, 9)
    assert "z.safetensors is read as" in caplog.text
    with pytest.raises(FileExistsError, match="exists already"):
        decode(DecodeOptions(str(tmp_path / "z.safetensors"), model=str(folder), device="cpu"))


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"a": (1, 3, 4, 4, 6)}, {"model": None}, "does not say which model its latents are for: name it with --model"),
        ({"a": (1, 3, 4, 4, 6), "b": (1,)}, {}, r"one tensor of five axes is needed, but the file holds \{'a'"),
        ({"a": (3, 4, 4, 6)}, {}, "one tensor of five axes is needed"),
        ({"a": (1, 3, 16, 4, 6)}, {}, "are not those of this model: its 4 channels must be the third or second axis"),
        ({"a": (1, 3, 4, 4, 6)}, {"layout": "vae"}, "its 4 channels must be the second axis"),
        ({"a": (1, 4, 4, 4, 6)}, {}, "may be of either layout: say --layout pipeline or --layout vae"),
        ({"a": (1, 3, 4, 4, 6)}, {"model": "vae"}, "does not say how many frames per second"),
        ({"a": (1, 3, 4, 4, 6)}, {"model": "transformer", "fps": 8}, "has no VAE to decode with"),
    ],
)
def test_plain_latents_that_say_too_little(folder, tmp_path, tensors, options, message):
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "z.safetensors")
    model = options.get("model", "")
    given = {"device": "cpu", **options, "model": None if model is None else str(folder / model)}
    with pytest.raises(ValueError, match=message):
        decode(DecodeOptions(str(tmp_path / "z.safetensors"), **given))


def test_a_layout_that_is_named_decides():
    tensor = torch.arange(4 * 4 * 6.0).reshape(1, 4, 4, 1, 6)
    assert torch.equal(with_layout({"a": tensor}, 4, "pipeline")[0], tensor)
    assert torch.equal(with_layout({"a": tensor}, 4, "vae")[0], tensor.transpose(1, 2))


def test_a_latent_video_of_the_released_vae_is_understood(reference):
    """Sixteen channels in the second place: what the VAE encoded, 49 frames."""
    with safe_open(reference / "latents" / "real_13x60x90.safetensors", "pt") as file:
        latents, layout = with_layout({"latents": file.get_tensor("latents")}, 16)
    assert (layout, latents.shape) == ("vae", (1, 13, 16, 60, 90))


def test_the_verb_loads_nothing_but_the_vae(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(generating, "load_pipeline", lambda *_: pytest.fail("the pipeline was loaded"))
    shutil.copytree(json.loads(read_metadata(kept)["content"])["settings"]["model"], tmp_path / "model")
    (path,) = decode_verb(tmp_path)
    assert "decoded" not in facts(path)


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()
