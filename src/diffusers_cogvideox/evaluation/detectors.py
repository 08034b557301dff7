"""Measure what a clip of moving shapes shows (background, shapes, colours, motions) and compare it with what was asked.

No learned weights. A pixel at the edge of a shape mixes two colours; unmixing gives the part w of it that the shape covers, and sums over
these parts measure the shape to a fraction of a pixel (z = x + iy):

    area A = sum w,   centre c = sum w z / A,   moments m_n = sum w (z - c)^n

The phase of m_n turns n times as fast as a shape with n-fold symmetry. As z^n is harmonic, an isotropic blur changes neither A nor m_n,
which makes them dependable on the soft pictures of a small autoencoder. Area and phase fix the size and angle of each candidate shape;
the one whose drawing differs least from w is recognised. Motions are trends of centre, area and angle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..data.rendering import AREAS, coverage, rgb
from ..data.scenes import BACKGROUNDS, COLORS, SHAPES, STILL, Scene, ShapeSpec

__all__ = ["Detection", "detect", "score"]

Array = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]

_WORKING_SIZE = 64  # pixels: larger videos are averaged down to about this; the pixel counts below refer to it
_CONTRAST = 0.35  # Euclidean distance from the background, of colours in [-1, 1], that makes a pixel part of a shape
_PURITY = 0.85  # part of the largest contrast nearby that makes a pixel of a shape part of its core
_EDGE = 4  # pixels that may lie between the core of a shape and its blurred outline
_MIN_AREA = 0.003  # of the frame: less is a speck
_MAX_MISMATCH = 0.4  # of the area: what differs more from every shape of the world is none of them
# What counts as a motion; a motion is recognised when it reaches its threshold, the one furthest above it wins.
_MIN_MOVE = 0.09  # of the smaller side of the frame
_MIN_SCALING = 1.3  # ratio of the radii at the two ends
_MIN_TURN = np.deg2rad(35.0)
_MIN_BOUNCE = 0.05  # of the smaller side: a reversal counts when the shape came this far since the last one

_SYMMETRIES = {"circle": (0, 0.0), "square": (4, np.pi), "triangle": (3, np.pi / 2), "cross": (4, 0.0)}  # n, phase of m_n when upright
_ATTRIBUTES = ("color", "shape", "motion")


class Detection(NamedTuple):
    """What a clip shows: the name of its background and its shapes, in the order of COLORS; a form like none of SHAPES is None."""

    background: str
    shapes: tuple[ShapeSpec, ...]


class Track(NamedTuple):
    """One shape over time: (F,) measures of each frame, then (N,) the pixels that it covers, in all frames where it is visible."""

    visible: Mask
    area: Array  # pixels
    x: Array  # centre, pixels
    y: Array  # pixels, downwards
    frame: npt.NDArray[np.intp]
    dx: Array  # from the centre, pixels
    dy: Array
    weights: Array  # covered part, 0..1


# --- pixels -------------------------------------------------------------------------------------------------------------


def _prepare(video: npt.NDArray[Any]) -> Array:
    """The video as float32 in [-1, 1], averaged over square blocks down to the working size."""
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"a video of shape {tuple(video.shape)} cannot be measured: expected (frames, height, width, 3).")
    video = video / np.float32(127.5) - 1 if video.dtype == np.uint8 else video.astype(np.float32, copy=False)
    if not np.isfinite(video).all():
        raise ValueError("the video holds values that are not finite (NaN or infinity): it cannot be measured.")
    block = min(video.shape[1:3]) // _WORKING_SIZE
    if block < 2:
        return video
    rows, columns = video.shape[1] // block, video.shape[2] // block
    cropped = video[:, : rows * block, : columns * block]
    return cropped.reshape(len(video), rows, block, columns, block, 3).mean(axis=(2, 4))


def _nearest(colors: Array, palette: Mapping[str, Any]) -> npt.NDArray[np.intp]:
    """(N,) position in the palette of the colour nearest to each of (N, 3) colours."""
    entries = np.stack([rgb(word) for word in palette])
    return np.argmin((entries**2).sum(axis=1) - 2 * colors @ entries.T, axis=1)


def _name(color: Array, palette: Mapping[str, Any]) -> str:
    """The word for one colour (3,)."""
    return list(palette)[_nearest(color[None], palette)[0]]


def _border_median(video: Array) -> Array:
    """(3,) median colour of the outermost two pixels of all frames."""
    sides = (video[:, :2], video[:, -2:], video[:, :, :2], video[:, :, -2:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)


def _grow(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(F, H, W) with each value replaced by the largest among itself and its neighbours (3 x 3); grows a mask by one pixel."""
    rows = values.copy()
    np.maximum(rows[:, 1:], values[:, :-1], out=rows[:, 1:])
    np.maximum(rows[:, :-1], values[:, 1:], out=rows[:, :-1])
    grown = rows.copy()
    np.maximum(grown[:, :, 1:], rows[:, :, :-1], out=grown[:, :, 1:])
    np.maximum(grown[:, :, :-1], rows[:, :, 1:], out=grown[:, :, :-1])
    return grown


