"""The verb `decode`: from saved latents to the files of their videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from ..models.autoencoder import AutoencoderKLCogVideoX
from ..options import DecodeOptions
from ..pipelines.decoding import FrameStream, VideoDecoder
from ..pipelines.folder import check_complete
from .job import Job
from .latents import SavedLatents, read_latents, with_layout
from .model_folder import ModelFolder
from .plan import check_output, output_paths
from .settings import check_device, check_precision, native_dtype
from .sources import SourceFile
from .writing import Clock, UnfinishedVideoError, in_words, write_files

__all__ = ["decode"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """The VAE to decode with, where, and in which precision."""

    folder: ModelFolder
    dtype: str
    device: str

    def decoder(self, scaling_factor: float | None, tiling: bool) -> VideoDecoder:
        """The VAE, loaded, for latents that were multiplied by a scaling factor, by default its own."""
        folder = self.folder
        where = (folder.name, {"subfolder": "vae", "revision": folder.revision}) if folder.revision else (folder.folder("vae"), {})
        vae = AutoencoderKLCogVideoX.from_pretrained(where[0], torch_dtype=getattr(torch, self.dtype), **where[1])
        if not folder.revision:
            check_complete(folder.folder("vae"), vae)
        if tiling:
            vae.enable_tiling()
        return VideoDecoder(
            vae=vae.to(self.device).eval(),
            geometry=folder.geometry,
            scaling_factor=vae.config.scaling_factor if scaling_factor is None else scaling_factor,
            device=torch.device(self.device),
            processor=VideoProcessor(vae_scale_factor=vae.spatial_ratio),
        )

    def to_json(self) -> dict[str, str]:
        """What the result depends on."""
        return {"model": self.folder.name, "fingerprint": self.folder.fingerprint(), "dtype": self.dtype, "device": self.device}


def decode(options: DecodeOptions) -> list[Path]:
    """Make the videos of a file of latents, each with contact sheet and JSON file; returns their paths. What happens is logged.

    Raises:
        ValueError, OSError: for a file that holds no latents, a model that does not fit them, outputs that exist already.
        UnfinishedVideoError: for a video that cannot be decoded; the latents stay where they are.
    """
    file = Path(options.latents)
    found = read_latents(file)
    return [_finished(options, file, found)] if isinstance(found, SavedLatents) else _from_elsewhere(options, file, found)


# --- latents of `generate` ------------------------------------------------------------------------------------------------


def _finished(options: DecodeOptions, file: Path, saved: SavedLatents) -> Path:
    """The video of latents that `generate` saved, with the files that it would have written."""
    for name in ("fps", "layout"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} has no effect: {file} says it. Leave it out.")
    (output,) = output_paths(options.output or str(file.parent), [saved.video])
    try:
        job = Job.from_recipe(saved.content, output)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} was not saved by `generate`, or was changed: {error}.") from error
    settings = job.settings
    folder = ModelFolder.open(options.model or settings.model)
    place = _place(options, folder, settings.dtype, options.device or settings.device)
    if folder.fingerprint() != settings.fingerprint:
        difference = f"the latents in {file} were made with a model of fingerprint {settings.fingerprint}, and {folder.name} has "
        difference += folder.fingerprint()
        if options.model is None:
            raise ValueError(f"{difference}: name the right one, or this one in spite of that, with --model.")
        logger.warning(f"{difference}.")
    if job.is_finished() and not options.overwrite:
        logger.info(f"{output} is there already.")
        return output
    check_output(output, options.overwrite)
    same = (place.dtype, place.device, folder.fingerprint()) == (settings.dtype, settings.device, settings.fingerprint)
    content = dict(saved.content) if same else {**saved.content, "decoded": place.to_json()}
    clock = Clock(**content.pop("seconds", {}))
    decoder = place.decoder(saved.scaling_factor, options.tiling)
    clock.lap("load")
    extent = decoder.extent(saved.latents, **vars(saved.extent))
    (stream,) = decoder.streams(saved.latents, extent)
    _write(output, stream, settings.fps, job.prompt, content, clock)
    return output


# --- latents from elsewhere -----------------------------------------------------------------------------------------------


def _from_elsewhere(options: DecodeOptions, file: Path, tensors: Mapping[str, Tensor]) -> list[Path]:
    """The videos of one tensor of latents, whole."""
    if options.model is None:
        raise ValueError(f"{file} does not say which model its latents are for: name it with --model.")
    folder = ModelFolder.open(options.model)
    device = check_device(options.device)
    fps, dtype = options.fps, "float32"
    if "transformer" in folder.configs:  # a VAE alone recommends nothing
        fps, dtype = fps or folder.recommended.fps, native_dtype(folder.recommended.dtype, device)
    if fps is None:
        raise ValueError(f"{options.model} does not say how many frames per second its videos have: name them with --fps.")
    place = _place(options, folder, dtype, device)
    try:
        latents, layout = with_layout(tensors, folder.configs["vae"]["latent_channels"], options.layout)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    axes = {"pipeline": "(videos, frames, channels, height, width), multiplied by the scaling factor"}
    logger.info(f"{file} is read as {axes.get(layout, 'what the VAE encodes: (videos, channels, frames, height, width), not scaled')}.")
    name = file.name.removesuffix(".safetensors").removesuffix(".latents")
    names = [f"{name}.mp4"] if len(latents) == 1 else [f"{name}-{number}.mp4" for number in range(len(latents))]
    outputs = output_paths(options.output or str(file.parent), names)
    for output in outputs:
        check_output(output, options.overwrite)
    started = Clock()
    decoder = place.decoder(1.0 if layout == "vae" else None, options.tiling)
    started.lap("load")
    facts = {"latents": asdict(SourceFile.of(file)), "layout": layout, "fps": fps, "decoded": place.to_json()}
    for number, stream in enumerate(decoder.streams(latents, decoder.extent(latents))):
        content = {**facts, "number": number, **asdict(stream.extent)}
        _write(outputs[number], stream, fps, names[number], content, Clock(**started.seconds))
    return outputs


# --- for both -------------------------------------------------------------------------------------------------------------


def _place(options: DecodeOptions, folder: ModelFolder, dtype: str, device: str) -> _Place:
    """What to decode with, in the precision of the options or else `dtype`. Raises ValueError for what the model or the device lack."""
    if "vae" not in folder.configs:
        raise ValueError(f"{folder.name} has no VAE to decode with: name a pipeline or a VAE folder with --model.")
    place = _Place(folder=folder, dtype=options.dtype or dtype, device=check_device(device))
    check_precision(place.dtype, place.device)
    return place


def _write(output: Path, stream: FrameStream, fps: float, label: str, content: Mapping[str, Any], clock: Clock) -> None:
    """Write the files of one video. Raises UnfinishedVideoError where waiting or another place can help."""
    try:
        write_files(output, stream, fps=fps, label=label, content=content, clock=clock)
    except (OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        raise UnfinishedVideoError(f"{output} is not finished: {in_words(error)}. The latents are still there.") from error
    logger.info(f"{output} is finished.")
