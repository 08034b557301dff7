"""Timestep grids: which of the T training timesteps a sampling run visits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from .noise import unknown_choice

__all__ = ["SPACINGS", "check_timesteps", "shorten", "spaced_timesteps"]

SPACINGS = ("leading", "linspace", "trailing")


def spaced_timesteps(spacing: str, steps: int, train_steps: int, offset: int = 0) -> list[int]:
    """Decreasing grid of `steps` = n training timesteps below `train_steps` = T (arXiv:2305.08891, table 2).

    trailing: round(T - i T / n) - 1, starts at the noisiest level; leading: i (T // n) + offset, reversed;
    linspace: n equal steps from T - 1 to 0, both included. Raises ValueError unless 1 <= n <= T.

    >>> spaced_timesteps("trailing", 4, 1000), spaced_timesteps("leading", 4, 1000), spaced_timesteps("linspace", 4, 1000)
    ([999, 749, 499, 249], [750, 500, 250, 0], [999, 666, 333, 0])
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(f"num_inference_steps={steps} is not possible: choose 1 to {train_steps} (num_train_timesteps).")
    if spacing == "trailing":
        # For some n rounding lets arange run one value too far; it would be timestep -1.
        grid = np.round(np.arange(train_steps, 0, -train_steps / steps))[:steps] - 1
    elif spacing == "leading":
        grid = np.arange(steps)[::-1] * (train_steps // steps) + offset
    elif spacing != "linspace":
        raise unknown_choice("timestep_spacing", spacing, SPACINGS)
    elif steps == 1:
        grid = np.array([train_steps - 1])  # a single step has to start from pure noise
    else:
        grid = np.linspace(0, train_steps - 1, steps).round()[::-1]
    return [int(t) for t in grid]


def shorten(grid: list[int]) -> str:
    """A grid as an error message shows it."""
    return str(grid) if len(grid) <= 20 else f"[{grid[0]}, {grid[1]}, ..., {grid[-1]}]"


def check_timesteps(grid: list[int], train_steps: int) -> list[int]:
    """Return `grid`, or raise ValueError unless it decreases strictly from below `train_steps` to 0 or above."""
    if not grid or grid[0] >= train_steps or grid[-1] < 0 or any(now <= after for now, after in pairwise(grid)):
        raise ValueError(f"timesteps={shorten(grid)} are not possible: they must decrease and lie in 0 ... {train_steps - 1}.")
    return grid