def _separate(video: Array, contrast: Array) -> Iterator[tuple[Array, Mask]]:
    """Yield (colour (3,), region (F, H, W)) of each shape, the largest first. `contrast` (F, H, W) is the distance from the background.

    A blurred edge can have the colour of another word (red on white is pink). So only cores are told apart by colour: pixels about as far
    from the background as any near them, which the mixtures at an edge are not. They are then grown back to the outline.
    """
    foreground = contrast > _CONTRAST
    foreground = _grow(~_grow(~foreground)) & foreground  # without specks and threads narrower than three pixels
    near = contrast
    for _ in range(_EDGE):
        near = _grow(near)
    core = foreground & (contrast > _PURITY * near)
    names = np.full(core.shape, -1, np.int8)
    names[core] = _nearest(video[core], COLORS)
    for name in np.argsort(-np.bincount(names[core], minlength=len(COLORS))):
        seed = names == name
        if seed.sum() < _MIN_AREA / 8 * seed.size:
            break
        region = seed
        for _ in range(_EDGE):
            region = _grow(region) & foreground
        names[region] = -1
        foreground = foreground & ~region
        yield np.median(video[seed], axis=0), _grow(region)


# --- one shape over time ------------------------------------------------------------------------------------------------


def _totals(frame: npt.NDArray[np.intp], values: npt.NDArray[Any], frames: int) -> npt.NDArray[Any]:
    """(F,) sums, frame by frame, of (N,) real or complex values of pixels."""
    real = np.bincount(frame, values.real, frames).astype(np.float64)
    return real + 1j * np.bincount(frame, values.imag, frames) if np.iscomplexobj(values) else real


def _track(video: Array, background: Array, color: Array, region: Mask) -> Track:
    """Unmix `color` from `background` inside the region, and measure the shape frame by frame."""
    frame, row, column = np.nonzero(region)
    contrast = color - background
    weights = np.clip((video[frame, row, column] - background) @ contrast / (contrast @ contrast), 0, 1).astype(np.float64)
    area = _totals(frame, weights, len(video))
    visible = area > _MIN_AREA * region[0].size
    x, y = (_totals(frame, weights * (place + 0.5), len(video)) / np.where(visible, area, 1) for place in (column, row))
    kept = visible[frame]
    frame, row, column, weights = frame[kept], row[kept], column[kept], weights[kept]
    return Track(visible, area, x, y, frame, column + 0.5 - x[frame], row + 0.5 - y[frame], weights)


def _angles(track: Track, shape: str) -> Array:
    """(F,) clockwise angle in radians of the shape, if it is `shape`: continuous over the visible frames, 0 where it has none."""
    fold, upright = _SYMMETRIES[shape]
    if fold == 0:
        return np.zeros(len(track.area))
    moments = _totals(track.frame, track.weights * (track.dx + 1j * track.dy) ** fold, len(track.area))
    angles = np.zeros(len(track.area))
    angles[track.visible] = (np.unwrap(np.angle(moments[track.visible])) - upright) / fold
    return angles


def _mismatch(track: Track, shape: str) -> float:
    """Part of the covered area that differs when `shape` is drawn with the measured centre, area and angle."""
    radius, angle = np.sqrt(track.area / AREAS[shape])[track.frame], _angles(track, shape)[track.frame]
    drawn = coverage(shape, *(values.astype(np.float32) for values in (track.dx, track.dy, radius, angle)))
    return float(np.abs(track.weights - drawn).sum() / track.weights.sum())


