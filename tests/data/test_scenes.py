"""The words of the world and all their combinations."""

import itertools

import numpy as np
import pytest

from diffusers_cogvideox.data.scenes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, ShapeSpec, all_scenes


def test_one_shape_scenes_are_every_visible_combination_once():
    scenes = all_scenes(1)
    words = {(s.background, s.shapes[0].shape, s.shapes[0].color, s.shapes[0].motion) for s in scenes}
    expected = {w for w in itertools.product(BACKGROUNDS, SHAPES, COLORS, MOTIONS) if (w[1], w[3]) != ("circle", "rotates")}
    assert words == expected
    assert len(scenes) == len(expected) == 6 * 8 * (4 * 9 - 1)


def test_two_shape_scenes_are_distinct_and_differ_in_colour_and_form():
    scenes = all_scenes(2)
    # 28 pairs of colours; 6 ordered pairs of forms with a circle (8 * 9 motions), 6 without (9 * 9)
    assert len(scenes) == 6 * 28 * (6 * 72 + 6 * 81) == len(set(scenes))
    for first, second in (scene.shapes for scene in scenes[::97]):
        assert first.color != second.color and first.shape != second.shape


def test_order_is_deterministic():
    assert all_scenes(1) == all_scenes(1)
    assert all_scenes(1)[0] == Scene("black", (ShapeSpec("circle", "red", "moves right"),))


def test_a_scene_does_not_depend_on_the_order_of_its_shapes():
    a, b = ShapeSpec("circle", "pink", "grows"), ShapeSpec("cross", "red", "rotates")
    assert Scene("navy", (a, b)) == Scene("navy", (b, a))
    assert Scene("navy", (ShapeSpec("circle"), b)).shapes[0] == b  # what has no colour comes last


def test_colours_are_well_apart():
    palette = {**COLORS, **BACKGROUNDS}
    assert len(palette) == len(COLORS) + len(BACKGROUNDS)
    distances = {(a, b): np.linalg.norm(np.subtract(palette[a], palette[b])) for a, b in itertools.combinations(palette, 2)}
    assert min(distances.values()) >= 90
    assert min(distance for (a, b), distance in distances.items() if a in COLORS and b in BACKGROUNDS) >= 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: all_scenes(3), "objects=3"),
        (lambda: ShapeSpec("hexagon"), "shape='hexagon'.*circle, square, triangle, cross"),
        (lambda: ShapeSpec(color="black"), "color='black'"),
        (lambda: ShapeSpec(motion="flies"), "motion='flies'"),
        (lambda: Scene("red"), "background='red'"),
    ],
)
def test_words_from_outside_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
