"""A pipeline from one file of weights: the models that the file holds, and the rest from a model folder or repository."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.loaders import FromSingleFileMixin

from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.single_file import SingleFileMixin, Weights
from ..models.transformer import CogVideoXTransformer3DModel
from ..presets import PRESETS, match_preset

__all__ = ["SingleFilePipelineMixin"]


class SingleFilePipelineMixin(FromSingleFileMixin):
    """`from_single_file` of the pipelines."""

    @classmethod
    def from_single_file(  # type: ignore[override]
        cls, pretrained_model_link_or_path: Weights, *, config: str | None = None, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """Load a pipeline around the transformer in a file, and around its VAE where the file has one too.

        Args:
            pretrained_model_link_or_path: a file of the original code, of diffusers, or GGUF; or the address of one on the hub.
            config: pipeline folder or repository for everything that the file lacks (default: the release of the same architecture).
            dtype: precision.
            kwargs: components, and arguments of `from_pretrained`; `quantization_config` is for the transformer.

        Raises:
            FileNotFoundError, OSError: the file is not there, is damaged or dangerous.
            ValueError: it holds no transformer, or is of no released architecture and `config` is missing.
        """
        quantised = {"quantization_config": kwargs.pop("quantization_config")} if "quantization_config" in kwargs else {}
        models: list[type[SingleFileMixin]] = [CogVideoXTransformer3DModel, AutoencoderKLCogVideoX]
        transformer = models[0].from_single_file(pretrained_model_link_or_path, config=config, dtype=dtype, **quantised)
        parts = {"transformer": transformer} | kwargs
        if "vae" not in parts and models[1].__name__ in SingleFileMixin.single_file_classes(pretrained_model_link_or_path):
            parts["vae"] = models[1].from_single_file(pretrained_model_link_or_path, config=config, dtype=dtype)
        preset = PRESETS.get(str(config)) or match_preset(transformer.config)
        if config is None and preset is None:
            raise ValueError(
                f"{pretrained_model_link_or_path} is of no released architecture, so the rest of its pipeline must be named: pass config= "
                "with a pipeline folder or repository."
            )
        rest = config if config is not None and config not in PRESETS else preset.repo_ids[0]  # type: ignore[union-attr]
        return cls.from_pretrained(rest, **({} if dtype is None else {"dtype": dtype}), **parts)  # type: ignore[attr-defined]
