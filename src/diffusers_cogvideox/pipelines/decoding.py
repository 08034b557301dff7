"""Latents to frames, chunk by chunk: the one walk behind every output type, with a second attempt when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from ..geometry import Geometry
from ..runtime.health import checked
from ..runtime.out_of_memory import free_unused_memory, is_out_of_memory, low_memory
from ..video_io import to_uint8
from .framing import crop_video

__all__ = ["Extent", "FrameStream", "VideoDecoder", "shown"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Extent:
    """How much of what latents decode to is wanted: the first `num_frames` frames, and their middle `height` x `width` pixels."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameStream:
    """One video as an iterable of its frames in order: uint8 chunks (F', H, W, 3), each decoded when it is asked for.

    Every iteration decodes anew, and may be broken off. No more than a chunk of the video is in memory at a time.

    Args:
        extent: number of frames and their size.
        latents: what is decoded, scaled latents (1, f, C, h, w) on the CPU; None for frames that are in memory already.
        chunks: starts an iteration.
    """

    extent: Extent
    latents: Tensor | None = None
    chunks: Callable[[], Iterator[np.ndarray]]

    def __iter__(self) -> Iterator[np.ndarray]:
        """Chunks (F', H, W, 3). Raises as `VideoDecoder.pieces`; such an error carries the `latents`."""
        return self.chunks()


@dataclass(frozen=True, kw_only=True)
class VideoDecoder:
    """A VAE and how a pipeline uses it: decodes scaled latents (B, f, C, h, w) to frames.

    Latents are kept on the CPU meanwhile: an error on the way, Ctrl-C too, carries them as its attribute `latents`.

    Args:
        vae: ours, or diffusers', which decodes a video in one piece.
        geometry: size rules.
        scaling_factor: what the VAE's latents are multiplied with for the transformer.
        device: where the VAE runs.
        processor: maps [-1, 1] to an output type.
        release: called when no model is needed for a while, lets offloading take them back.
        stage: called with "decode", surrounds the work on each piece.
    """

    vae: Any
    geometry: Geometry
    scaling_factor: float
    device: torch.device
    processor: VideoProcessor
    release: Callable[[], None] = lambda: None
    stage: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()

    def extent(self, latents: Tensor, num_frames: int | None = None, height: int | None = None, width: int | None = None) -> Extent:
        """What is wanted of latents (B, f, C, h, w), by default everything. Raises ValueError for more than they hold."""
        most = (self.geometry.decoded_frames(latents.shape[1]), *self.geometry.pixel_size(*latents.shape[-2:]))
        wanted = [there if asked is None else asked for asked, there in zip((num_frames, height, width), most, strict=True)]
        if not all(1 <= asked <= there for asked, there in zip(wanted, most, strict=True)):
            raise ValueError(
                f"{wanted[0]} frames of {wanted[1]}x{wanted[2]} are not in latents of shape {tuple(latents.shape)}: they hold {most[0]} "
                f"frames of {most[1]}x{most[2]}. Ask for these, or fewer."
            )
        return Extent(*wanted)

    def streams(self, latents: Tensor, extent: Extent) -> list[FrameStream]:
        """One stream for each video of scaled latents (B, f, C, h, w). The models that made them may leave the device."""
        kept = latents.detach().cpu()
        self.release()
        return [FrameStream(extent=extent, latents=one, chunks=partial(self._chunks, one, extent)) for one in kept.split(1)]

    def collect(self, latents: Tensor, extent: Extent, output_type: str) -> Any:
        """All frames of scaled latents (B, f, C, h, w), on the CPU, as "pil", "np" or "pt" (see `CogVideoXPipelineOutput`).

        Raises as `pieces` does.
        """
        kept = latents.detach().cpu()
        with self._keeping(kept):
            if output_type == "pil":
                videos: list[list[Any]] = [[] for _ in kept]
                for piece in self.pieces(kept, extent):
                    for video, pictures in zip(videos, shown(self.processor, piece, "pil"), strict=True):
                        video += pictures
                return videos
            return _joined((shown(self.processor, piece, output_type) for piece in self.pieces(kept, extent)), extent.num_frames)

    @torch.no_grad()
    def pieces(self, latents: Tensor, extent: Extent) -> Iterator[Tensor]:
        """Frames (B, 3, F', H, W) in about [-1, 1], piece by piece, of scaled latents (B, f, C, h, w).

        When memory runs out, what is not in use is freed and the rest is decoded in the VAE's low-memory mode.

        Raises:
            FloatingPointError: for a piece that is not finite; names the layer.
            torch.OutOfMemoryError, RuntimeError, MemoryError: when the second attempt finds no memory either.
        """
        done = 0
        for piece in self._persistently(latents):
            yield crop_video(piece, frames=extent.num_frames - done, height=extent.height, width=extent.width)
            done += piece.shape[2]
            if done >= extent.num_frames:
                break

    def _chunks(self, latents: Tensor, extent: Extent) -> Iterator[np.ndarray]:
        """uint8 (F', H, W, 3) of latents of one video."""
        with self._keeping(latents):
            for piece in self.pieces(latents, extent):
                yield to_uint8(shown(self.processor, piece, "np")[0])

    @contextmanager
    def _keeping(self, latents: Tensor) -> Iterator[None]:
        """Put the latents into whatever error ends the block, and release the models at its end."""
        try:
            try:
                yield
            finally:
                self.release()
        except GeneratorExit:  # nobody wants more frames
            raise
        except BaseException as error:
            error.latents = latents  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):  # from Python 3.11 on
                error.add_note("The latents are not lost: this error's attribute `latents` is what pipe.decode_frames(...) takes.")
            raise

    def _persistently(self, latents: Tensor) -> Iterator[Tensor]:
        """Whole decoded frames (B, 3, F', 8h, 8w); after running out of memory once, the rest of them in low-memory mode."""
        done = 0
        try:
            for piece in self._decoded(latents):
                done += piece.shape[2]
                yield piece
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or getattr(self.vae, "row_group", None):  # other ranks go on
                raise
            reason = str(error).partition("\n")[0]
        # Here neither the error nor what its traceback held on to is left.
        logger.warning(f"Decoding ran out of memory ({reason}): trying again with what can be freed, in the VAE's low-memory mode.")
        self.release()
        free_unused_memory()
        with low_memory(self.vae):
            for piece in self._decoded(latents):
                if piece.shape[2] > done:
                    yield piece[:, :, done:]
                done = max(0, done - piece.shape[2])

    def _decoded(self, latents: Tensor) -> Iterator[Tensor]:
        """Whole decoded frames (B, 3, F', 8h, 8w), checked to be finite."""
        z = latents.to(self.device).transpose(1, 2).to(self.vae.dtype) / self.scaling_factor
        pieces = _decode_stream(self.vae, z)
        for index in count():
            with self.stage("decode"):
                piece = next(pieces, None)
                if piece is None:
                    return
                piece = checked(piece, self.vae, partial(_nth_piece, self.vae, z, index), "while decoding")
            yield piece


