"""What a scheduler's configuration may say: known choices, values that are refused, and how other classes' configs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .noise import BETA_SCHEDULES, PREDICTION_TYPES, unknown_choice
from .timesteps import SPACINGS

__all__ = ["CHOICES", "INERT", "SOLVER_OF", "check_choice", "check_inert", "check_offset", "translate"]

CHOICES: dict[str, Sequence[str]] = {
    "algorithm_type": ("ddim", "dpmsolver++"),
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": PREDICTION_TYPES,
    "timestep_spacing": SPACINGS,
}
# Keys that stand in the published files but never had an effect, with the value that asks for nothing.
INERT: dict[str, Any] = {"clip_sample": False, "clip_sample_range": 1.0, "sample_max_value": 1.0}
# The family's classes and the one solver each has; diffusers' two classes go by the same names.
SOLVER_OF: dict[str, str | None] = {
    "CogVideoXScheduler": None,
    "CogVideoXDDIMScheduler": "ddim",
    "CogVideoXDPMScheduler": "dpmsolver++",
}


def check_choice(**options: str) -> None:
    """Raise ValueError for a value that is none of its option's choices."""
    for option, value in options.items():
        if value not in CHOICES[option]:
            raise unknown_choice(option, value, CHOICES[option])


def check_inert(**options: float) -> None:
    """Raise ValueError for a value of an INERT key that asks for something: latents are never clipped."""
    for option, value in options.items():
        if value != INERT[option]:
            raise ValueError(f"{option}={value} would have no effect: latents are never clipped. Pass {option}={INERT[option]}.")


def check_offset(offset: int, spacing: str) -> None:
    """Raise ValueError for an offset of timesteps that have nowhere to be shifted to."""
    if offset and spacing != "leading":
        raise ValueError(
            f"steps_offset={offset} would have no effect with timestep_spacing={spacing!r}: "
            "pass steps_offset=0 or timestep_spacing='leading'."
        )


def translate(config: Mapping[str, Any], reader: str, fixed_solver: str | None) -> dict[str, Any]:
    """The config of any scheduler in the words of class `reader`, whose solver may be fixed.

    `clip_sample` of diffusers' CogVideoX classes is dropped: True is their default, and they never look at it.
    `algorithm_type` is taken from the class name where that decides, and dropped where it names a solver of others.
    Raises ValueError for `thresholding=True`, which is for pixels.
    """
    if config.get("thresholding"):
        raise ValueError("thresholding=True would have no effect: latents have no fixed range. Set it to False in the config.")
    # An object that was never loaded has no class name in its config; this key tells the family.
    origin = config.get("_class_name", reader if "snr_shift_scale" in config else None)
    dropped = {"algorithm_type", "clip_sample"} if origin in SOLVER_OF else {"algorithm_type"}
    translated = {key: value for key, value in config.items() if key not in dropped}
    algorithm = SOLVER_OF.get(origin) or config.get("algorithm_type")
    if fixed_solver is None and algorithm in CHOICES["algorithm_type"]:
        translated["algorithm_type"] = algorithm
    return translated
