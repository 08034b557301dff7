"""An endless, deterministic data set of captioned clips of moving shapes, with whole combinations held out."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .captions import canonical, caption, check_style
from .rendering import FPS, FRAMES, SIZE, check_format, render
from .scenes import MOTIONS, STILL, Scene, ShapeSpec, all_scenes

__all__ = ["FPS", "Clip", "MovingShapes", "Scene", "ShapeSpec", "all_scenes", "is_held_out", "render", "split"]

_HELD_OUT = 0.12


class Clip(NamedTuple):
    """One sample: video (F, H, W, 3) float32 in [-1, 1], what is said about it, and what it shows."""

    video: npt.NDArray[np.float32]
    caption: str
    scene: Scene


def is_held_out(scene: Scene) -> bool:
    """Whether a complete scene belongs to the held-out 12 %: decided by a hash of its canonical sentence, the same for ever."""
    digest = hashlib.sha256(canonical(scene).encode()).digest()
    return int.from_bytes(digest[:4], "big") < _HELD_OUT * 2**32


def split(scenes: Iterable[Scene]) -> tuple[list[Scene], list[Scene]]:
    """Split scenes into (train, held_out); the order is kept, and each scene always lands on the same side."""
    parts: tuple[list[Scene], list[Scene]] = ([], [])
    for scene in scenes:
        parts[is_held_out(scene)].append(scene)
    return parts


@functools.cache
def _sides(objects: int, still: bool) -> tuple[list[Scene], list[Scene]]:
    """The (train, held_out) scenes that samples are drawn from: only those with all shapes at rest where `still`."""
    return split(s for s in all_scenes(objects) if not still or all(spec.motion == STILL for spec in s.shapes))


def _chances(pool: Sequence[Scene], emphasis: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Upper ends (N,) of the shares of [0, 1) in which each scene is drawn."""
    for motion, factor in emphasis.items():
        if motion not in MOTIONS or not 0 <= factor < math.inf:
            raise ValueError(
                f"emphasis={{{motion!r}: {factor}}} is not possible: it maps motions ({', '.join(MOTIONS)}) to factors of at least 0."
            )
    weights = np.array([math.prod(emphasis.get(str(spec.motion), 1.0) for spec in scene.shapes) for scene in pool])
    if not weights.any():
        raise ValueError(f"emphasis={dict(emphasis)} leaves no scene to draw: give at least one motion a factor above 0.")
    return np.append(np.cumsum(weights)[:-1] / weights.sum(), 1.0)


class MovingShapes:
    """Captioned clips by index: sample i depends on (seed, i) and the options alone, so any number of workers can share it.

    objects: how many shapes a scene may hold, (1,), (2,) or (1, 2); each count is drawn equally often.
    held_out: the combinations kept for evaluation instead of those for training.
    frames, height, width: format of the clips; `frames=1` gives pictures of shapes at rest.
    style: style of the captions, see `captions.caption`; by default "any" for videos, "still" for pictures.
    emphasis: how many times as often as without it a scene is drawn for each shape in it that has this motion, {"rotates": 3}.

    Raises ValueError where an option is outside its range.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        objects: Sequence[int] = (1,),
        held_out: bool = False,
        frames: int = FRAMES,
        height: int = SIZE,
        width: int = SIZE,
        style: str | None = None,
        emphasis: Mapping[str, float] | None = None,
    ) -> None:
        if seed < 0:
            raise ValueError(f"seed={seed} is not possible: it must be 0 or more.")
        if not objects or set(objects) - {1, 2}:
            raise ValueError(f"objects={tuple(objects)} is not possible: name one or more of 1 and 2.")
        if style is not None:
            check_style(style)
        check_format(frames, height, width)
        self.seed = seed
        self.frames, self.height, self.width = frames, height, width
        self.style = style or ("still" if frames == 1 else "any")
        self.pools = [_sides(count, still=frames == 1)[held_out] for count in objects]
        self.chances = [_chances(pool, emphasis) for pool in self.pools] if emphasis else None

    def describe(self, index: int, wording: np.random.Generator | None = None) -> tuple[Scene, str]:
        """Scene and caption of sample `index` without drawing it; `wording` picks another paraphrase than the sample's own."""
        rng = self._rng(index)
        scene = self._scene(rng)
        return scene, caption(scene, rng if wording is None else wording, self.style)

    def sample(self, index: int) -> Clip:
        """Sample number `index` >= 0."""
        rng = self._rng(index)
        scene = self._scene(rng)
        text = caption(scene, rng, self.style)
        return Clip(render(scene, rng, frames=self.frames, height=self.height, width=self.width), text, scene)

    def _rng(self, index: int) -> np.random.Generator:
        if index < 0:
            raise ValueError(f"index={index} is not possible: samples are numbered from 0, without end.")
        return np.random.default_rng((self.seed, index))

    def _scene(self, rng: np.random.Generator) -> Scene:
        number = int(rng.integers(len(self.pools)))
        pool = self.pools[number]
        place = rng.integers(len(pool)) if self.chances is None else np.searchsorted(self.chances[number], rng.random(), side="right")
        return pool[place]

    def batch(self, start: int, count: int) -> tuple[npt.NDArray[np.float32], list[str], list[Scene]]:
        """Samples start .. start + count - 1 as (videos (B, F, H, W, 3), captions, scenes)."""
        if count < 1:
            raise ValueError(f"count={count} is not possible: a batch holds at least one sample.")
        videos = np.empty((count, self.frames, self.height, self.width, 3), np.float32)
        captions, scenes = [], []
        for place in range(count):
            videos[place], text, scene = self.sample(start + place)
            captions.append(text)
            scenes.append(scene)
        return videos, captions, scenes
