"""Source files: known by their content, looked into before anything runs, and the format that a video takes over from them."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusers_cogvideox.generation.sources import LoraFile, SourceFile, Sources, read_loras
from diffusers_cogvideox.options import GenerateOptions
from diffusers_cogvideox.video_io import write_image, write_video


@pytest.fixture
def video(tmp_path):
    return str(write_video(tmp_path / "clip.mp4", np.zeros((5, 32, 48, 3), np.uint8), 12.5))


@pytest.fixture
def picture(tmp_path):
    return str(write_image(tmp_path / "picture.png", np.zeros((20, 30, 3), np.uint8)))


def sources(**options) -> Sources:
    return Sources.of(GenerateOptions("x", **options))


def test_a_file_is_known_by_its_content(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one" * 10**6)
    found = SourceFile.of(file)
    assert found == SourceFile(str(file), hashlib.sha256(b"one" * 10**6).hexdigest())
    found.check()
    file.write_bytes(b"two")
    with pytest.raises(ValueError, match=f"{file} has changed since"):
        found.check()
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no file {file}"):
        found.check()


def test_paths_are_made_absolute(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources(image="picture.png").image.path == picture


def test_recipes_hold_what_is_given(picture, video):
    given = sources(image=picture, last_image=picture)
    assert set(given.to_json()) == {"image", "last_image", "fit"}
    assert Sources.from_json(given.to_json()) == given
    assert sources().to_json() == {}
    given = sources(video=video, strength=0.5, fit="contain")
    assert given.to_json() == {"video": {"path": video, "sha256": SourceFile.of(video).sha256}, "strength": 0.5, "fit": "contain"}


def test_arguments_of_the_pipelines(picture, video):
    assert sources(image=picture).call_arguments() == {"image": picture, "fit": "cover"}
    assert sources(video=video, strength=0.5).call_arguments() == {"video": video, "strength": 0.5, "fit": "cover"}
    assert sources(video=video, mask=picture).call_arguments() == {"video": video, "mask_video": picture, "fit": "cover"}
    assert sources(control=video, fit="stretch").call_arguments() == {"control_video": video, "fit": "stretch"}
    assert sources(extend=video).call_arguments() == {"video": video, "fit": "cover"}
    assert sources().call_arguments() == {}


def test_the_format_that_is_taken_over(picture, video):
    for option in ({"video": video}, {"control": video}, {"video": video, "mask": picture}):
        assert sources(**option).format() == {"num_frames": 5, "fps": 12.5}
    assert sources(extend=video).format() == {"fps": 12.5}
    assert sources(image=picture).format() == sources().format() == {}
    assert sources(video=str(write_video(video.replace("clip", "whole"), np.zeros((2, 16, 16, 3), np.uint8), 8))).format()["fps"] == 8


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"image": "nowhere.png"}, "there is no file nowhere.png"),
        ({"image": "{video}"}, "is not an image, or is damaged"),
        ({"video": "{text}"}, "is not a video, or is damaged"),
        ({"video": "{video}", "mask": "{text}"}, "is not a video, or is damaged"),
        ({"extend": "nowhere.mp4"}, "there is no file nowhere.mp4"),
    ],
)
def test_unusable_files(option, message, video, tmp_path):
    (tmp_path / "text.mp4").write_text("hello")
    given = {name: value.format(video=video, text=tmp_path / "text.mp4") for name, value in option.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sources(**given)


def test_a_mask_is_a_picture_or_a_video(picture, video):
    assert sources(video=video, mask=picture).mask == SourceFile.of(picture)
    assert sources(video=video, mask=video).mask == SourceFile.of(video)


# --- LoRA ---------------------------------------------------------------------------------------------------------------


def test_loras_and_their_strength(tmp_path):
    style, odd = tmp_path / "style.safetensors", tmp_path / "a:1"
    for file in (style, odd):
        file.write_text(str(file))
    one, two = read_loras((f"{style}:0.7", str(odd)))
    assert (one.file, one.scale, one.alpha) == (SourceFile.of(style), 0.7, None)
    assert (two.file.path, two.scale) == (str(odd), 1.0)
    file = {"path": one.file.path, "sha256": one.file.sha256}
    assert LoraFile.from_json({"file": file, "scale": 0.7, "alpha": 64.0}) == replace(one, alpha=64.0)
    assert read_loras((f"{style}:-1",))[0].scale == -1


def test_unusable_loras(tmp_path):
    style = tmp_path / "style.safetensors"
    style.write_text("x")
    with pytest.raises(FileNotFoundError, match="there is no file nowhere"):
        read_loras(("nowhere:0.5",))
    with pytest.raises(ValueError, match="is given twice"):
        read_loras((str(style), f"{style}:0.5"))
    with pytest.raises(ValueError, match="the strength must be a finite number"):
        read_loras((f"{style}:nan",))


def test_pictures_that_lie_on_their_side(tmp_path):
    from diffusers_cogvideox.video_io import is_picture, probe_image

    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")
    assert (probe_image(tmp_path / "plain.jpg"), probe_image(tmp_path / "turned.jpg")) == ((20, 30), (30, 20))
    assert [is_picture(name) for name in ("a.PNG", "a.jpg", "a.mp4", "a")] == [True, True, False, False]
    with pytest.raises(FileNotFoundError, match="there is no image file"):
        probe_image(tmp_path / "nothing.png")