def shown(processor: VideoProcessor, video: Tensor, output_type: str) -> Any:
    """A video or a piece of one (B, 3, F, H, W) in [-1, 1], moved to the CPU, as "pil", "np" or "pt"; or, whole, as "stream"."""
    if output_type == "stream":
        extent = Extent(*video.shape[2:])
        held = [to_uint8(shown(processor, one, "np")[0]) for one in video.split(1)]
        return [FrameStream(extent=extent, chunks=partial(iter, [frames])) for frames in held]
    result: Any = processor.postprocess_video(video, output_type=output_type)
    return result.cpu() if output_type == "pt" else result


def _joined(parts: Iterator[Any], length: int) -> Any:
    """Arrays or tensors (B, F', ...) as one (B, length, ...), without ever holding both the parts and the whole."""
    done, whole = 0, None
    for part in parts:
        if whole is None:
            empty = np.empty if isinstance(part, np.ndarray) else torch.empty
            whole = empty((len(part), length, *part.shape[2:]), dtype=part.dtype)
        whole[:, done : done + part.shape[1]] = part
        done += part.shape[1]
    return whole


def _decode_stream(vae: Any, z: Tensor) -> Iterator[Tensor]:
    """Frames (B, 3, F', H, W) of the VAE's own latents (B, C, f, h, w), in as small pieces as it can make them."""
    return vae.decode_stream(z) if hasattr(vae, "decode_stream") else iter([vae.decode(z).sample])


def _nth_piece(vae: Any, z: Tensor, index: int) -> Tensor | None:
    """The piece number `index` of what latents decode to, made again from the start."""
    return next(islice(_decode_stream(vae, z), index, None), None)
