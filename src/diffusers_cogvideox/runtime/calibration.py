"""What feature caches cost a checkpoint in exactness, as it was measured: which cache keeps an error, and how it is set up.

The error of a cache is that of the latents at the end of the loop, |z_cached - z| / |z| in the Euclidean norm, for each video, with z those
of the same call without a cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor, nn

from ..files import atomic_path
from ..models.tea_cache import TeaCacheConfig

__all__ = [
    "CACHES",
    "FILE",
    "MAX_ERROR",
    "Calibration",
    "CalibrationError",
    "Measured",
    "Residuals",
    "Schedule",
    "cache_config",
    "latent_errors",
    "strengths",
    "summarize",
    "weights_signature",
]

FILE = "calibration.json"
"""Name of a calibration in a model folder."""

MAX_ERROR = 0.05
"""What a cache may change when nothing is said."""

_MARGIN = 1.5  # of the largest error seen: the tails are heavier than those of a log-normal distribution
_EARLY = 0.4  # of the steps: there a prompt decides between scenes, and a cache that leaves out steps may change its mind
_SPREADS = 3.0  # standard deviations of the logarithm of the error, between its mean and the predicted bound


class CalibrationError(ValueError):
    """A calibration that is missing, is another model's, or knows no cache that does what is asked for."""


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """What the blocks of a transformer do from step to step, mean over videos; one number for each step, the first one neutral.

    With r_i what all blocks together add to the video tokens (N, D), f_i what the first one adds, e_i the embedding of the timestep:
    """

    ratios: tuple[float, ...]
    """Mean over tokens of |r_i| / |r_(i-1)|, as MagCache takes them."""
    changes: tuple[float, ...]
    """|r_i - r_(i-1)|_1 / |r_(i-1)|_1."""
    first_block: tuple[float, ...]
    """|f_i - f_(i-1)|_1 / |f_(i-1)|_1, which FirstBlockCache compares with its threshold."""
    embeddings: tuple[float, ...]
    """|e_i - e_(i-1)|_1 / |e_(i-1)|_1, of which TeaCache takes a polynomial."""
    coefficients: tuple[float, ...]
    """That polynomial, highest power first: `changes` from `embeddings`, least squares."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One cache at one strength: computed passes of a loop, and the error over the videos."""

    cache: str
    strength: float
    passes: float
    """A pass with part of its layers counts in part, by parameters."""
    mean: float
    largest: float
    bound: float
    """Predicted for any video: exp(m + 3 s) with mean m and standard deviation s of log(error), and at least 1.5 times the largest."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A loop, as far as errors depend on it, and what was measured there."""

    steps: int
    sampler: str
    guidance_scale: float
    use_dynamic_cfg: bool = False
    residuals: Residuals
    measured: tuple[Measured, ...] = ()

    @property
    def title(self) -> str:
        """The loop in words."""
        return _title(self.steps, self.sampler, self.guidance_scale, self.use_dynamic_cfg)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """All that was measured of one checkpoint. `signature` is that of its weights, `size` (frames, height, width) that of the videos."""

    signature: tuple[float, ...]
    size: tuple[int, int, int]
    videos: int
    schedules: tuple[Schedule, ...] = field(default=())

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """The inverse of `save`.

        Raises:
            FileNotFoundError: there is no such file.
            CalibrationError: for a file that holds something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schedules = tuple(_read(Schedule, part, residuals=_read_residuals, measured=_read_measured) for part in content["schedules"])
            return cls(**{**content, "signature": tuple(content["signature"]), "size": tuple(content["size"]), "schedules": schedules})
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path} is not a calibration: `cogvideox calibrate MODEL --overwrite` makes it anew.") from error

    def check_weights(self, transformer: nn.Module) -> None:
        """Raise CalibrationError unless it was measured with these weights, in any precision."""
        ours, theirs = torch.tensor(weights_signature(transformer)), torch.tensor(self.signature)
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3):
            raise CalibrationError("the calibration was measured with other weights: run `cogvideox calibrate MODEL --overwrite`.")

    def choose(
        self, cache: str, max_error: float | None, *, steps: int, sampler: str, guidance_scale: float, use_dynamic_cfg: bool = False
    ) -> tuple[Schedule, Measured]:
        """The cache with the fewest passes whose predicted error is at most `max_error` (None is MAX_ERROR).

        `cache` is one of CACHES, or "auto" for any.

        Raises:
            CalibrationError: for a loop that was not measured, and for an error that no cache keeps.
        """
        max_error = MAX_ERROR if max_error is None else max_error
        wanted = _title(steps, sampler, guidance_scale, use_dynamic_cfg)
        schedule = next((known for known in self.schedules if known.title == wanted), None)
        if schedule is None:
            known = "; ".join(known.title for known in self.schedules)
            raise CalibrationError(
                f"caches were not measured for {wanted}, but for: {known}. Run `cogvideox calibrate MODEL --steps {steps} --overwrite` "
                "with your settings, or use these."
            )
        rows = [row for row in schedule.measured if cache in ("auto", row.cache)]
        if fitting := [row for row in rows if row.bound <= max_error]:
            return schedule, min(fitting, key=lambda row: (row.passes, row.bound))
        if not rows:
            raise CalibrationError(f"cache={cache!r} was not measured with {schedule.title}: `cogvideox calibrate MODEL --caches {cache}`.")
        least = min(row.bound for row in rows)
        raise CalibrationError(
            f"max_error={max_error:g} is not kept by cache={cache!r} with {schedule.title}: the smallest predicted error is {least:.3g}. "
            "Allow that much, or leave the cache out."
        )


def _title(steps: int, sampler: str, guidance_scale: float, use_dynamic_cfg: bool) -> str:
    dynamic = " and use_dynamic_cfg" if use_dynamic_cfg else ""
    return f"{steps} steps of {sampler} with guidance_scale={guidance_scale:g}{dynamic}"


def _read(cls: type, content: Mapping[str, Any], **parts: Callable[[Any], Any]) -> Any:
    return cls(**{name: parts[name](value) if name in parts else value for name, value in content.items()})


def _read_residuals(content: Mapping[str, Any]) -> Residuals:
    return Residuals(**{name.name: tuple(content[name.name]) for name in fields(Residuals)})


def _read_measured(content: Sequence[Mapping[str, Any]]) -> tuple[Measured, ...]:
    return tuple(Measured(**row) for row in content)


def weights_signature(transformer: Any) -> tuple[float, ...]:
    """Numbers that tell checkpoints apart: the first weights of the last LayerNorm, which no casting or quantisation touches."""
    weight = transformer.norm_final.weight
    return () if weight is None else tuple(round(value, 5) for value in weight.detach().flatten()[:16].float().tolist())


def latent_errors(cached: Tensor, exact: Tensor) -> list[float]:
    """|z_cached - z| / |z| of each video; latents (B, F, C, H, W)."""
    difference = (cached.float() - exact.float()).flatten(1).norm(dim=1)
    return (difference / exact.float().flatten(1).norm(dim=1)).tolist()


def summarize(cache: str, strength: float, passes: float, errors: Sequence[float]) -> Measured:
    """The errors of some videos as one row."""
    logs = torch.tensor(errors, dtype=torch.float64).clamp(min=1e-9).log()
    spread = float(logs.std(correction=1)) if len(errors) > 1 else 0.0
    bound = max(math.exp(float(logs.mean()) + _SPREADS * spread), _MARGIN * max(errors))
    numbers = (sum(errors) / len(errors), max(errors), bound)
    mean, largest, bound = (float(f"{number:.4g}") for number in numbers)
    return Measured(cache=cache, strength=strength, passes=round(passes, 2), mean=mean, largest=largest, bound=bound)


# --- the caches ---------------------------------------------------------------------------------------------------------


def _early_steps(schedule: Schedule) -> int:
    return math.ceil(_EARLY * schedule.steps)


def _mag(strength: float, schedule: Schedule) -> MagCacheConfig:
    ratios = list(schedule.residuals.ratios)
    return MagCacheConfig(threshold=strength, retention_ratio=_EARLY, mag_ratios=ratios, num_inference_steps=schedule.steps)


def _taylor(strength: float, schedule: Schedule) -> TaylorSeerCacheConfig:
    return TaylorSeerCacheConfig(
        cache_interval=int(strength),
        disable_cache_before_step=_early_steps(schedule),
        use_lite_mode=True,
        taylor_factors_dtype=torch.float32,
    )


def _tea(strength: float, schedule: Schedule) -> TeaCacheConfig:
    return TeaCacheConfig(threshold=strength, coefficients=schedule.residuals.coefficients, computed_first=_early_steps(schedule))


CACHES: dict[str, Callable[[float, Schedule], Any]] = {
    "first_block": lambda strength, _: FirstBlockCacheConfig(threshold=strength),
    "mag": _mag,
    "tea": _tea,
    "sea": lambda strength, _: SeaCacheConfig(threshold=strength),
    "taylor": _taylor,
    "broadcast": lambda strength, _: PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=int(strength)),
    "faster": lambda strength, _: FasterCacheConfig(unconditional_batch_skip_range=int(strength)),
}
"""The caches that a calibration knows: (strength, schedule) -> the config for `enable_cache`. Strengths are thresholds or intervals."""


def cache_config(row: Measured, schedule: Schedule) -> Any:
    """The config of a cache as it was measured."""
    return CACHES[row.cache](row.strength, schedule)


def strengths(cache: str, schedule: Schedule) -> list[float]:
    """Strengths worth measuring, from weak to strong: thresholds follow from the residuals."""
    residuals = schedule.residuals
    if cache == "first_block":
        return _quantiles(residuals.first_block[1:], (0.5,))
    if cache == "tea":
        return [round(factor * _quantiles(residuals.changes[1:], (0.5,))[0], 4) for factor in (1.2, 1.7)]
    if cache == "mag":
        return [round(factor * _quantiles([abs(1 - ratio) for ratio in residuals.ratios[1:]], (0.5,))[0], 4) for factor in (1.2,)]
    return {"sea": [0.08, 0.12], "taylor": [2.0, 3.0, 4.0]}.get(cache, [2.0])


def _quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    return sorted({round(float(ordered.quantile(share)), 4) for share in shares})
