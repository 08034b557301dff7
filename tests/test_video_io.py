"""Video files: lossy round trips within a bound, nothing left behind by failures, errors that name the cause."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_cogvideox.files import atomic_path, check_writable
from diffusers_cogvideox.video_io import contact_sheet, probe_video, read_video, write_image, write_video


def clip(frames=9, height=32, width=48):
    """A smooth moving gradient, uint8 (F, H, W, 3): what a codec is made for."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    return np.stack([4 * x + 3 * t, 6 * y, 120 + 8 * t], axis=-1).clip(0, 255).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b.astype(float)).mean())


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [8, 16.0, 23.98])
def test_round_trip(tmp_path, suffix, fps):
    path = write_video(tmp_path / f"clip{suffix}", clip(), fps)
    frames, rate = read_video(path)
    assert frames.shape == clip().shape and frames.dtype == np.uint8 and frames.flags.writeable
    assert rate == fps
    assert psnr(frames, clip()) > 38
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("colour", [(200, 30, 60), (20, 180, 90), (30, 60, 220), (255, 255, 255), (0, 0, 0)])
def test_colours_survive(tmp_path, colour):
    """Both directions use the matrix that the file names; a wrong one is off by up to 20 levels."""
    path = write_video(tmp_path / "colour.mp4", np.full((2, 32, 32, 3), colour, np.uint8), 8)
    assert np.abs(read_video(path)[0].astype(int) - colour).max() <= 3


def test_every_kind_of_input_makes_the_same_file(tmp_path):
    frames = clip()
    kinds = {
        "array": frames,
        "tensor": torch.from_numpy(frames),
        "pictures": [Image.fromarray(frame) for frame in frames],
        "chunks": iter([frames[:5], torch.from_numpy(frames[5:]), frames[:0]]),
        "strided": np.asfortranarray(frames),
    }
    files = [write_video(tmp_path / f"{name}.mp4", kind, 8).read_bytes() for name, kind in kinds.items()]
    assert len(set(files)) == 1


def test_frames_are_taken_one_chunk_at_a_time(tmp_path):
    """Chunks are encoded while they are made: no more than one is asked for ahead."""
    written = []

    def chunks():
        for i in range(4):
            written.append(i)
            yield clip()[2 * i : 2 * i + 2]
            assert written == list(range(i + 1))

    assert len(read_video(write_video(tmp_path / "stream.mp4", chunks(), 8))[0]) == 8


def test_probe(tmp_path):
    path = write_video(tmp_path / "clip.mp4", clip(frames=17), 8)
    info = probe_video(path)
    assert (info.num_frames, info.height, info.width, info.fps, info.codec) == (17, 32, 48, 8.0, "h264")
    assert info.seconds == pytest.approx(17 / 8)


def test_single_frame_and_smallest_size(tmp_path):
    path = write_video(tmp_path / "one.mp4", clip(frames=1, height=16, width=16), 8)
    assert read_video(path)[0].shape == (1, 16, 16, 3)


