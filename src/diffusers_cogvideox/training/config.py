"""What a training run is: one dataclass per part; its fields are the YAML keys, the CLI flags, the defaults and the help."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DataOptions", "Optimisation", "Stage", "TrainConfig", "check_keys"]

# Options that only some tasks read.
_READ_BY = {
    "vae": ("transformer",),
    "text_encoder": ("transformer",),
    "scheduler": ("transformer",),
    "init_from": ("vae", "transformer"),
    "frozen": ("vae", "transformer"),
    "channels_last": ("vae",),
    "evaluate_prompts": ("transformer",),
    "data.clips": ("transformer",),
    "data.emphasis": ("vae", "transformer"),
    "stages.crop": ("vae",),
}


# The smallest value of whole numbers.
_LEAST = {"seed": 0, "checkpoint_every": 1, "keep_checkpoints": 1, "evaluate_prompts": 0, "log_every": 1}


def check_keys(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for keys of the mapping `kind` that nothing reads."""
    known = sorted(known)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{kind} has no key {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of progressive training: how long, how many clips at once, how large they are."""

    steps: int
    """Optimiser steps."""
    batch_size: int
    """Clips per step and process."""
    frames: int = 17
    """Frames of a clip, 8k+1; 1 trains on images."""
    crop: int | None = None
    """Side in pixels of a random square crop (VAE only); the whole picture when absent."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"stages: steps={self.steps} and batch_size={self.batch_size} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the clips come from: the procedural world of moving shapes."""

    seed: int = 0
    """Seed of the world; clip i depends on (seed, i) only."""
    objects: tuple[int, ...] = (1,)
    """How many shapes a scene has, drawn with equal chance from these."""
    height: int = 64
    """Pixels."""
    width: int = 64
    """Pixels."""
    clips: int | None = None
    """Number of different clips (transformer: these are encoded once, before training); unlimited when absent."""
    emphasis: dict[str, float] = field(default_factory=dict)
    """How many times as often each motion is drawn, such as {rotates: 3}."""

    def __post_init__(self) -> None:
        if self.clips is not None and self.clips < 1:
            raise ValueError(f"data.clips={self.clips} is not possible: it must be at least 1.")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW, optionally Muon, with linear warm-up and cosine decay over all stages, and a moving average of the weights."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float | None = None
    """Peak learning rate of Muon, which then trains the weight matrices; AdamW trains all when absent."""
    final_learning_rate: float = 0.02
    """Learning rate at the end as a share of the peak."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's moment decays (paper table 6)."""
    weight_decay: float = 1e-4
    """Decoupled weight decay (paper table 6)."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm (paper table 6)."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is saved as the model."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    task: Literal["vae", "text_encoder", "transformer"]
    """Which model to train, and so which objective."""
    output: str
    """Run folder: checkpoints, metrics.jsonl, the resolved configuration, and the trained model in final/."""
    model: dict[str, Any]
    """The model's config.json keys; with `init_from`, only those to change (in_channels: 2C shows the model the first frame, 2C + 1 the
    first, or first and last, and a mask) or to insist on."""
    stages: list[Stage]
    """Stages, in order."""
    vae: str | None = None
    """Folder of the trained VAE (transformer only)."""
    text_encoder: str | None = None
    """Folder of the trained text encoder and its tokenizer (transformer only)."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """The noise schedule's config keys where they differ from CogVideoX-5B's (transformer only)."""
    init_from: str | None = None
    """Folder of weights to start from instead of a fresh initialisation."""
    frozen: tuple[str, ...] = ()
    """Parts of the model that keep the weights of `init_from`, by name. [encoder] trains the decoder of a VAE alone: its latents, and so
    the transformers trained on them, stay as they are."""
    data: DataOptions = field(default_factory=DataOptions)
    optimisation: Optimisation = field(default_factory=Optimisation)
    objective: dict[str, float] = field(default_factory=dict)
    """Weights and rates of the task's objective: kl_weight and l1_weight (VAE); text_dropout, balance, and for models that are shown
    an image image_dropout and last_image (transformer)."""
    seed: int = 0
    """Seed of initialisation and noise."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Arithmetic of forward and backward; weights and optimiser stay fp32."""
    channels_last: bool = False
    """Keep convolution weights and activations channels-last: faster for bf16 convolutions."""
    compile: bool = False
    """Compile the objective with torch.compile."""
    checkpoint_every: int = 500
    """Steps between checkpoints; a run resumes exactly from the newest one when started again."""
    keep_checkpoints: int = 2
    """How many checkpoints to keep."""
    evaluate_prompts: int = 0
    """At every checkpoint, measure the averaged weights on this many held-out prompts (transformer only)."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        """Raise ValueError for a run without stages, for numbers that are too small, and for options that this task does not read."""
        if not self.stages:
            raise ValueError("stages is empty: name at least one, such as {steps: 1000, batch_size: 8}.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not possible: it must be at least {least}.")
        given = {name: getattr(self, name, None) for name in _READ_BY}
        given |= {
            "data.clips": self.data.clips,
            "data.emphasis": self.data.emphasis,
            "stages.crop": any(stage.crop for stage in self.stages),
        }
        for name, value in given.items():
            if value and self.task not in _READ_BY[name]:
                raise ValueError(
                    f"{name} has no effect when the {self.task} is trained, only for: {', '.join(_READ_BY[name])}. Leave it out."
                )

    def objective_options(self, **defaults: float) -> dict[str, float]:
        """`objective` over its defaults; ValueError for keys that the objective does not have."""
        check_keys("objective", self.objective, defaults)
        return defaults | self.objective

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that contains optimiser step `step`, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(f"step {step} lies beyond the last stage")
