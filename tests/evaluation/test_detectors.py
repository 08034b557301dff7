"""The detector against clips whose content is known: clean, blurred and noisy; and what counts as success."""

import numpy as np
import pytest

from diffusers_cogvideox.data.captions import parse
from diffusers_cogvideox.data.moving_shapes import MovingShapes
from diffusers_cogvideox.data.rendering import render, rgb
from diffusers_cogvideox.data.scenes import Scene, ShapeSpec
from diffusers_cogvideox.evaluation.detectors import Detection, detect, score

ATTRIBUTES = ("color", "shape", "motion", "background", "all")


def accuracy(count, change=None, **options):
    """Share of held-out clips for which each attribute is measured right, after `change(video, rng)`."""
    data = MovingShapes(5, held_out=True, **options)
    results = []
    for clip in map(data.sample, range(count)):
        video = clip.video if change is None else change(clip.video, np.random.default_rng(0))
        results.append(score(detect(video), clip.scene))
    return {word: np.mean([result[word] for result in results]) for word in ATTRIBUTES}


def soften(video, rng):
    """What a small autoencoder does: a Gaussian blur of sigma 0.7 pixels, and noise."""
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 0.7**2))
    for axis in (1, 2):
        padded = np.pad(video, [(3, 3) if i == axis else (0, 0) for i in range(4)], mode="edge")
        shifted = (np.take(padded, range(k, k + video.shape[axis]), axis=axis) for k in range(7))
        video = sum(tap * part for tap, part in zip(taps / taps.sum(), shifted, strict=True))
    return video + rng.normal(0, 0.05, video.shape)


@pytest.mark.parametrize(("objects", "count"), [((1,), 200), ((2,), 100)])
def test_clean_clips(objects, count):
    assert min(accuracy(count, objects=objects).values()) >= 0.99


@pytest.mark.parametrize(("objects", "count"), [((1,), 60), ((2,), 60)])
def test_soft_and_noisy_clips(objects, count):
    assert min(accuracy(count, soften, objects=objects).values()) >= 0.97


@pytest.mark.parametrize(
    "size", [{"frames": 33, "height": 96, "width": 128}, {"frames": 5, "height": 256, "width": 192}, {"frames": 5}, {"frames": 1}]
)
def test_other_formats(size):
    assert min(accuracy(15, objects=(1, 2), **size).values()) >= 0.93


def test_eight_bit_video_is_read_like_floats():
    clip = MovingShapes(0).sample(3)
    assert detect(np.round((clip.video + 1) * 127.5).astype(np.uint8)) == detect(clip.video)


def test_a_turned_square_is_a_square_in_either_direction():
    scene = Scene("black", (ShapeSpec("square", "yellow", "rotates"),))
    video = render(scene, np.random.default_rng(0))
    for played in (video, video[::-1], video[:, ::-1], video[4:13]):
        assert detect(played) == Detection("black", scene.shapes)


def test_reversed_motion_is_opposite_motion():
    opposites = {
        "moves up": "moves down",
        "moves left": "moves right",
        "grows": "shrinks",
        "bounces": "bounces",
        "stays still": "stays still",
    }
    for motion, reverse in opposites.items():
        video = render(Scene("white", (ShapeSpec("triangle", "green", motion),)), np.random.default_rng(1))
        assert [detect(played).shapes[0].motion for played in (video, video[::-1])] == [motion, reverse]


def test_an_empty_clip_has_no_shapes():
    empty = np.broadcast_to(rgb("navy"), (9, 64, 64, 3))
    assert detect(empty) == Detection("navy", ())
    assert detect(empty + np.random.default_rng(0).normal(0, 0.05, empty.shape)) == Detection("navy", ())


def test_noise_without_a_scene_is_no_error():
    noise = np.random.default_rng(0).uniform(-1, 1, (9, 64, 64, 3))
    assert not score(detect(noise), Scene("gray", (ShapeSpec("circle", "red", "grows"),)))["all"]


def test_a_form_from_outside_the_world_has_no_name():
    ring = render(Scene("black", (ShapeSpec("circle", "red", "stays still"),)), np.random.default_rng(0))
    y, x = np.nonzero(np.abs(ring[0] - rgb("red")).max(axis=-1) < 0.1)
    rows, columns = np.mgrid[:64, :64]
    hole = np.hypot(rows - y.mean(), columns - x.mean()) < 0.75 * np.ptp(x) / 2
    ring[:, hole] = rgb("black")
    assert detect(ring).shapes == (ShapeSpec(None, "red", "stays still"),)


def test_a_shape_seen_only_briefly_does_not_count():
    video = render(Scene("black", (ShapeSpec("circle", "red", "stays still"),)), np.random.default_rng(0))
    video[6:] = rgb("black")
    assert detect(video).shapes == ()


RED = ShapeSpec("circle", "red", "moves right")
BLUE = ShapeSpec("square", "blue", "grows")


@pytest.mark.parametrize(
    ("shapes", "prompt", "expected"),
    [
        ((RED,), "a red circle moves right on a black background", dict.fromkeys(ATTRIBUTES, True)),
        ((RED,), "a red circle moves left", {"color": True, "shape": True, "motion": False, "all": False}),
        ((RED,), "a blue circle on a white background", {"color": False, "shape": True, "background": False, "all": False}),
        ((RED,), "a circle", {"shape": True, "all": True}),
        ((BLUE, RED), "a blue square grows and a red circle moves right", {"color": True, "shape": True, "motion": True, "all": True}),
        ((RED, BLUE), "a red square and a blue circle", {"color": True, "shape": False, "all": False}),
        ((RED, BLUE), "a red circle moves right", {"color": False, "shape": False, "motion": False, "all": False}),
        ((RED,), "a blue square and a red circle", {"color": False, "shape": False, "all": False}),
        ((), "a red circle", {"color": False, "shape": False, "all": False}),
        ((RED,), "a wall on a black background", {"background": True, "all": True}),
        ((RED,), "nothing of this world", {}),
    ],
)
def test_score_counts_what_is_asked(shapes, prompt, expected):
    assert score(Detection("black", Scene("black", shapes).shapes), parse(prompt)) == expected


@pytest.mark.parametrize("shape", [(64, 64, 3), (9, 3, 64, 64), (0, 64, 64, 3)])
def test_other_layouts_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(frames, height, width, 3\)"):
        detect(np.zeros(shape))


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        detect(np.full((5, 64, 64, 3), np.nan))