def _trend(values: Array) -> float:
    """Change from the first to the last of (N,) evenly spaced values, N >= 2, by a least-squares line."""
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    return float(steps @ values / (steps @ steps) * (len(values) - 1))


def _reversals(values: Array, step: float) -> int:
    """How often (N,) values turn round after rising or falling by at least `step`."""
    count, direction = 0, 0
    low = high = values[0]
    for value in values:
        low, high = min(low, value), max(high, value)
        if direction != 1 and value - low >= step:
            count, direction, high = count + (direction == -1), 1, value
        elif direction != -1 and high - value >= step:
            count, direction, low = count + (direction == 1), -1, value
    return count


def _motion(track: Track, shape: str, side: int) -> str:
    """The motion of a shape, in a frame whose smaller side has `side` pixels: the trend furthest above its threshold, or STILL."""
    seen = track.visible
    if seen.sum() < 2:
        return STILL
    right, down = (_trend(places[seen]) / (_MIN_MOVE * side) for places in (track.x, track.y))
    growth = _trend(np.log(track.area[seen])) / 2 / np.log(_MIN_SCALING)
    bouncing = _reversals(track.y[seen], _MIN_BOUNCE * side) >= 2
    strengths = {
        "moves right": right,
        "moves left": -right,
        "moves down": down,
        "moves up": -down,
        "grows": growth,
        "shrinks": -growth,
        "rotates": abs(_trend(_angles(track, shape)[seen])) / _MIN_TURN,
        "bounces": np.ptp(track.y[seen]) / (_MIN_BOUNCE * side) if bouncing else 0,
    }
    best = max(strengths, key=lambda motion: strengths[motion])
    return best if strengths[best] >= 1 else STILL


# --- the whole clip -----------------------------------------------------------------------------------------------------


def detect(video: npt.NDArray[Any]) -> Detection:
    """Measure a clip (F, H, W, 3), floats in [-1, 1] or uint8. A clip without shapes gives `shapes=()`; one frame shows STILL.

    Raises ValueError for another shape of array and for values that are not finite.
    """
    video = _prepare(np.asarray(video))
    background = _border_median(video)
    difference = video - background
    contrast = np.sqrt(np.einsum("fhwc,fhwc->fhw", difference, difference))
    found = []
    for color, region in _separate(video, contrast):
        track = _track(video, background, color, region)
        if 2 * track.visible.sum() > len(video):
            mismatch, shape = min((_mismatch(track, shape), shape) for shape in SHAPES)
            motion = _motion(track, shape, min(video.shape[1:3]))
            found.append(ShapeSpec(shape if mismatch < _MAX_MISMATCH else None, _name(color, COLORS), motion))
    name = _name(background, BACKGROUNDS)
    return Detection(name, Scene(name, tuple(found)).shapes)


def _agreement(found: Sequence[ShapeSpec], wanted: Sequence[ShapeSpec]) -> dict[str, bool]:
    """Per attribute that is asked: whether every wanted shape has it, when wanted shapes are paired with found ones in this order."""
    asked = {word: [(getattr(f, word), getattr(w, word)) for f, w in zip(found, wanted, strict=True)] for word in _ATTRIBUTES}
    pairs = {word: [(has, wants) for has, wants in values if wants is not None] for word, values in asked.items()}
    return {word: all(has == wants for has, wants in values) for word, values in pairs.items() if values}


def score(detection: Detection, wanted: Scene) -> dict[str, bool]:
    """Whether a clip shows what was asked: "color", "shape", "motion", "background" as far as `wanted` says them, and "all".

    Shapes are paired so that most attributes agree; an attribute is right when it is right for every wanted shape. A clip with another
    number of shapes has none of them right: in a heap of coloured blobs, something always matches. Returns an empty dict when nothing
    is asked.
    """
    count = len(wanted.shapes)
    found = detection.shapes if len(detection.shapes) == count else [ShapeSpec()] * count
    pairings = (_agreement(order, wanted.shapes) for order in itertools.permutations(found, count))
    result = max(pairings, key=lambda agreement: sum(agreement.values()))
    if wanted.background is not None:
        result["background"] = detection.background == wanted.background
    if result or wanted.shapes:
        result["all"] = all(result.values()) and count in (0, len(detection.shapes))
    return result
