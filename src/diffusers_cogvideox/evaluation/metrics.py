"""Measures of how far two videos are apart, without learned weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["psnr"]


def psnr(first: npt.NDArray[Any], second: npt.NDArray[Any], value_range: float) -> float:
    """Peak signal-to-noise ratio of two videos (F, H, W, 3), in dB; infinite for equal ones.

        PSNR = 10 log10(R^2 / MSE)

    with the mean squared error over the whole video, and R = `value_range`: 255 for bytes, 2 for values in [-1, 1], 1 for [0, 1].

    Raises:
        ValueError: for videos of different shape.
    """
    if first.shape != second.shape:
        raise ValueError(f"videos of shape {first.shape} and {second.shape} cannot be compared: they must be equal.")
    error = np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)
    return float(10 * np.log10(value_range**2 / error)) if error else float("inf")
