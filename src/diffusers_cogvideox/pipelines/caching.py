"""`cache="auto"`: the feature cache of one call, chosen from a calibration of the checkpoint, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..runtime.calibration import CACHES, FILE, Calibration, CalibrationError, cache_config, latent_errors
from .guidance import Interval

__all__ = ["CacheReport", "check_cache", "find_calibration", "with_cache"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What `cache=...` came to in a call; `pipe.cache_report`."""

    config: Any
    """As for `transformer.enable_cache`."""
    name: str
    strength: float | None = None
    passes: float | None = None
    """Computed passes that were predicted, of `steps`."""
    steps: int
    predicted: float | None = None
    """Error |z_cached - z| / |z| of the final latents that was predicted, an upper bound for any video."""
    measured: tuple[float, ...] | None = None
    """That error of each video, where measure_error=True asked for it."""


def check_cache(cache: Any, max_error: float | None, measure_error: bool, guidance_interval: Interval, eta: float) -> None:
    """Raise ValueError for a combination of these arguments of a call that is not possible."""
    if cache is None:
        if max_error is not None or measure_error:
            raise ValueError("max_error and measure_error have no effect without a cache: pass cache='auto' too.")
        return
    if isinstance(cache, str):
        if cache not in ("auto", *CACHES):
            raise ValueError(f"cache={cache!r} is unknown: use 'auto', one of {', '.join(CACHES)}, or a config of diffusers' caches.")
        if max_error is not None and not 0 < max_error < float("inf"):
            raise ValueError(f"max_error={max_error} is not possible: it must be above 0, and finite.")
        if guidance_interval != (0.0, 1.0) or eta:
            raise ValueError(
                f"the errors of cache={cache!r} were measured with guidance in all steps, and eta=0: leave guidance_interval and eta out, "
                "or pass a config, cache=TaylorSeerCacheConfig(...)."
            )
    elif max_error is not None:
        raise ValueError(f"max_error has no effect on a config, which is taken as it is: pass cache='auto' or a name, not {cache!r}.")


def find_calibration(pipe: Any) -> Calibration:
    """The pipeline's calibration: `pipe.calibration` where that is set, else the file in the folder that the transformer came from.

    Raises:
        CalibrationError: there is none, or it is another model's.
    """
    calibration = pipe.calibration
    if calibration is None:
        origin = getattr(pipe.transformer.config, "_name_or_path", None)  # the folder of the transformer, inside that of the pipeline
        path = Path(origin).parent / FILE if origin else None
        if path is None or not path.is_file():
            raise CalibrationError(
                f"cache='auto' needs a calibration, and there is no {path or FILE} of this model: run `cogvideox calibrate MODEL`, or set "
                "pipe.calibration = Calibration.load(path)."
            )
        calibration = Calibration.load(path)
    calibration.check_weights(pipe.transformer)
    return calibration


def with_cache(pipe: Any, request: Any, steps: int, run: Callable[..., Tensor]) -> Tensor:
    """`run()`, a denoise loop that gives latents (B, F, C, H, W), with the cache that the request asks for; sets `pipe.cache_report`.

    Raises:
        ValueError: a cache is on already, or none fits; see `find_calibration` and `Calibration.choose`.
    """
    pipe.cache_report = None
    if request.cache is None:
        return run()
    if getattr(pipe.transformer, "is_cache_enabled", False):
        raise ValueError("cache=... chooses a cache for this call, and one is on already: call pipe.transformer.disable_cache() first.")
    if request.measure_error and request.generator is None:
        raise ValueError("measure_error=True makes the video twice from the same noise: pass a generator.")
    report = _chosen(pipe, request, steps)
    states = [generator.get_state() for generator in _sources(request.generator)]
    with _enabled(pipe.transformer, report.config):
        latents = run()
    measured = None
    if request.measure_error:
        for generator, state in zip(_sources(request.generator), states, strict=True):
            generator.set_state(state)
        measured = tuple(latent_errors(latents, run(again=True)))
        if report.predicted is not None and max(measured) > report.predicted:
            logger.warning(f"the cache's error is {max(measured):.3g}, more than the {report.predicted:.3g} that were predicted.")
    pipe.cache_report = CacheReport(**{**vars(report), "measured": measured})
    return latents


def _chosen(pipe: Any, request: Any, steps: int) -> CacheReport:
    if not isinstance(request.cache, str):
        return CacheReport(config=request.cache, name=type(request.cache).__name__, steps=steps)
    if request.use_dynamic_cfg == "progress":
        raise CalibrationError("caches were not measured with use_dynamic_cfg='progress': use True or False, or pass a config.")
    scheduler = pipe.scheduler
    sampler = getattr(scheduler, "algorithm_type", None) or type(scheduler).__name__
    calibration = find_calibration(pipe)
    loop = {"steps": steps, "sampler": sampler, "guidance_scale": request.guidance_scale, "use_dynamic_cfg": bool(request.use_dynamic_cfg)}
    schedule, row = calibration.choose(request.cache, request.max_error, **loop)
    size = (request.num_frames, request.height, request.width)
    where = "" if size == calibration.size else f" at {' x '.join(map(str, calibration.size))}, where it was measured"
    logger.info(
        f"cache={request.cache!r} is {row.cache} at {row.strength:g}: {row.passes:g} of {steps} passes, "
        f"an error of at most {row.bound:.3g}{where}."
    )
    config = cache_config(row, schedule)
    return CacheReport(config=config, name=row.cache, strength=row.strength, passes=row.passes, steps=steps, predicted=row.bound)


def _sources(generator: torch.Generator | list[torch.Generator] | None) -> list[torch.Generator]:
    return generator if isinstance(generator, list) else [] if generator is None else [generator]


@contextmanager
def _enabled(transformer: Any, config: Any) -> Iterator[None]:
    transformer.enable_cache(config)
    try:
        yield
    finally:
        transformer.disable_cache()
