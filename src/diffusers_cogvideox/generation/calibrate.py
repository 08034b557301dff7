"""The verb `calibrate`: what a checkpoint's blocks do from step to step, and what each feature cache costs in exactness, as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.captions import canonical
from ..data.moving_shapes import all_scenes, split
from ..files import check_writable
from ..models.tea_cache import timestep_embedding
from ..runtime.calibration import (
    CACHES,
    FILE,
    Calibration,
    CalibrationError,
    Measured,
    Residuals,
    Schedule,
    cache_config,
    latent_errors,
    strengths,
    summarize,
    weights_signature,
)
from ..runtime.effects import NoEffectError
from .calibrate_options import CalibrateOptions
from .model_folder import ModelFolder
from .settings import Settings, choose_settings, load_pipeline

__all__ = ["Passes", "calibrate", "measure_schedule"]

logger = logging.get_logger(__name__)

_DEGREE = 3  # of TeaCache's polynomial


def calibrate(options: CalibrateOptions) -> str:
    """The verb: measure, write the file. Returns a table and where the file is.

    Raises:
        ValueError, OSError: for a model or settings that are not possible, and for a file that exists already.
    """
    folder = ModelFolder.open(options.model)
    path = Path(options.output) if options.output else folder.path / FILE
    settings = choose_settings(options, folder)
    check_writable(path)
    known = _known(path, options.overwrite)
    pipe = load_pipeline(settings)
    pipe.set_progress_bar_config(disable=True)
    prompts = _prompts(options)
    names: tuple[str, ...] = options.caches or tuple(CACHES)
    size = (settings.num_frames, settings.height, settings.width)
    empty = Calibration(signature=weights_signature(pipe.transformer), size=size, videos=len(prompts))
    kept = [schedule for schedule in known.schedules if replace(known, schedules=()) == empty] if known else []
    schedule = measure_schedule(pipe, settings, prompts, options.seed, names)
    others = [other for other in kept if other.title != schedule.title]
    replace(empty, schedules=(*others, schedule)).save(path)
    return "\n".join([*_table(schedule), str(path)])


def _known(path: Path, overwrite: bool) -> Calibration | None:
    """What the file holds already; of the same weights, size and number of videos, other loops are kept.

    Raises FileExistsError for a file that may not be changed.
    """
    if not path.exists():
        return None
    if not overwrite:
        raise FileExistsError(f"{path} exists already: choose another --output, or add to it and replace what it has with --overwrite.")
    try:
        return Calibration.load(path)
    except CalibrationError:
        return None


def measure_schedule(pipe: Any, settings: Settings, prompts: Sequence[str], seed: int, names: Sequence[str]) -> Schedule:
    """Make a video of every prompt without a cache, then with each of the caches `names` at every strength."""
    recorder = _Recorder(pipe.transformer)
    with recorder.recording(), Passes(pipe.transformer).counting() as passes:
        exact = [_latents(pipe, settings, prompt, seed + n, recorder) for n, prompt in enumerate(tqdm(prompts, desc="without a cache"))]
    whole = passes.total / len(prompts) / settings.num_inference_steps  # of one pass
    sampler = getattr(pipe.scheduler, "algorithm_type", None) or type(pipe.scheduler).__name__
    steps, scale = settings.num_inference_steps, settings.guidance_scale
    loop: dict[str, Any] = {"steps": steps, "sampler": sampler, "guidance_scale": scale, "use_dynamic_cfg": settings.use_dynamic_cfg}
    schedule = Schedule(**loop, residuals=recorder.residuals())
    rows: list[Measured] = []
    for name in names:
        for strength in strengths(name, schedule):
            row = Measured(cache=name, strength=strength, passes=0.0, mean=0.0, largest=0.0, bound=0.0)
            rows += _measured(pipe, settings, prompts, seed, exact, whole, row, schedule)
    return replace(schedule, measured=tuple(rows))


def _measured(
    pipe: Any,
    settings: Settings,
    prompts: Sequence[str],
    seed: int,
    exact: Sequence[Tensor],
    whole: float,
    row: Measured,
    schedule: Schedule,
) -> list[Measured]:
    """The row with its figures; none for a strength at which the cache does nothing."""
    errors: list[float] = []
    pipe.transformer.enable_cache(cache_config(row, schedule))
    try:
        with Passes(pipe.transformer).counting() as passes:
            for number, prompt in enumerate(tqdm(prompts, desc=f"{row.cache} {row.strength:g}")):
                errors += latent_errors(_latents(pipe, settings, prompt, seed + number), exact[number])
    except NoEffectError:
        logger.info(f"{row.cache} at {row.strength:g} spares nothing.")
        return []
    finally:
        pipe.transformer.disable_cache()
    return [summarize(row.cache, row.strength, passes.total / len(prompts) / whole, errors)]


def _latents(pipe: Any, settings: Settings, prompt: str, seed: int, recorder: _Recorder | None = None) -> Tensor:
    """Latents (1, F, C, H, W) of one video."""
    if recorder:
        recorder.start()
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt=prompt, generator=generator, output_type="latent", **settings.call_arguments()).frames


def _prompts(options: CalibrateOptions) -> list[str]:
    """The first lines of the file of prompts; without one, sentences about one moving shape, of scenes that training may show."""
    if options.prompts_file:
        lines = [line.strip() for line in Path(options.prompts_file).read_text(encoding="utf-8").splitlines() if line.strip()]
        if len(lines) < options.prompts:
            raise ValueError(f"{options.prompts_file} holds {len(lines)} prompts, fewer than --prompts {options.prompts}.")
        return lines[: options.prompts]
    scenes = split(all_scenes(1))[0]
    order = np.random.default_rng(options.seed).permutation(len(scenes))
    return [canonical(scenes[order[number % len(order)]]) for number in range(options.prompts)]


def _table(schedule: Schedule) -> list[str]:
    """One line for each cache, those with the fewest passes last."""
    rows = sorted(schedule.measured, key=lambda row: -row.passes)
    lines = [f"{row.cache:<12}{row.strength:>8g}{row.passes:>9.1f}{row.mean:>10.4f}{row.largest:>10.4f}{row.bound:>10.4f}" for row in rows]
    return [schedule.title, f"{'cache':<12}{'strength':>8}{'passes':>9}{'error':>10}{'largest':>10}{'bound':>10}", *lines]


class Passes:
    """Counts what the blocks of a transformer compute while it runs: attention for a third and feed-forward networks for two thirds of a
    block, which is their share of the parameters, for each sample of the batch. Modulation and attention scores are left out.
    """

    def __init__(self, transformer: Any) -> None:
        self.total = 0.0
        self._blocks = list(transformer.transformer_blocks)

    @contextmanager
    def counting(self) -> Iterator[Passes]:
        """Count while the block runs; in `total`, a pass of one sample through all blocks is 1."""

        def counter(share: float) -> Any:
            def count(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
                self.total += share * len(args[0]) / len(self._blocks)

            return count

        handles = [block.attn1.to_out[0].register_forward_hook(counter(1 / 3)) for block in self._blocks]
        handles += [block.ff.net[-1].register_forward_hook(counter(2 / 3)) for block in self._blocks]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


class _Recorder:
    """What the blocks add to the video tokens in every step of some loops."""

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer
        self._before: dict[str, Tensor] = {}
        self._now: dict[str, Tensor] = {}
        self._step = 0
        self._rows: list[list[dict[str, float]]] = []

    def start(self) -> None:
        """Before each loop."""
        self._before, self._step = {}, 0
        self._rows.append([])

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record while the block runs."""
        blocks, now = self._transformer.transformer_blocks, self._now
        handles = [
            blocks[0].register_forward_pre_hook(lambda _m, _a, kwargs: now.update(tokens=kwargs["hidden_states"]), with_kwargs=True),
            blocks[0].register_forward_hook(lambda _m, _a, out: now.update(first=(out[0] - now["tokens"]).float())),
            blocks[-1].register_forward_hook(lambda _m, _a, out: now.update(residual=(out[0] - now.pop("tokens")).float())),
            self._transformer.register_forward_hook(lambda _m, _a, kwargs, _o: self._compare(kwargs["timestep"][:1]), with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, timestep: Tensor) -> None:
        embedding = timestep_embedding(self._transformer, timestep)
        now, before = {**self._now, "embedding": embedding}, self._before
        row = {"ratios": 1.0, "changes": 0.0, "first_block": 0.0, "embeddings": 0.0}
        if before:
            ratios = now["residual"].norm(dim=-1) / before["residual"].norm(dim=-1).clamp(min=1e-8)
            row = {
                "ratios": float(ratios.mean()),
                "changes": _relative(now["residual"], before["residual"]),
                "first_block": _relative(now["first"], before["first"]),
                "embeddings": _relative(now["embedding"], before["embedding"]),
            }
        self._rows[-1].append(row)
        self._before = now

    def residuals(self) -> Residuals:
        """Means over the loops."""
        means = {
            name: tuple(round(float(np.mean([row[name] for row in step])), 5) for step in zip(*self._rows, strict=True))
            for name in ("ratios", "changes", "first_block", "embeddings")
        }
        x, y = np.array(means["embeddings"][1:]), np.array(means["changes"][1:])
        degree = max(0, min(_DEGREE, len(x) - 2))
        coefficients = tuple(float(f"{value:.5g}") for value in np.polyfit(x, y, degree)) if len(x) else (1.0, 0.0)
        return Residuals(coefficients=coefficients, **means)


def _relative(now: Tensor, before: Tensor) -> float:
    """|now - before|_1 / |before|_1."""
    return float((now - before).abs().mean() / before.abs().mean())
