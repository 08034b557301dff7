"""`from_single_file` of the models. What a file holds is found out above this layer, by a reader that is put in place on import."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from diffusers.loaders import FromOriginalModelMixin
from torch import Tensor

__all__ = ["SingleFileMixin", "Weights"]

Weights = str | os.PathLike[str] | Mapping[str, Tensor]
"""A file, the address of a file on the hub, or tensors by name."""

Reader = Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]
"""(class name, weights, config, whether to leave GGUF quantised) -> the config of the model, and its tensors under the file's names."""


class SingleFileMixin(FromOriginalModelMixin):
    """Loads a model from one file of weights through diffusers' machinery, which asks our key tables for the names."""

    single_file_reader: ClassVar[Reader]
    single_file_classes: ClassVar[Callable[[Weights], set[str]]]
    """The names of the classes of the models in a file."""

    @classmethod
    def from_single_file(  # type: ignore[override]
        cls, pretrained_model_link_or_path_or_dict: Weights, *, config: str | os.PathLike[str] | None = None, **kwargs: Any
    ) -> Any:
        """Load a model from one file: of the original code, of diffusers, or GGUF.

        Args:
            pretrained_model_link_or_path_or_dict: a file, the address of one on the hub, or tensors by name.
            config: a release's name (2b, 5b, ...), or a folder or repository with the config, where the tensors leave something open.
            kwargs: as in diffusers' `from_single_file`: dtype, quantization_config, device, low_cpu_mem_usage, ...

        Raises:
            FileNotFoundError, OSError: the file is not there, is damaged or dangerous.
            ValueError: it holds another model, or is not whole.
        """
        keep = kwargs.get("quantization_config") is not None
        found, tensors = cls.single_file_reader(cls.__name__, pretrained_model_link_or_path_or_dict, config, keep)
        kwargs.pop("subfolder", None)  # of the folder that `config` names, where the reader has looked
        with TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps({**found, "_class_name": cls.__name__}), encoding="utf-8")
            return super().from_single_file(tensors, config=folder, **kwargs)  # type: ignore[arg-type] # it takes both
