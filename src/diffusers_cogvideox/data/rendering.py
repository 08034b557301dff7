"""Draw a scene: where each shape is at each moment, and how much of each pixel it covers (signed distance functions)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .captions import canonical
from .scenes import BACKGROUNDS, COLORS, STILL, Scene, ShapeSpec, can_show

__all__ = ["AREAS", "FPS", "FRAMES", "MIN_MOVING_FRAMES", "MIN_SIZE", "SIZE", "check_format", "coverage", "render", "rgb"]

Array = npt.NDArray[np.floating[Any]]

FPS = 8
FRAMES = 17
SIZE = 64  # pixels
MIN_SIZE = 32  # pixels; below, a cross is a blob
MIN_MOVING_FRAMES = 5  # fewer cannot show two bounces

_ARM = 0.42  # width of the arms of a cross, as a part of its extent
# Area of each shape = this * radius^2.
AREAS: Mapping[str, float] = {
    "circle": np.pi,
    "square": 2.0,
    "triangle": 3 * 3**0.5 / 4,
    "cross": 4 * _ARM * (2 - _ARM) / (1 + _ARM**2),
}

_MARGIN = 2 / 64  # of the smaller side: shapes keep this distance from the border
_RADIUS = {1: (13 / 64, 17 / 64), 2: (7 / 64, 9 / 64)}  # number of shapes -> circumscribed radius, of the smaller side
_EDGE = 2.0  # pixels over which a shape fades out: soft enough for an 8x8 times smaller latent to hold it
_TRAVEL = (0.30, 0.42)  # of the side along which a shape moves
_BOUNCE = 0.6  # a bounce is this part of the way of a move: it is run through four times
_SPREAD = 0.25  # of the room there is, how far from the middle a path may lie
_TURN = (90.0, 120.0)  # degrees, clockwise
_DIRECTIONS = {"moves right": (1, 0), "moves left": (-1, 0), "moves up": (0, -1), "moves down": (0, 1), "bounces": (0, -1)}


class Box(NamedTuple):
    """A part of the frame that one shape does not leave, in pixels; y points down."""

    left: float
    top: float
    right: float
    bottom: float


class Path(NamedTuple):
    """Centre (x, y) in pixels, circumscribed radius in pixels and clockwise angle in radians of one shape, each (F,)."""

    x: Array
    y: Array
    radius: Array
    angle: Array


def rgb(name: str) -> Array:
    """(3,) colour of a word from COLORS or BACKGROUNDS, in [-1, 1]."""
    return np.asarray({**COLORS, **BACKGROUNDS}[name], np.float32) / 127.5 - 1


def check_format(frames: int, height: int, width: int) -> None:
    """Raise ValueError unless a scene can be seen at this number of frames and of pixels."""
    if frames != 1 and frames < MIN_MOVING_FRAMES:
        raise ValueError(f"frames={frames} is not possible: 1 for a still picture, otherwise at least {MIN_MOVING_FRAMES}.")
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"size {height}x{width} (height x width) is too small to tell shapes apart: at least {MIN_SIZE}x{MIN_SIZE}.")


# --- shapes -------------------------------------------------------------------------------------------------------------


def _distance(shape: str, u: Array, v: Array, radius: Array) -> Array:
    """Signed distance (pixels, negative inside) from points (u, v) in the shape's own upright frame.

    Polygons use the largest distance to a side, which is exact along the sides and sharp at the corners.
    """
    if shape == "circle":
        return np.sqrt(u * u + v * v) - radius
    if shape == "triangle":  # three sides at distance R / 2 from the centre, one at the bottom
        return np.maximum(v, np.abs(u) * np.float32(3**0.5 / 2) - v / 2) - radius / 2
    u, v = np.abs(u), np.abs(v)
    far = np.maximum(u, v)
    if shape == "square":
        return far - radius / np.float32(2**0.5)
    arm = radius / np.float32((1 + _ARM**2) ** 0.5)  # (arm, _ARM * arm) is the outermost corner of a cross
    return np.maximum(far - arm, np.minimum(u, v) - np.float32(_ARM) * arm)


def coverage(shape: str, dx: Array, dy: Array, radius: Array, angle: Array) -> Array:
    """Part of a pixel that the shape covers, 0..1: a linear ramp `_EDGE` pixels wide around its outline.

    (dx, dy) is the pixel's place relative to the centre of the shape, y down; radius (circumscribed) in pixels, angle clockwise in
    radians. The arrays broadcast against each other.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    return np.clip(np.float32(0.5) - _distance(shape, cos * dx + sin * dy, cos * dy - sin * dx, radius) / np.float32(_EDGE), 0, 1)


# --- motion -------------------------------------------------------------------------------------------------------------


