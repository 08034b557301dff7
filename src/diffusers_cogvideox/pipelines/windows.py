"""Context windows: a long video is predicted piece by piece over the latent time axis, and the overlapping pieces are faded together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Geometry
from ..runtime.memory.workload import Workload

__all__ = ["SCHEDULES", "ContextWindows", "Window", "Windows", "context_of", "faded", "in_windows", "radical_inverse"]

SCHEDULES = ("uniform", "static")
"""Whether the places of the windows move from step to step."""


class Window(NamedTuple):
    """One piece of a video: the latent frames that it holds, (w,) int64, the weight of its prediction in each, (w,) float32, its prompt."""

    frames: Tensor
    weights: Tensor
    part: int = 0


def radical_inverse(n: int) -> float:
    """phi(n), the van der Corput sequence 0, 1/2, 1/4, 3/4, 1/8, 5/8, ...: the binary digits of n, mirrored at the point.

    Any run of its numbers is spread evenly over [0, 1).
    """
    value, digit = 0.0, 0.5
    while n:
        value, n, digit = value + digit * (n & 1), n >> 1, digit / 2
    return value


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Where the windows of a video lie at each step of the loop. All numbers count latent frames, padding included.

    Neighbours share `overlap` frames or more, the first window starts the video and the last one ends it. "static" windows stay
    where they are; "uniform" ones are moved at step i by the share phi(i) of their distance (`radical_inverse`), so that what is
    faded together lies elsewhere in every step, as in AnimateDiff-Evolved's context options.

    The transformer sees every window as a video of its own, at the same positions 0, 1, 2, ...: none is new to it, however long
    the whole is. Only the first window would then know of an image that a video starts from. So every later one keeps the `anchors`
    first frames of the video in front, in place of as many of its own, and its prediction for those is not used: the image
    stands where the model expects it, together with its own noisy latents, and never competes with what the video shows later.

    Where the video has several prompts, a window has the one that holds in most of what it shows, by weight, so that one prompt fades
    into the next as the windows do.

    Args:
        total: frames F of the video.
        length: frames w of a window.
        overlap: frames that two neighbours share at least.
        unit: all places are multiples of this (`patch_size_t`).
        anchors: frames at the beginning of the video that every window keeps.
        schedule: one of SCHEDULES.
        changes: frames at which the next prompt begins, rising.
    """

    total: int
    length: int
    overlap: int = 0
    unit: int = 1
    anchors: int = 0
    schedule: str = "uniform"
    changes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for windows that leave frames out."""
        if not max(self.anchors, 0) <= self.overlap < self.length:
            raise ValueError(
                f"Windows of {self.length} latent frames that share {self.overlap} cannot carry a video on from {self.anchors} frame(s) of "
                "an image: make the overlap larger, but smaller than a window."
            )

    def starts(self, step: int) -> list[int]:
        """First frame of every window at a step of the loop, rising."""
        stride, last = self.length - self.overlap, self.total - self.length
        shift = 0
        if self.schedule == "uniform":
            shift = int(radical_inverse(step) * (stride // self.unit)) * self.unit
        return sorted({0, *range(shift, last, stride), last})

    def at(self, step: int) -> list[Window]:
        """The windows at a step of the loop; the weights of all windows add up to one in every frame."""
        pieces = [self._piece(start) for start in self.starts(step)]
        sums = torch.zeros(self.total, dtype=torch.float64)
        for frames, weights in pieces:
            sums[frames] += weights
        return [self._window(frames, weights / sums[frames]) for frames, weights in pieces]

    @property
    def parts(self) -> int:
        """Number of prompts."""
        return len(self.changes) + 1

    def _window(self, frames: Tensor, weights: Tensor) -> Window:
        """A window with its prompt: of two that hold equally long in it, the earlier one."""
        parts = torch.bucketize(frames, torch.tensor(self.changes, dtype=frames.dtype), right=True)
        held = torch.zeros(self.parts, dtype=weights.dtype).index_add_(0, parts, weights)
        return Window(frames, weights.float(), int(held.argmax()))

    def _piece(self, start: int) -> tuple[Tensor, Tensor]:
        """Frames of one window, and a trapezoid over its own: 1, 2, ..., overlap + 1, ..., 2, 1."""
        kept = self.anchors if start else 0
        own = torch.arange(start + kept, start + self.length)
        rising = torch.arange(1, len(own) + 1, dtype=torch.float64)
        trapezoid = torch.minimum(rising, rising.flip(0)).clamp(max=self.overlap + 1)
        return torch.cat([torch.arange(kept), own]), torch.cat([trapezoid.new_zeros(kept), trapezoid])

    def reuse_noise(self, noise: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Noise (B, F, C, H, W) whose later frames are those of the first window, shuffled.

        FreeNoise (arXiv 2310.15169, section 4.2): with w frames in a window and a stride of S, the S frames from w + k S on are those
        from k S on in a random order. Each window of "static" places then holds the same noise as the first, in another order,
        which keeps what the windows show alike without repeating its motion.

        Args:
            noise: the noise that the loop starts from.
            generator: source of the order, one for all videos or one for each.
        """
        generators = generator if isinstance(generator, list) else [generator] * len(noise)
        return torch.stack([video[self._shuffled(source).to(video.device)] for video, source in zip(noise, generators, strict=True)])

    def _shuffled(self, generator: torch.Generator | None) -> Tensor:
        """Which frame's noise each frame takes, (F,) int64."""
        stride, device = self.length - self.overlap, generator.device if generator is not None else "cpu"
        order = torch.arange(self.length)
        while len(order) < self.total:
            leaving = order[-self.length :][:stride]
            order = torch.cat([order, leaving[torch.randperm(stride, generator=generator, device=device).cpu()]])
        return order[: self.total]


