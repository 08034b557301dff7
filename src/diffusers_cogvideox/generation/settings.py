"""Everything that a video depends on besides prompt, seed and source files: chosen, checked, written down, and applied to a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar, get_args

import numpy as np
import torch

from ..options import Precision, Sampler, SamplingOptions
from ..pipelines.base import CogVideoXPipelineBase
from ..pipelines.decoding import FrameStream
from ..pipelines.windows import ContextWindows, context_of
from ..runtime.calibration import FILE, Calibration
from ..runtime.quantisation import check_planned, check_quantisation
from ..schedulers.scheduler import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from ..video_io import check_rate, to_uint8
from .json_types import type_mistakes
from .model_folder import ModelFolder, source_of
from .routes import PIPELINES, choose_pipeline, takes_frames
from .sources import LoraFile
from .story import read_story

__all__ = [
    "Settings",
    "check_device",
    "check_precision",
    "check_settings",
    "choose_settings",
    "load_pipeline",
    "make_videos",
    "native_dtype",
    "prepared",
    "stream_videos",
    "with_sampler",
]

AnyPipeline = TypeVar("AnyPipeline", bound=CogVideoXPipelineBase)

_SAMPLERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}
_ALGORITHMS = {"ddim": "ddim", "dpm": "dpmsolver++"}  # as calibrations know them


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of one video. Two runs with equal settings, prompt, seed and sources on one machine give the same video."""

    model: str  # folder, hub repository, or name of a shipped model
    fingerprint: str  # of the model's files, see ModelFolder.fingerprint
    pipeline: str = "CogVideoXPipeline"  # class name
    loras: tuple[LoraFile, ...] = ()
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    negative_prompt: str | None = None
    height: int  # pixels
    width: int  # pixels
    num_frames: int
    fps: float
    max_sequence_length: int  # text tokens
    dtype: str
    device: str
    cache: str | None = None  # of the model's calibration
    max_error: float | None = None
    window: int | None = None  # frames of a context window
    quantisation: str | None = None  # that a memory plan may use

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Settings:
        """The inverse of `dataclasses.asdict`. Raises KeyError, TypeError or ValueError for anything else."""
        settings = cls(**{**content, "loras": tuple(map(LoraFile.from_json, content.get("loras", ())))})
        if mistakes := list(type_mistakes(cls, {name: value for name, value in content.items() if name != "loras"})):
            raise ValueError(" ".join(mistakes))
        return settings

    def call_arguments(self) -> dict[str, Any]:
        """The settings that are arguments of the pipeline's `__call__`."""
        elsewhere = {"model", "fingerprint", "pipeline", "loras", "sampler", "fps", "dtype", "device", "window", "quantisation"}
        elsewhere |= set() if takes_frames(PIPELINES[self.pipeline]) else {"num_frames"}
        context = {} if self.context is None else {"context": self.context}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in elsewhere} | context

    @property
    def context(self) -> ContextWindows | None:
        """The context windows in which the video is made."""
        return context_of(self.window)

    def fit_arguments(self) -> dict[str, Any]:
        """The settings that are arguments of the pipeline's `fit`."""
        same = ("height", "width", "num_frames", "window", "device", "quantisation")
        return {name: getattr(self, name) for name in same} | {"steps": self.num_inference_steps}


def choose_settings(options: SamplingOptions, model: str | ModelFolder, files: Sequence[str] = (), **chosen: Any) -> Settings:
    """The checkpoint's recommendations, overridden by the options and by `chosen` (fields of Settings); None leaves a choice open.

    `files` are the names of what the video starts from, one of `options.COMBINATIONS`. Everything that can be checked without loading
    weights is checked.

    Raises:
        ValueError: for settings that the model, the device or the precision cannot do; the message names what is possible.
        OSError: for a model that is not there or not whole.
    """
    folder = model if isinstance(model, ModelFolder) else ModelFolder.open(model)
    _check_whole(folder)
    pipeline = choose_pipeline(folder.configs["transformer"], folder.name, files, folder.pipeline)
    device = check_device(options.device)
    flags = {"sampler": options.sampler, "num_inference_steps": options.steps, "guidance_scale": options.guidance_scale} | chosen
    values: dict[str, Any] = asdict(folder.recommended) | {name: value for name, value in flags.items() if value is not None}
    values["dtype"] = options.dtype or native_dtype(values["dtype"], device)
    settings = Settings(model=folder.name, fingerprint=folder.fingerprint(), pipeline=pipeline.__name__, device=device, **values)
    check_settings(settings, folder)
    return settings


def check_settings(settings: Settings, folder: ModelFolder) -> None:
    """Raise ValueError for what the model, the device or the precision cannot do, and for unknown names of sampler or precision."""
    for flag, value, choices in (("--sampler", settings.sampler, get_args(Sampler)), ("--dtype", settings.dtype, get_args(Precision))):
        if value not in choices:
            raise ValueError(f"{flag} {value} is unknown: it must be one of {', '.join(choices)}.")
    folder.geometry.padded_size(settings.height, settings.width)
    folder.geometry.padded_frames(settings.num_frames)
    if settings.context is not None:
        settings.context.shared_frames(folder.geometry)
    if settings.height % 2 or settings.width % 2:
        raise ValueError(f"--size {settings.height}x{settings.width} is not possible: a video file (yuv420p) needs even sizes.")
    check_rate(settings.fps)
    limit = folder.configs["scheduler"]["num_train_timesteps"]
    if not 1 <= settings.num_inference_steps <= limit:
        raise ValueError(f"--steps {settings.num_inference_steps} is not possible: it must be between 1 and {limit}.")
    check_precision(settings.dtype, check_device(settings.device))
    if settings.cache is not None:
        _check_cache(settings, settings.cache, folder)
    if settings.quantisation is not None:
        _check_quantisation(settings.quantisation, settings)