def _path(spec: ShapeSpec, box: Box, radius: float, rng: np.random.Generator, frames: int, size: tuple[int, int]) -> Path:
    """A path of `spec` that stays inside `box`. `size` is (height, width) of the frame, in pixels."""
    t = np.linspace(0, 1, frames, dtype=np.float32)
    scale = {"grows": 1 + t, "shrinks": 2 - t}.get(str(spec.motion), np.full_like(t, 2**0.5)) / np.float32(2**0.5)
    progress = np.abs(np.sin(2 * np.pi * t)) if spec.motion == "bounces" else t
    reach = radius * float(scale.max()) + _MARGIN * min(size)
    low = np.array([box.left + reach, box.top + reach])
    room = np.array([box.right - reach, box.bottom - reach]) - low
    near, far = 0.5 - _SPREAD, 0.5 + _SPREAD
    travel, turn, *start = rng.uniform([_TRAVEL[0], _TURN[0], near, near], [_TRAVEL[1], _TURN[1], far, far])
    if spec.motion == "bounces":
        travel *= _BOUNCE
    length = np.minimum(travel * np.array(size[::-1]), room) * _DIRECTIONS.get(str(spec.motion), (0, 0))
    # A start from which the whole way fits, and which keeps it near the middle of the box.
    origin = low - np.minimum(length, 0) + np.array(start) * (room - np.abs(length))
    x, y = (origin[axis] + length[axis] * progress for axis in (0, 1))
    angle = np.deg2rad(turn) * t if spec.motion == "rotates" else np.zeros_like(t)
    return Path(*(values.astype(np.float32) for values in (x, y, radius * scale, angle)))


def _boxes(scene: Scene, rng: np.random.Generator, height: int, width: int) -> list[Box]:
    """One part of the frame per shape: all of it, or one half each, cut so that most motions keep their full way."""
    if len(scene.shapes) == 1:
        return [Box(0, 0, width, height)]
    ways = np.abs([_DIRECTIONS.get(str(spec.motion), (0, 0)) for spec in scene.shapes]).sum(axis=0)  # (sideways, up or down)
    side_by_side = ways[1] > ways[0] or (ways[1] == ways[0] and rng.random() < 0.5)
    if side_by_side:
        halves = [Box(0, 0, width / 2, height), Box(width / 2, 0, width, height)]
    else:
        halves = [Box(0, 0, width, height / 2), Box(0, height / 2, width, height)]
    return halves if rng.random() < 0.5 else halves[::-1]


def _covered(shape: str, path: Path, height: int, width: int) -> Array:
    """(F, H, W) part of every pixel that the shape covers on its path."""
    x, y, radius, angle = (values[:, None, None] for values in path)
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return coverage(shape, columns + np.float32(0.5) - x, rows + np.float32(0.5) - y, radius, angle)


def _check_scene(scene: Scene, frames: int) -> None:
    """Raise ValueError unless this many frames can show the scene."""
    name = canonical(scene)
    if len(scene.shapes) not in _RADIUS:
        raise ValueError(f"{name!r} has {len(scene.shapes)} shapes: there is room for {' or '.join(map(str, _RADIUS))}.")
    for spec in scene.shapes:
        if not can_show(spec.shape, spec.motion):
            raise ValueError(f"{name!r} cannot be seen: a {spec.shape} that {spec.motion} looks like one at rest. Choose another motion.")
    if frames == 1 and any(spec.motion != STILL for spec in scene.shapes):
        raise ValueError(f"one frame cannot show {name!r}: give frames >= {MIN_MOVING_FRAMES}, or a scene in which every shape {STILL}.")


def render(scene: Scene, rng: np.random.Generator, *, frames: int = FRAMES, height: int = SIZE, width: int = SIZE) -> Array:
    """A clip (F, H, W, 3) in [-1, 1] of a complete scene; `rng` decides sizes, places and speeds.

    Every pixel is a mixture of the background and the shapes, weighted by how much of it each covers. One frame shows shapes at
    rest only. Raises ValueError for an incomplete scene, a shape that cannot be seen doing what it should, a size too small.
    """
    check_format(frames, height, width)
    _check_scene(scene, frames)
    boxes = _boxes(scene, rng, height, width)
    radii = [float(rng.uniform(*_RADIUS[len(boxes)])) * min(height, width) for _ in boxes]
    paths = [_path(spec, box, radius, rng, frames, (height, width)) for spec, box, radius in zip(scene.shapes, boxes, radii, strict=True)]
    covers = [_covered(str(spec.shape), path, height, width) for spec, path in zip(scene.shapes, paths, strict=True)]
    weights = np.stack([*covers, 1 - sum(covers[1:], start=covers[0])])
    palette = np.stack([*(rgb(str(spec.color)) for spec in scene.shapes), rgb(str(scene.background))])
    return (weights.reshape(len(palette), -1).T @ palette).reshape(frames, height, width, 3)
