"""LoRA on a pipeline: files of every known layout, at the strength that they were trained with, into diffusers' adapter machinery."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.utils import is_peft_available, logging
from torch import Tensor, nn

from ..checkpoints.lora import Lora, check_fits, to_peft, with_alpha
from .lora_files import open_lora

__all__ = ["CogVideoXLoraMixin"]

logger = logging.get_logger(__name__)


class CogVideoXLoraMixin(CogVideoXLoraLoaderMixin):
    """Loads, saves, weighs and fuses LoRAs of the transformer, under the names that diffusers has for it.

    `set_adapters`, `fuse_lora`, `unfuse_lora`, `disable_lora`, `delete_adapters`, `unload_lora_weights` and hot-swapping are
    diffusers' own. Unloading leaves the weights as they were before, bit for bit; `unfuse_lora` leaves them so to rounding, and a
    LoRA that is unloaded while fused stays in the weights.
    """

    transformer: Any

    def load_lora_weights(  # type: ignore[override] # the base class of diffusers names no arguments
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        lora_alpha: float | None = None,
        low_cpu_mem_usage: bool = True,
        **where: Any,
    ) -> None:
        """Load a LoRA of any layout: diffusers, PEFT, ComfyUI, kohya and VideoX-Fun, SAT (a whole checkpoint too), DoRA.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a repository on the hub, or tensors by name.
            adapter_name: name for `set_adapters`; by default one is made up.
            hotswap: put it in the place of the loaded adapter of that name, without recompilation.
            lora_alpha: alpha for a file that does not say its own; the strength of the LoRA is alpha / rank. Without it such a file
                is loaded with its trainer's default, and a warning.
            low_cpu_mem_usage: make the new layers around the tensors, without initialising them first.
            where: `weight_name`, `subfolder`, `use_safetensors`, and arguments of `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError, OSError: there is no such file, or it is damaged, or needs code to be opened.
            ValueError: it is no LoRA of CogVideoX, or of another size than this transformer; or `lora_alpha` contradicts it; or the
                name is taken.
            ImportError: PEFT is not installed.
        """
        if not is_peft_available():
            raise ImportError("LoRA needs PEFT: pip install 'diffusers-cogvideox[train]', or pip install peft.")
        if self.transformer is None:
            raise ValueError("The pipeline has no transformer to load a LoRA into: load it with one.")
        lora = with_alpha(open_lora(pretrained_model_name_or_path_or_dict, **where), lora_alpha)
        check_fits(lora, self.transformer.config)
        tensors, metadata = self._as_diffusers(lora)
        with warnings.catch_warnings():  # PEFT asks whether a second adapter is meant, and nothing else was asked for
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            self.load_lora_into_transformer(
                tensors,
                transformer=self.transformer,
                adapter_name=adapter_name,
                metadata=metadata,
                _pipeline=self,
                low_cpu_mem_usage=low_cpu_mem_usage,
                hotswap=hotswap,
            )

    @classmethod
    def lora_state_dict(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        return_lora_metadata: bool = False,
        *,
        lora_alpha: float | None = None,
        **where: Any,
    ) -> dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a LoRA of any layout under diffusers' names, and, if asked for, PEFT's LoraConfig as diffusers stores it.

        Arguments and errors are those of `load_lora_weights`.
        """
        lora = with_alpha(open_lora(pretrained_model_name_or_path_or_dict, **where), lora_alpha)
        tensors, metadata = cls._as_diffusers(lora)
        return (tensors, metadata) if return_lora_metadata else tensors

    @classmethod
    def _as_diffusers(cls, lora: Lora) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, config = to_peft(lora)
        prefix = cls.transformer_name
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, {f"{prefix}.{key}": value for key, value in config.items()}

    @classmethod
    def save_lora_weights(  # type: ignore[override]
        cls,
        save_directory: str | os.PathLike[str],
        transformer_lora_layers: nn.Module | Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Write `pytorch_lora_weights.safetensors`, which diffusers loads at the right strength: alpha stands in its metadata.

        Args:
            save_directory: folder.
            transformer_lora_layers: a transformer with one adapter, or the adapter's tensors as `get_peft_model_state_dict` gives them.
            is_main_process: as in diffusers.
            weight_name: another file name.
            save_function: as in diffusers.
            safe_serialization: False writes a pickle, which has no place for alpha.
            transformer_lora_adapter_metadata: `peft_config[adapter].to_dict()`, where only tensors are given.

        Raises:
            ValueError: nothing to save, or a transformer with no adapter or several.
        """
        layers: Any = transformer_lora_layers
        metadata = transformer_lora_adapter_metadata
        if isinstance(layers, nn.Module):
            layers, metadata = _only_adapter(layers)
        if layers and not metadata:
            logger.warning(
                "The LoRA is saved without its alpha, which whoever loads it must know. Pass the transformer in place of its tensors, or "
                "transformer_lora_adapter_metadata=transformer.peft_config[adapter].to_dict()."
            )
        super().save_lora_weights(
            save_directory,
            transformer_lora_layers=layers,
            is_main_process=is_main_process,
            weight_name=weight_name,  # type: ignore[arg-type] # None is diffusers' own default
            save_function=save_function,  # type: ignore[arg-type]
            safe_serialization=safe_serialization,
            transformer_lora_adapter_metadata=metadata,
        )


def _only_adapter(transformer: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and LoraConfig of the one adapter of a transformer."""
    from peft import get_peft_model_state_dict

    adapters = getattr(transformer, "peft_config", {})
    if len(adapters) != 1:
        raise ValueError(
            f"The transformer has {len(adapters)} adapters ({', '.join(adapters) or 'none'}), so it is not clear what to save. Pass "
            "get_peft_model_state_dict(transformer, adapter_name=...) and transformer_lora_adapter_metadata=..."
        )
    ((name, config),) = adapters.items()
    return get_peft_model_state_dict(transformer, adapter_name=name), config.to_dict()