@dataclass(frozen=True, kw_only=True)
class ContextWindows:
    """A long video predicted in windows, for videos several times as long as a model was trained for in the memory of one window.

    A story in several prompts, `prompt={0: "a dog sits", 80: "the dog gets up"}`, says from which frame on each holds: a window has the one
    that holds in most of what it shows. A part of about a window or more gets time to show. `CogVideoXContinuationPipeline` makes a
    story's parts one after the other instead, and goes on from the last frames.

    Args:
        frames: frames of a window, 8k + 1; best as many as the model was trained with. A video within one window needs none.
        overlap: frames that two windows share, a multiple of 8; by default about a third of a window.
        schedule: "uniform" moves the windows from step to step, "static" leaves them where they are.
        shuffle_noise: start all windows from the noise of the first, in another order (`Windows.reuse_noise`).
    """

    frames: int
    overlap: int | None = None
    schedule: str = "uniform"
    shuffle_noise: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown schedule."""
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}.")

    def shared_frames(self, geometry: Geometry) -> int:
        """Frames that two windows share.

        Raises:
            ValueError: for frames or an overlap that cannot be cut from the latents of a video.
        """
        try:
            geometry.check_frames(self.frames)
        except ValueError as error:
            raise ValueError(f"Context windows of frames={self.frames} are not possible: {error}") from None
        step, shared = geometry.frame_step, self.overlap
        if shared is None:
            shared = step * max(1, self.frames // step // 3)
        if shared < 0 or shared % step:
            below = max(0, shared // step * step)
            raise ValueError(
                f"overlap={shared} of context windows is not possible: it must be a multiple of {step}, 0 or more. "
                f"Nearest legal: {below} or {below + step}."
            )
        if shared >= self.frames:
            raise ValueError(
                f"overlap={shared} leaves nothing new in context windows of {self.frames} frames: use longer windows, of as many frames "
                "as the model was trained with, or a shorter overlap."
            )
        return shared

    def over(self, total: int, geometry: Geometry, anchors: int = 0, changes: tuple[int, ...] = ()) -> Windows | None:
        """Windows over a video of `total` latent frames, padding included, or None when one window holds all of it.

        `anchors` first frames hold an image; they are rounded up to whole patches. At the latent frames `changes` the next prompt begins.
        Raises ValueError as `shared_frames` and for an overlap that is too small for the anchors.
        """
        shared, length = self.shared_frames(geometry), geometry.latent_frames(self.frames)
        length += geometry.front_padding(length)
        if total <= length:
            return None
        return Windows(
            total=total,
            length=length,
            overlap=geometry.latent_frames(1 + shared) - geometry.latent_frames(1),
            unit=geometry.patch_size_t,
            anchors=anchors + geometry.front_padding(anchors),
            schedule=self.schedule,
            changes=changes,
        )


def context_of(window: int | None) -> ContextWindows | None:
    """Context windows of so many frames that are otherwise as usual; None without."""
    return None if window is None else ContextWindows(frames=window)


def in_windows(work: Workload, context: ContextWindows | None, geometry: Geometry) -> Workload:
    """The same video in context windows: frames that a pass sees, and windows of a step, of which some have one fewer.

    Raises ValueError as `ContextWindows.shared_frames`.
    """
    if context is None:
        return work
    windows = context.over(work.latents(geometry)[0], geometry)
    return replace(work, seen_frames=context.frames, windows=len(windows.starts(1)) if windows else 1)


def faded(windows: list[Window], x: Tensor, predict: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Predictions for all frames, sum_k weight_k(f) predict(x[frames_k])(f), from one call of `predict` for each window.

    Args:
        windows: pieces of the video whose weights add up to one.
        x: (B, F, C, H, W).
        predict: (B, w, C, H, W), the window's prompt -> (B, w, C', H, W).

    Returns:
        (B, F, C', H, W).
    """
    total = torch.empty(0)
    for frames, weights, part in windows:
        index = frames.to(x.device)
        prediction = predict(x[:, index], part)
        if not total.numel():  # only now is C' known
            total = prediction.new_zeros(*x.shape[:2], *prediction.shape[2:])
        total[:, index] += weights.to(prediction)[:, None, None, None] * prediction
    return total
