"""The model that a run starts from: fresh, or weights of the same architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin

from .config import TrainConfig, check_keys

__all__ = ["check_folders", "start_model"]

Model = TypeVar("Model", bound=ModelMixin)


def check_folders(config: TrainConfig) -> None:
    """Raise FileNotFoundError for models of the run that are not there; their loaders would look for them on the hub."""
    for option in ("init_from", "vae", "text_encoder"):
        folder = getattr(config, option)
        if folder is not None and not Path(folder).is_dir():
            raise FileNotFoundError(f"{option}: there is no folder {folder}. Train that model first, or correct the path.")


def start_model(cls: type[Model], config: TrainConfig, initialize: Callable[[Model], None] = lambda _: None) -> Model:
    """A `cls` of the run's config in training mode: from `init_from`, or made with the run's seed and `initialize`d.

    Raises:
        ValueError: for config keys that `cls` does not have, or that the weights to start from do not share, and for frozen parts that
            `cls` does not have, or that would leave nothing to train.
        FileNotFoundError: for a folder that is not there.
    """
    check_folders(config)
    torch.manual_seed(config.seed)
    if config.init_from:
        model = cls.from_pretrained(config.init_from)
        model = _with_inputs(model, config.model.get("in_channels"))
        _check_same(config.model, model.config, config.init_from)
    else:
        check_keys("model", config.model, signature(cls).parameters)
        model = cls(**config.model)
        initialize(model)
    _freeze(model, config)
    return model.train()


def _freeze(model: torch.nn.Module, config: TrainConfig) -> None:
    """Take the gradients from the parts of `model` that are to keep their weights."""
    if config.frozen and not config.init_from:
        raise ValueError(f"frozen={list(config.frozen)} would keep random weights: name the folder of trained ones as init_from.")
    parts = dict(model.named_modules())
    for name in config.frozen:
        if not name or name not in parts:
            known = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"frozen: {type(model).__name__} has no part {name!r}; the parts that it consists of are {known}.")
        parts[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"frozen={list(config.frozen)} leaves nothing to train: leave a part out.")


def _with_inputs(model: Any, in_channels: int | None) -> Any:
    """`model`, or with more input channels a copy that ignores them at first: its patch embedding has zeros for them.

    That is how an image-to-video model starts from a text-to-video model (paper section 2.3): it makes the same videos.
    """
    added = (in_channels or 0) - model.config.in_channels
    if added <= 0 or getattr(model.config, "patch_size_t", None):
        return model
    state = model.state_dict()
    weight = state["patch_embed.proj.weight"]  # (D, C, p, p)
    state["patch_embed.proj.weight"] = torch.cat([weight, weight.new_zeros(len(weight), added, *weight.shape[2:])], dim=1)
    wider = type(model).from_config({**model.config, "in_channels": in_channels})
    wider.load_state_dict(state)
    return wider


def _check_same(given: Mapping[str, Any], found: Mapping[str, Any], folder: str) -> None:
    """Raise ValueError where weights to start from (`found`, from `folder`) belong to another model than the one that is `given`."""
    for key, value in given.items():
        have = list(found[key]) if isinstance(found.get(key), tuple) else found.get(key)
        if have != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(
                f"model.{key}={value}, but the weights in {folder} have {key}={have}: make them equal, or leave init_from out."
            )
