"""The only module that touches diffusers' private tables: what importing adds, and what `register` puts in place and takes back.

Importing adds and never replaces: the package's name as a library of loadable classes, hook metadata of our own block and
attention processor, and `diffusers.CogVideoXScheduler` while diffusers has no class of that name. `register` goes further:
it puts our models and pipelines in the place of diffusers' under their common names, so that code which knows nothing of
this package loads them. Schedulers stay diffusers' own there, because pipelines of other models test `isinstance` on them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .models.attention import CogVideoXAttnProcessor
from .models.autoencoder import AutoencoderKLCogVideoX
from .models.transformer import CogVideoXBlock, CogVideoXTransformer3DModel
from .pipelines.pipeline import CogVideoXPipeline
from .schedulers.scheduler import CogVideoXScheduler

__all__ = ["REPLACED", "extend", "register", "registered", "unregister"]

REPLACED: dict[str, type] = {cls.__name__: cls for cls in (AutoencoderKLCogVideoX, CogVideoXTransformer3DModel, CogVideoXPipeline)}
"""What `register` puts on the diffusers module, by name."""

_lock = threading.RLock()
_count = 0
_before: dict[str, Any] = {}  # attributes of the diffusers module that stood there before; absent ones were loaded lazily


def extend() -> None:
    """Add to diffusers' tables what it needs to load, save and hook our classes. Replaces nothing; repeating it changes nothing."""
    LOADABLE_CLASSES.setdefault(__package__, {})
    TransformerBlockRegistry.register(
        CogVideoXBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    )
    AttentionProcessorRegistry.register(CogVideoXAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention))
    if not hasattr(diffusers, CogVideoXScheduler.__name__):
        setattr(diffusers, CogVideoXScheduler.__name__, CogVideoXScheduler)


def _skip_attention(_attention: Any, *_: Any, **inputs: Any) -> tuple[Any, Any]:
    """What the attention processor returns for a layer that is skipped: its inputs, video (B, N, D) and text (B, L, D)."""
    return inputs["hidden_states"], inputs["encoder_hidden_states"]


def register() -> None:
    """Make diffusers load our models and pipelines wherever a repository names CogVideoX's.

    From then on `diffusers.DiffusionPipeline.from_pretrained` of a CogVideoX repository gives this package's pipeline and
    models. Names that were imported from diffusers before keep their meaning. Calls are counted; `unregister` undoes one.
    """
    global _count
    with _lock:
        if _count == 0:
            _before.update({name: vars(diffusers)[name] for name in REPLACED if name in vars(diffusers)})
            for name, cls in REPLACED.items():
                setattr(diffusers, name, cls)
        _count += 1


def unregister() -> None:
    """Undo one `register`; the last one leaves diffusers exactly as it was.

    Raises:
        RuntimeError: without a `register` to undo.
    """
    global _count
    with _lock:
        if _count == 0:
            raise RuntimeError("unregister() without register(): diffusers is unchanged.")
        _count -= 1
        if _count:
            return
        for name, cls in REPLACED.items():
            if vars(diffusers).get(name) is not cls:
                continue  # somebody else has put a class there since, which is not ours to remove
            if name in _before:
                setattr(diffusers, name, _before[name])
            else:
                delattr(diffusers, name)
        _before.clear()


@contextmanager
def registered() -> Iterator[None]:
    """`register` for the length of a with-block."""
    register()
    try:
        yield
    finally:
        unregister()


extend()
