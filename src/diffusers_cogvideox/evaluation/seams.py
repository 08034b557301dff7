"""Seams: whether a video that was put together changes more where its parts meet than elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["frame_changes", "seam_ratio", "seam_ratios", "worst_ratio"]


def frame_changes(video: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """How much each frame differs from the one before, (F - 1,): c_f = sqrt(mean (x_f - x_(f-1))^2) for f = 1 ... F - 1.

    Args:
        video: (F, H, W, 3), of any range of values; the changes are in the same unit.
    """
    frames = video.astype(np.float64)
    return np.sqrt(((frames[1:] - frames[:-1]) ** 2).mean(axis=(1, 2, 3)))


def seam_ratio(video: npt.NDArray[Any], seam: int, reach: int = 4) -> float:
    """How much more a video changes where two parts meet than around that place; 1 means no seam. See `seam_ratios`."""
    return seam_ratios(video, [seam], reach)[0]


def seam_ratios(video: npt.NDArray[Any], seams: Sequence[int], reach: int = 4) -> list[float]:
    """For each seam s, the change into frame s divided by the typical change around it:

        r_s = c_s / median {c_f : 0 < |f - s| <= reach, f not a seam},    c_f as in `frame_changes`

    The median keeps other sudden events nearby from hiding a seam. Where nothing else moves, r_s is 1 if frame s does not move
    either, and infinite if it does.

    Args:
        video: (F, H, W, 3).
        seams: for each place where two parts meet, the first frame of the second part, 1 ... F - 1.
        reach: frames to each side that count as around.

    Raises:
        ValueError: for a seam outside the video, or without any other change around it.
    """
    changes = frame_changes(video)
    unknown = [seam for seam in seams if not 1 <= seam <= len(changes)]
    if unknown:
        raise ValueError(f"seams {unknown} are not in a video of {len(video)} frames: a seam is the later part's first frame.")
    return [_ratio(changes, seam, set(seams), reach) for seam in seams]


def worst_ratio(video: npt.NDArray[Any], reach: int = 4) -> float:
    """The largest `seam_ratio` of all frames: what is left of seams in a video whose parts were faded into each other."""
    changes = frame_changes(video)
    return max(_ratio(changes, frame, {frame}, reach) for frame in range(1, len(changes) + 1))


def _ratio(changes: npt.NDArray[np.float64], seam: int, seams: set[int], reach: int) -> float:
    around = [changes[f - 1] for f in range(max(1, seam - reach), min(len(changes), seam + reach) + 1) if f not in seams | {seam}]
    if not around:
        raise ValueError(f"there is no change around frame {seam} to compare with: make reach={reach} larger, or name fewer seams.")
    own, typical = float(changes[seam - 1]), float(np.median(around))
    if typical == 0:
        return 1.0 if own == 0 else float("inf")
    return own / typical
