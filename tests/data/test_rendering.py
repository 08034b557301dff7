"""Pixels against geometry: areas, places, sizes and angles measured without the detector."""

import numpy as np
import pytest

from diffusers_cogvideox.data.rendering import AREAS, coverage, render, rgb
from diffusers_cogvideox.data.scenes import COLORS, MOTIONS, SHAPES, Scene, ShapeSpec, all_scenes, can_show


def clip(motion, shape="square", seed=0, **size):
    return render(Scene("black", (ShapeSpec(shape, "red", motion),)), np.random.default_rng(seed), **size)


def cover(video):
    """(F, H, W) part of each pixel that a red shape on black covers."""
    black, red = rgb("black")[0], rgb("red")[0]
    return (video[..., 0] - black) / (red - black)


def centres(weights):
    """(F, 2) centre (x, y) of each frame."""
    height, width = weights.shape[1:]
    total = weights.sum(axis=(1, 2))
    return np.stack([weights.sum(axis=1) @ np.arange(width), weights.sum(axis=2) @ np.arange(height)], axis=1) / total[:, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_covered_area_is_the_area_of_the_shape(shape, angle):
    grid = np.arange(-64, 64, dtype=np.float32) + 0.3
    radius = 40.0
    area = coverage(shape, grid, grid[:, None], np.float32(radius), np.float32(angle)).sum()
    np.testing.assert_allclose(area, AREAS[shape] * radius**2, rtol=2e-3)


def test_areas_in_closed_form():
    assert AREAS["circle"] == pytest.approx(np.pi)
    assert AREAS["square"] == pytest.approx(2)
    assert AREAS["triangle"] == pytest.approx(1.299, abs=1e-3)
    # Outermost corner (a, 0.42 a) at distance 1; two bars of 2a x 0.84a share a square of side 0.84a.
    a = 1 / np.hypot(1, 0.42)
    assert AREAS["cross"] == pytest.approx(2 * (2 * a * 0.84 * a) - (0.84 * a) ** 2)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("moves right", 0, 1), ("moves left", 0, -1), ("moves up", 1, -1), ("moves down", 1, 1)]
)
def test_moves_go_straight_at_constant_speed(motion, axis, sign):
    for seed in range(5):
        steps = np.diff(centres(cover(clip(motion, seed=seed))), axis=0)
        assert 0.29 * 64 < sign * steps[:, axis].sum() < 0.43 * 64
        np.testing.assert_allclose(steps[:, axis], steps[0, axis], atol=0.04)
        np.testing.assert_allclose(steps[:, 1 - axis], 0, atol=0.04)


@pytest.mark.parametrize(("motion", "ratio"), [("grows", 4), ("shrinks", 1 / 4)])
def test_area_changes_fourfold(motion, ratio):
    area = cover(clip(motion)).sum(axis=(1, 2))
    assert area[-1] / area[0] == pytest.approx(ratio, rel=0.03)


def test_bounces_twice():
    height = -centres(cover(clip("bounces")))[:, 1]
    height -= height[0]
    np.testing.assert_allclose(height[[0, 8, 16]], 0, atol=0.02)
    assert height[4] == pytest.approx(height[12], abs=0.02)
    assert height[4] == max(height) and 0.6 * 0.29 * 64 < height[4] < 0.6 * 0.43 * 64


def test_rotation_turns_about_a_fixed_centre():
    weights = cover(clip("rotates", "triangle"))
    np.testing.assert_allclose(np.ptp(centres(weights), axis=0), 0, atol=0.1)
    angles = []
    for frame, (x, y) in zip(weights, centres(weights), strict=True):
        rows, columns = np.mgrid[:64, :64]
        angles.append(np.angle((frame * (columns - x + 1j * (rows - y)) ** 3).sum()))
    turn = np.rad2deg(np.diff(np.unwrap(angles))) / 3
    assert 90 - 1 < turn.sum() < 120 + 1
    np.testing.assert_allclose(turn, turn.mean(), atol=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_rest_is_the_same_frame_again(shape):
    video = clip("stays still", shape)
    assert (video == video[:1]).all()


@pytest.mark.parametrize("size", [{}, {"height": 96, "width": 128, "frames": 33}, {"height": 64, "width": 80, "frames": 5}])
@pytest.mark.parametrize("objects", [1, 2])
def test_shapes_stay_inside_and_apart(objects, size):
    scenes = all_scenes(objects)
    rng = np.random.default_rng(3)
    for scene in scenes[:: len(scenes) // 20]:
        video = render(scene, rng, **size)
        assert video.shape == (size.get("frames", 17), size.get("height", 64), size.get("width", 64), 3)
        assert video.dtype == np.float32
        assert np.abs(video).max() <= 1 + 1e-6
        background = rgb(scene.background)
        border = np.concatenate([video[:, [0, -1]].reshape(-1, 3), video[:, :, [0, -1]].reshape(-1, 3)])
        np.testing.assert_allclose(border, np.broadcast_to(background, border.shape), atol=0.25)  # a sharp corner may graze it
        # Every pure colour is there in every frame, whole: no shape hides another.
        for spec in scene.shapes:
            assert (np.abs(video - rgb(spec.color)).max(axis=-1) < 1e-5).any(axis=(1, 2)).all()


def test_no_pixel_mixes_two_shapes():
    scene = Scene("black", (ShapeSpec("square", "red", "moves up"), ShapeSpec("circle", "blue", "moves right")))
    video = render(scene, np.random.default_rng(0))
    basis = np.stack([rgb("red") - rgb("black"), rgb("blue") - rgb("black")])
    weights = (video - rgb("black")) @ np.linalg.pinv(basis)
    assert (np.minimum(weights[..., 0], weights[..., 1]) < 1e-5).all()


def test_every_shape_and_motion_renders():
    for shape in SHAPES:
        for motion in (m for m in MOTIONS if can_show(shape, m)):
            assert cover(clip(motion, shape)).sum() > 17 * 60


def test_shapes_are_told_apart_by_colour_words():
    assert all((np.abs(rgb(color)) <= 1).all() for color in COLORS)
    np.testing.assert_allclose(rgb("white"), 1)
    np.testing.assert_allclose(rgb("black"), -1)


def test_one_frame_shows_rest_only():
    assert clip("stays still", frames=1).shape == (1, 64, 64, 3)
    with pytest.raises(ValueError, match=r"one frame cannot show 'a red square moves up on a black background'.*frames >= 5"):
        clip("moves up", frames=1)


@pytest.mark.parametrize(
    ("size", "message"),
    [({"frames": 0}, "frames=0"), ({"frames": 4}, "at least 5"), ({"height": 16}, "size 16x64"), ({"width": 8}, "64x8")],
)
def test_formats_too_small_are_refused(size, message):
    with pytest.raises(ValueError, match=message):
        clip("grows", **size)


def test_what_cannot_be_seen_is_refused():
    with pytest.raises(ValueError, match=r"circle.*rotates"):
        clip("rotates", "circle")
    with pytest.raises(ValueError, match="incomplete"):
        render(Scene("black"), np.random.default_rng(0))
    many = tuple(ShapeSpec("circle", color, "grows") for color in ("red", "green", "blue"))
    with pytest.raises(ValueError, match="3 shapes"):
        render(Scene("black", many), np.random.default_rng(0))
