"""What can be said about a clip of moving shapes: the words of the world, their colours, and every combination of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["BACKGROUNDS", "COLORS", "MOTIONS", "SHAPES", "STILL", "Scene", "ShapeSpec", "all_scenes", "can_show"]

RGB = tuple[int, int, int]

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")

# 0..255. Any two of the fourteen colours are at least 90 apart (Euclid), so that a blurred clip still tells them apart.
COLORS: Mapping[str, RGB] = {
    "red": (220, 20, 40),
    "green": (40, 190, 50),
    "blue": (50, 90, 255),
    "yellow": (255, 235, 40),
    "orange": (255, 130, 0),
    "purple": (150, 40, 210),
    "cyan": (60, 225, 245),
    "pink": (255, 130, 200),
}
BACKGROUNDS: Mapping[str, RGB] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "brown": (120, 65, 20),
    "navy": (15, 20, 110),
    "teal": (0, 110, 110),
}

STILL = "stays still"
MOTIONS: tuple[str, ...] = (
    "moves right",
    "moves left",
    "moves up",
    "moves down",
    "grows",
    "shrinks",
    "rotates",
    "bounces",
    STILL,
)

_COLOR_ORDER = {color: rank for rank, color in enumerate(COLORS)}


def _check_word(kind: str, value: str | None, words: Mapping[str, RGB] | tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is None or one of `words`."""
    if value is not None and value not in words:
        raise ValueError(f"{kind}={value!r} is not part of the world: choose one of {', '.join(words)} (or None for 'not said').")


def can_show(shape: str | None, motion: str | None) -> bool:
    """Whether this shape can be seen doing this: a turning circle looks like a resting one."""
    return not (shape == "circle" and motion == "rotates")


@dataclass(frozen=True, slots=True)
class ShapeSpec:
    """One shape, its colour and what it does. None means "not said" (only in a scene read from a free prompt)."""

    shape: str | None = None
    color: str | None = None
    motion: str | None = None

    def __post_init__(self) -> None:
        _check_word("shape", self.shape, SHAPES)
        _check_word("color", self.color, COLORS)
        _check_word("motion", self.motion, MOTIONS)


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and the shapes in front of it; the order of the shapes carries no meaning, so it is always that of COLORS."""

    background: str | None = None
    shapes: tuple[ShapeSpec, ...] = ()

    def __post_init__(self) -> None:
        _check_word("background", self.background, BACKGROUNDS)
        ordered = sorted(self.shapes, key=lambda spec: _COLOR_ORDER.get(spec.color or "", len(COLORS)))
        object.__setattr__(self, "shapes", tuple(ordered))

    @property
    def complete(self) -> bool:
        """Whether everything is said, so that the scene can be rendered."""
        said = [self.background, *(word for spec in self.shapes for word in (spec.shape, spec.color, spec.motion))]
        return bool(self.shapes) and None not in said


def _shape_groups(objects: int) -> Iterator[tuple[ShapeSpec, ...]]:
    """Every way to fill a scene with `objects` shapes: no colour and no shape twice, each pair in one order only."""
    spec = functools.cache(ShapeSpec)
    for colors in itertools.combinations(COLORS, objects):
        for shapes in itertools.permutations(SHAPES, objects):
            for motions in itertools.product(MOTIONS, repeat=objects):
                if all(map(can_show, shapes, motions)):
                    yield tuple(map(spec, shapes, colors, motions))


@functools.cache
def _scenes(objects: int) -> tuple[Scene, ...]:
    """All scenes of this many shapes."""
    groups = list(_shape_groups(objects))
    return tuple(Scene(background, shapes) for background in BACKGROUNDS for shapes in groups)


def all_scenes(objects: int = 1) -> list[Scene]:
    """All scenes of `objects` shapes (1 or 2), in a fixed order: 1680 with one shape, 154 224 with two.

    Two shapes in a scene differ both in colour and in form. Raises ValueError for another number of objects.
    """
    if objects not in (1, 2):
        raise ValueError(f"objects={objects} is not possible: a scene holds 1 or 2 shapes.")
    return list(_scenes(objects))
