"""The only module that touches diffusers' private tables: what importing adds, and what `register` puts in place and takes back.

Importing adds and never replaces: the package's name as a library of loadable classes, hook metadata of our own block and
attention processor, and on the diffusers module the classes of `ADDED` whose names are free. `register` goes further:
it puts our models and pipelines in the place of diffusers' under their common names, so that code which knows nothing of
this package loads them, and lets pipelines that diffusers has built around them be saved under diffusers' names. Schedulers
stay diffusers' own there, because pipelines of other models test `isinstance` on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .conversion.single_file import as_diffusers, classes_in, read_single_file
from .models.attention import CogVideoXAttnProcessor
from .models.autoencoder import AutoencoderKLCogVideoX
from .models.single_file import SingleFileMixin
from .models.transformer import CogVideoXBlock, CogVideoXTransformer3DModel
from .pipelines.continuation import CogVideoXContinuationPipeline
from .pipelines.fun_control import CogVideoXFunControlPipeline
from .pipelines.fun_inpaint import CogVideoXFunInpaintPipeline
from .pipelines.image_to_video import CogVideoXImageToVideoPipeline
from .pipelines.pipeline import CogVideoXPipeline
from .pipelines.portability import portable
from .pipelines.video_to_video import CogVideoXVideoToVideoPipeline
from .schedulers.scheduler import CogVideoXScheduler

__all__ = ["ADDED", "REPLACED", "SINGLE_FILE", "extend", "register", "registered", "unregister"]

REPLACED: dict[str, type] = {
    cls.__name__: cls
    for cls in (
        AutoencoderKLCogVideoX,
        CogVideoXTransformer3DModel,
        CogVideoXPipeline,
        CogVideoXImageToVideoPipeline,
        CogVideoXVideoToVideoPipeline,
        CogVideoXFunControlPipeline,
    )
}
"""What `register` puts on the diffusers module, by name."""

ADDED: tuple[type, ...] = (CogVideoXScheduler, CogVideoXContinuationPipeline, CogVideoXFunInpaintPipeline)
"""What importing puts there, so that diffusers loads folders that name it: classes that diffusers lacks."""


def _record_portably(pipeline: DiffusionPipeline, /, **entries: Any) -> None:
    """`register_to_config` of every pipeline while registered: other models' pipelines that hold our VAE name diffusers' too."""
    super(DiffusionPipeline, pipeline).register_to_config(**portable(entries))


SINGLE_FILE = "CogVideoXSingleFileMixin"
"""Under this name diffusers' table of single files, and so the diffusers module, knows the base class of our two models."""

# (owner, attribute, what `register` puts there)
_PLACES: list[tuple[Any, str, type | Callable[..., None]]] = [
    *((diffusers, name, cls) for name, cls in REPLACED.items()),
    (DiffusionPipeline, "register_to_config", _record_portably),
]
_lock = threading.RLock()
_count = 0
_before: dict[tuple[Any, str], Any] = {}  # what stood at these places; what was absent is loaded lazily, or inherited


def extend() -> None:
    """Add to diffusers' tables what it needs to load, save and hook our classes. Replaces nothing; repeating it changes nothing."""
    LOADABLE_CLASSES.setdefault(__package__, {})
    TransformerBlockRegistry.register(
        CogVideoXBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    )
    AttentionProcessorRegistry.register(CogVideoXAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention))
    SingleFileMixin.single_file_reader = staticmethod(read_single_file)
    SingleFileMixin.single_file_classes = staticmethod(classes_in)
    SINGLE_FILE_LOADABLE_CLASSES.setdefault(SINGLE_FILE, {"checkpoint_mapping_fn": as_diffusers})
    setattr(diffusers, SINGLE_FILE, SingleFileMixin)
    for cls in ADDED:
        if not hasattr(diffusers, cls.__name__):
            setattr(diffusers, cls.__name__, cls)


def _skip_attention(_attention: Any, *_: Any, **inputs: Any) -> tuple[Any, Any]:
    """What the attention processor returns for a layer that is skipped: its inputs, video (B, N, D) and text (B, L, D)."""
    return inputs["hidden_states"], inputs["encoder_hidden_states"]


def register() -> None:
    """Make diffusers load our models and pipelines wherever a repository names CogVideoX's.

    From then on `diffusers.DiffusionPipeline.from_pretrained` of a CogVideoX repository gives this package's pipeline and
    models. Names that were imported from diffusers before keep their meaning. What is saved, diffusers alone loads. Calls are
    counted; `unregister` undoes one.
    """
    global _count
    with _lock:
        if _count == 0:
            for owner, name, ours in _PLACES:
                if name in vars(owner):
                    _before[owner, name] = vars(owner)[name]
                setattr(owner, name, ours)
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
        for owner, name, ours in _PLACES:
            if vars(owner).get(name) is not ours:
                continue  # somebody else has put something there since, which is not ours to remove
            if (owner, name) in _before:
                setattr(owner, name, _before[owner, name])
            else:
                delattr(owner, name)
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
