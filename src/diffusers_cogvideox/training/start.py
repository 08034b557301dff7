"""The model that a run starts from: fresh, or weights of the same architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin

from .config import TrainConfig, check_keys

__all__ = ["start_model"]

Model = TypeVar("Model", bound=ModelMixin)


def start_model(cls: type[Model], config: TrainConfig, initialize: Callable[[Model], None] = lambda _: None) -> Model:
    """A `cls` of the run's config in training mode: from `init_from`, or made with the run's seed and `initialize`d.

    Raises:
        ValueError: for config keys that `cls` does not have, or that the weights to start from do not share.
    """
    torch.manual_seed(config.seed)
    if config.init_from:
        model = cls.from_pretrained(config.init_from)
        _check_same(config.model, model.config, config.init_from)
    else:
        check_keys("model", config.model, signature(cls).parameters)
        model = cls(**config.model)
        initialize(model)
    return model.train()


def _check_same(given: Mapping[str, Any], found: Mapping[str, Any], folder: str) -> None:
    """Raise ValueError where weights to start from (`found`, from `folder`) belong to another model than the one that is `given`."""
    for key, value in given.items():
        have = list(found[key]) if isinstance(found.get(key), tuple) else found.get(key)
        if have != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(
                f"model.{key}={value}, but the weights in {folder} have {key}={have}: make them equal, or leave init_from out."
            )
