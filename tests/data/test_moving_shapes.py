"""The data set: reproducible, split into two disjoint sides, and what it says is what it shows."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from diffusers_cogvideox.data.captions import canonical, parse
from diffusers_cogvideox.data.moving_shapes import MovingShapes, is_held_out, split
from diffusers_cogvideox.data.scenes import MOTIONS, STILL, Scene, all_scenes

FINGERPRINT = """
import hashlib
from diffusers_cogvideox.data.moving_shapes import MovingShapes
clips = [MovingShapes(7, objects=(1, 2), held_out=True).sample(i) for i in (5, 6)]
print(hashlib.sha256(b"".join(c.video.tobytes() + c.caption.encode() for c in clips)).hexdigest())
"""

RECORDED_CAPTIONS = [
    "a cyan cross moves smoothly up and an orange circle grows smoothly",
    "an orange square spins steadily while a green triangle is sliding steadily leftwards",
    "a blue triangle remains still and a yellow square turns against a black background",
]
RECORDED_STD = [0.421812, 0.431007, 0.288447]


@pytest.mark.parametrize("objects", [1, 2])
def test_split_covers_everything_once(objects):
    scenes = all_scenes(objects)
    train, held_out = split(scenes)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(scenes)
    assert len(train) + len(held_out) == len(scenes)
    assert len(held_out) / len(scenes) == pytest.approx(0.12, abs=0.01)


def test_split_depends_on_the_scene_alone():
    scenes = all_scenes(1)
    assert split(reversed(scenes))[1] == split(scenes)[1][::-1]
    scene = scenes[100]
    share = int.from_bytes(hashlib.sha256(canonical(scene).encode()).digest()[:4], "big") / 2**32
    assert is_held_out(scene) == (share < 0.12)


def test_every_word_is_on_both_sides():
    for side in split(all_scenes(1)):
        for word in ("shape", "color", "motion"):
            assert len({getattr(scene.shapes[0], word) for scene in side}) == {"shape": 4, "color": 8, "motion": 9}[word]
        assert len({scene.background for scene in side}) == 6


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("objects", [(1,), (2,), (1, 2)])
def test_samples_come_from_their_side(objects, held_out):
    _, captions, scenes = MovingShapes(0, objects=objects, held_out=held_out).batch(0, 40)
    assert {len(scene.shapes) for scene in scenes} == set(objects)
    for text, scene in zip(captions, scenes, strict=True):
        assert is_held_out(scene) == held_out
        assert parse(text) == (scene if "background" in text else Scene(None, scene.shapes))


def test_a_sample_depends_on_seed_and_index_alone():
    data = MovingShapes(1, objects=(1, 2))
    videos, captions, scenes = data.batch(10, 4)
    assert videos.shape == (4, 17, 64, 64, 3) and videos.dtype == np.float32
    again = MovingShapes(1, objects=(1, 2)).sample(12)
    np.testing.assert_array_equal(videos[2], again.video)
    assert (captions[2], scenes[2]) == (again.caption, again.scene)
    assert MovingShapes(2, objects=(1, 2)).sample(12).caption != again.caption
    assert len({data.sample(i).caption for i in range(50)}) > 45


def test_samples_are_the_same_in_another_process():
    here = [MovingShapes(7, objects=(1, 2), held_out=True).sample(i) for i in (5, 6)]
    mine = hashlib.sha256(b"".join(c.video.tobytes() + c.caption.encode() for c in here)).hexdigest()
    other = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == mine


def test_samples_never_change():
    """The shipped model was trained on these; a change of pixels or words would make it, and its scores, another experiment."""
    clips = [MovingShapes(0, objects=(1, 2)).sample(i) for i in range(3)]
    assert [clip.caption for clip in clips] == RECORDED_CAPTIONS
    np.testing.assert_allclose([clip.video.std() for clip in clips], RECORDED_STD, rtol=1e-5)


def test_pictures():
    data = MovingShapes(0, objects=(1, 2), frames=1, height=96, width=128)
    videos, captions, scenes = data.batch(0, 20)
    assert videos.shape == (20, 1, 96, 128, 3)
    assert all(spec.motion == STILL for scene in scenes for spec in scene.shapes)
    assert all(spec.motion is None for text in captions for spec in parse(text).shapes)
    assert "still" in canonical(parse(MovingShapes(0, frames=1, style="short").sample(3).caption + " on a gray background"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed=-1"),
        ({"objects": ()}, r"objects=\(\)"),
        ({"objects": (1, 3)}, r"objects=\(1, 3\)"),
        ({"frames": 3}, "frames=3"),
        ({"height": 10}, "size 10x64"),
        ({"style": "loud"}, "style='loud'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MovingShapes(**options)


def test_indices_out_of_range():
    with pytest.raises(ValueError, match="index=-1"):
        MovingShapes().sample(-1)
    with pytest.raises(ValueError, match="count=0"):
        MovingShapes().batch(0, 0)


def drawn(emphasis, count=900):
    world = MovingShapes(3, emphasis=emphasis)
    return [world.describe(index)[0].shapes[0].motion for index in range(count)]


def test_emphasis_draws_some_motions_more_often():
    """Nine motions of four shapes, but a circle does not rotate: 3 of 35 parts, with factor 4 12 of 44."""
    motions = drawn({"rotates": 4})
    assert motions.count("rotates") / len(motions) == pytest.approx(12 / 44, abs=0.05)
    assert motions.count("grows") / len(motions) == pytest.approx(4 / 44, abs=0.03)
    assert not drawn({"rotates": 0}).count("rotates")


def test_without_emphasis_nothing_changes():
    plain, even = MovingShapes(3), MovingShapes(3, emphasis={})
    assert [plain.describe(i) for i in range(20)] == [even.describe(i) for i in range(20)]


@pytest.mark.parametrize(
    ("emphasis", "message"),
    [
        ({"flies": 2}, "'flies': 2.* maps motions .*rotates"),
        ({"grows": -1}, "'grows': -1.* at least 0"),
        ({"grows": float("nan")}, "at least 0"),
        (dict.fromkeys(MOTIONS, 0), "leaves no scene"),
    ],
)
def test_emphasis_that_is_not_possible(emphasis, message):
    with pytest.raises(ValueError, match=message):
        MovingShapes(emphasis=emphasis)
