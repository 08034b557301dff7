"""One video with several prompts: which of them holds where, and how their embeddings stand together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import Tensor

from ..geometry import Geometry

__all__ = ["check_starts", "joined_parts", "part_of", "starts_of"]


def starts_of(prompt: Any) -> tuple[int, ...]:
    """The frames at which the prompts of {0: text, 48: text, ...} begin, rising; () for what is no mapping.

    Raises:
        TypeError: for a key that is no frame, or a value that is no text.
        ValueError: for a mapping that says nothing of frame 0, or of frames before it.
    """
    if not isinstance(prompt, Mapping):
        return ()
    for start, text in prompt.items():
        if not isinstance(start, Integral) or isinstance(start, bool) or not isinstance(text, str):
            raise TypeError(
                f"prompt={{{start!r}: {text!r:.80}}} is not possible: prompts by frame are texts by whole numbers, {{0: text}}."
            )
    starts = tuple(sorted(prompt))
    if not starts or starts[0] != 0:
        raise ValueError(f"prompts by frame must begin with frame 0, and the first is that of {starts[0] if starts else 'none'}: add 0.")
    return starts


def check_starts(starts: Sequence[int], num_frames: int, window: int | None, geometry: Geometry) -> None:
    """Raise ValueError for prompts from `starts` on that a video of `num_frames`, in context windows of `window` frames, cannot have."""
    if not starts:
        return
    if starts[-1] >= num_frames:
        raise ValueError(
            f"the prompt from frame {starts[-1]} on begins after the end: the video has {num_frames} frames, 0 to {num_frames - 1}."
        )
    if len(starts) > 1 and (window is None or geometry.padded_frames(num_frames) <= window):
        fits = "" if window is None else f" shorter than its {num_frames} frames (they have {window})"
        raise ValueError(
            f"a video with {len(starts)} prompts needs context windows{fits}, each of which has one of them: pass "
            "context=ContextWindows(frames=...), on the command line --window, and ask for a video that is longer than a window. On the "
            "command line, [FRAME:] in a prompt begins another one: write \\[FRAME:] where that is not meant."
        )


def joined_parts(embeds: Tensor, videos: int = 1) -> Tensor:
    """Embeddings (K, L, D_text) of the K prompts of one video, one behind the other on the token axis, for B videos: (B, K L, D_text)."""
    return embeds.flatten(0, 1).expand(videos, -1, -1)


def part_of(embeds: Tensor, part: int, parts: int) -> Tensor:
    """Embeddings (B, L, D_text) of one of the `parts` = K prompts, from those of all, (B, K L, D_text)."""
    return embeds.unflatten(1, (parts, -1))[:, part]