def test_published_sample_is_probed(reference):
    info = probe_video(reference / "videos" / "kitten.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (49, 480, 720, 8.0)


# --- failures leave nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_an_interrupted_run_changes_nothing(tmp_path, error, existing):
    path = tmp_path / "clip.mp4"
    if existing:
        path.write_bytes(b"an earlier video")

    def frames():
        yield clip()
        raise error("midway")

    with pytest.raises(error, match="midway"):
        write_video(path, frames(), 8)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == ([("clip.mp4", b"an earlier video")] if existing else [])


def test_a_failing_encoder_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_cogvideox.video_io.ENCODING", ("-c:v", "no_such_codec"))
    with pytest.raises(OSError, match=r"the video encoder failed: .*no_such_codec"):
        write_video(tmp_path / "clip.mp4", iter([clip(20, 128, 128)] * 4), 8)
    assert not list(tmp_path.iterdir())


def test_atomic_path_for_any_file(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "sub" / "report.json") as partial:
        partial.write_text("{")
        raise ZeroDivisionError
    assert not list((tmp_path / "sub").iterdir())
    with atomic_path(tmp_path / "report.json") as partial:
        assert partial.parent == tmp_path and partial.suffix == ".json"
        partial.write_text("{}")
        assert not (tmp_path / "report.json").exists()
    assert (tmp_path / "report.json").read_text() == "{}"


# --- errors -----------------------------------------------------------------------------------------------------------


def test_unwritable_places_are_named(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file" / "clip.mp4", tmp_path):
        with pytest.raises(OSError, match=f"cannot write {re.escape(str(path))}: .* Choose a file in a folder"):
            check_writable(path)
    with pytest.raises(OSError, match=r"cannot write .*clip\.mp4: .*file is a file, not a folder"):
        write_video(tmp_path / "file" / "clip.mp4", clip(), 8)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (clip().astype(np.float32), r"must be uint8 .* not float32 of \(9, 32, 48, 3\): scale to 0 ... 255"),
        (clip().transpose(0, 3, 1, 2), r"not uint8 of \(9, 3, 32, 48\)"),
        (clip(height=31), "needs even sizes, frames are 31x48"),
        (clip(frames=0), "there are no frames"),
        ([], "there are no frames"),
        ([clip(), clip(height=64)], r"frames of \(64, 48, 3\) follow frames of \(32, 48, 3\)"),
    ],
)
def test_impossible_frames_are_refused(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "clip.mp4", frames, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -8, float("nan"), float("inf")])
def test_impossible_rates_are_refused(tmp_path, fps):
    with pytest.raises(ValueError, match=f"fps={fps} is not possible"):
        write_video(tmp_path / "clip.mp4", clip(), fps)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the suffix must be one of \.mp4"):
        write_video(tmp_path / "clip.gif", clip(), 8)


@pytest.mark.parametrize("read", [read_video, probe_video])
def test_unreadable_files_are_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"there is no video file .*nothing\.mp4"):
        read(tmp_path / "nothing.mp4")
    (tmp_path / "text.mp4").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.mp4 is not a video, or is damaged"):
        read(tmp_path / "text.mp4")


def test_damage_is_noticed(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", clip(), 8).read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.mp4 is not a video, or is damaged"):
        read_video(tmp_path / "half.mp4")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_contact_sheet_shows_first_to_last_frame():
    video = np.zeros((9, 20, 30, 3), np.uint8)
    video[:] = np.arange(9)[:, None, None, None] * 20
    sheet = np.asarray(contact_sheet(video, columns=5, gap=2))
    assert sheet.shape == (2 + 20 + 2, 5 * 32 + 2, 3)
    assert [sheet[10, 2 + 32 * i + 15, 0] for i in range(5)] == [0, 40, 80, 120, 160]
    assert (sheet[:2] == 255).all() and (sheet[:, :2] == 255).all() and (sheet[-2:] == 255).all()


def test_contact_sheet_of_several_videos_with_labels():
    videos = [clip(), torch.from_numpy(clip(frames=2, height=16))]
    plain = contact_sheet(videos, columns=4)
    labelled = contact_sheet(videos, columns=4, labels=["short", "a label that is much too long for a single line " * 3])
    assert plain.width == labelled.width and labelled.height > plain.height + 40
    rows = np.asarray(labelled.convert("L")).min(axis=1)
    assert (rows[:20] < 128).any(), "no text above the first row"


def test_contact_sheet_errors():
    with pytest.raises(ValueError, match="1 labels for 2 videos"):
        contact_sheet([clip(), clip()], labels=["one"])
    with pytest.raises(ValueError, match="at least one video and one column, not 0 and 8"):
        contact_sheet([])


def test_write_image(tmp_path):
    picture = clip()[0]
    path = write_image(tmp_path / "new" / "picture.png", picture)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
    assert np.array_equal(np.asarray(Image.open(write_image(path, Image.fromarray(picture[::-1])))), picture[::-1])
    with pytest.raises(ValueError, match="unknown file extension"):
        write_image(tmp_path / "picture.xyz", picture)
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["picture.png"]