def _check_quantisation(name: str, settings: Settings) -> None:
    """Raise ValueError for a quantisation that is not possible here."""
    check_planned(name, settings.device)
    try:
        way = check_quantisation(name, settings.device)
    except ImportError as error:
        raise ValueError(str(error)) from error
    if settings.loras and not way.takes_adapters:
        raise ValueError(f"--quantisation {name} is not possible with --lora, which would take its dtype: choose int8 or fp8.")


def _check_cache(settings: Settings, cache: str, folder: ModelFolder) -> None:
    """Raise ValueError for a cache that the model's calibration, where it has one, does not have."""
    path = folder.path / FILE
    if not path.is_file():
        raise ValueError(f"--cache {cache} needs {path}: `cogvideox calibrate {settings.model}` makes it.")
    Calibration.load(path).choose(
        cache,
        settings.max_error,
        steps=settings.num_inference_steps,
        sampler=_ALGORITHMS[settings.sampler],
        guidance_scale=settings.guidance_scale,
        use_dynamic_cfg=settings.use_dynamic_cfg,
    )


def check_precision(dtype: str, device: str) -> None:
    """Raise ValueError for a precision that a device cannot compute in."""
    if torch.device(device).type == "cpu" and dtype == "float16":
        raise ValueError("--dtype float16 does not work on a CPU: choose bfloat16 or float32, or --device cuda.")
    if torch.device(device).type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"--dtype bfloat16 does not work on {torch.cuda.get_device_name(device)}: choose float32 or float16.")


def check_device(device: str | None) -> str:
    """The device as PyTorch names it; by default the first GPU, or the CPU. Raises ValueError for one that is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    there += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    if device not in there:
        raise ValueError(f"--device {device} is not available: this machine has {', '.join(there)}.")
    return device


def load_pipeline(settings: Settings, memory: Mapping[str, Any] | None = None) -> Any:
    """The pipeline of the class that the settings name, with its weights, LoRAs, precision, device and sampler as they say.

    `memory` are budgets (`fit`) to fit it into.

    Raises:
        OSError: for weights that are missing, corrupt, or not those of the model.
        ValueError: for a LoRA that does not fit the model, and for a model that does not fit into the memory.
    """
    load, dtype = PIPELINES[settings.pipeline].from_pretrained, getattr(torch, settings.dtype)
    if memory is None:
        pipe = load(source_of(settings.model), dtype=dtype).to(settings.device)
    else:
        pipe = load(source_of(settings.model), dtype=dtype, memory={**settings.fit_arguments(), **memory})
    for number, lora in enumerate(settings.loras):
        pipe.load_lora_weights(lora.file.path, adapter_name=f"lora{number}", lora_alpha=lora.alpha)
    if settings.loras:
        pipe.set_adapters([f"lora{number}" for number in range(len(settings.loras))], [lora.scale for lora in settings.loras])
    return with_sampler(pipe, settings.sampler)


def prepared(pipe: CogVideoXPipelineBase, settings: Settings) -> Any:
    """The pipeline class and the sampler of the settings over the components of `pipe`, which must be those of their model."""
    made = PIPELINES[settings.pipeline](**pipe.components)
    made.take_over_fit(pipe)
    return with_sampler(made, settings.sampler)


def stream_videos(pipe: Any, prompts: list[str], seeds: Sequence[int], settings: Settings, **options: Any) -> list[FrameStream]:
    """One video for each prompt and seed, denoised in one batch and decoded while it is read. `options` go to the pipeline's call."""
    return _call(pipe, prompts, seeds, settings, output_type="stream", **options)


def make_videos(pipe: Any, prompts: list[str], seeds: Sequence[int], settings: Settings, **options: Any) -> np.ndarray:
    """The same videos, decoded in one batch too: uint8 (B, F, H, W, 3)."""
    return to_uint8(_call(pipe, prompts, seeds, settings, output_type="np", **options))


def _call(pipe: Any, prompts: list[str], seeds: Sequence[int], settings: Settings, **options: Any) -> Any:
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    prompt: Any = prompts if len(prompts) > 1 else read_story(prompts[0])
    return pipe(prompt=prompt, generator=generators, **settings.call_arguments(), **options)[0]


def with_sampler(pipe: AnyPipeline, sampler: str, **components: Any) -> AnyPipeline:
    """A pipeline over the same components with this sampler, and with `components` exchanged; `pipe` stays as it is."""
    scheduler = _SAMPLERS[sampler].from_config(pipe.scheduler.config)
    made = type(pipe)(**{**pipe.components, "scheduler": scheduler, **components})
    if not components:
        made.take_over_fit(pipe)
    return made


def native_dtype(recommended: str, device: str) -> str:
    """The precision to run in: the recommended one, where the device can."""
    return "bfloat16" if recommended == "float16" and torch.device(device).type == "cpu" else recommended


def _check_whole(folder: ModelFolder) -> None:
    """Raise ValueError unless the folder holds all parts of a pipeline."""
    lacking = sorted({"transformer", "vae", "text_encoder", "tokenizer", "scheduler"} - set(folder.configs))
    if lacking:
        raise ValueError(f"{folder.path} lacks {', '.join(lacking)}: a whole pipeline folder is needed.")
