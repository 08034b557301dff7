"""What the verb `calibrate` can be told."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import get_args

from ..options import DEMO, CacheName, SamplingOptions, at_least

__all__ = ["CalibrateOptions"]


@dataclass(frozen=True)
class CalibrateOptions(SamplingOptions):
    """Measure what feature caches cost a model in exactness, for `generate --cache auto`.

    Makes a video of each prompt without a cache and with every cache at several strengths, and writes what the blocks of the transformer
    do from step to step, passes and errors to calibration.json in the model's folder (of a repository: in its local copy).
    """

    model: str = DEMO
    """Pipeline folder, repository on the Hugging Face hub, or "demo" for the small model that comes with the package."""
    _: KW_ONLY
    prompts: int = 16
    """Number of prompts, one video each."""
    prompts_file: str | None = None
    """Text file with one prompt per line (default: sentences about one moving shape)."""
    caches: tuple[CacheName, ...] = ()
    """Cache to measure; can be given several times (default: all)."""
    output: str | None = None
    """File to write (default: calibration.json in the model's folder)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, prompts=self.prompts)
        if unknown := sorted(set(self.caches) - set(get_args(CacheName))):
            raise ValueError(f"--caches {unknown[0]} is not possible: expected one of {', '.join(get_args(CacheName))}.")
