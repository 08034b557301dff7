"""`AutoencoderKLCogVideoX`: the 3D causal VAE, 4x8x8 compression. One walk over batch, tiles and chunks for both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..geometry import DECODE_CHUNK, ENCODE_CHUNK, chunk_spans, spatial_ratio
from .causal_conv import ConvCache
from .host_cache import HostConvCache
from .leaves import forget
from .row_share import RowParallelMixin, RowShare
from .rowwise import Rowwise
from .single_file import SingleFileMixin
from .textbook import Textbook
from .tiling import map_tiles
from .vae_blocks import Arithmetic, Decoder, Encoder, Tower
from .vae_memory import DIRECTIONS, Saving, TilingMixin, choose_saving, estimate_chunks, free_memory, is_out_of_memory, savings, walk_chunks

__all__ = ["DIRECTIONS", "AutoencoderKLCogVideoX"]

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Coder:
    """One direction: a tower, the frames of a chunk, pixels per latent of its input and its result, and how frames are counted.

    `before` and `after` are the 1x1x1 convolutions around the latents that no released model has.
    """

    name: str
    tower: Tower
    chunk: int
    in_scale: int
    out_scale: int
    resized: Callable[[int], int]
    before: nn.Module | None = None
    after: nn.Module | None = None

    def __call__(self, x: Tensor, how: Arithmetic) -> Tensor:
        """Code one chunk (B, C, F, H, W)."""
        y = self.tower(x, how)
        return y if self.after is None else self.after(y)

    def exactly(self, x: Tensor, cache: ConvCache, saving: Saving, share: RowShare | None = None) -> Tensor:
        """Code one chunk by `Rowwise`, in the precision of a surrounding autocast, together with the other ranks of `share`."""
        kind = x.device.type
        cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
        with torch.autocast(kind, enabled=False) if cast else nullcontext():
            z = x.to(dtype) if self.name == "decode" else None
            how = Rowwise(cache, z, saving.bands, dtype, x.device, saving.lean, share)
            return self(x, how) if share is None else share.whole(self(share.own(x), how))


class AutoencoderKLCogVideoX(TilingMixin, RowParallelMixin, ModelMixin, AutoencoderMixin, ConfigMixin, SingleFileMixin):  # type: ignore[misc]
    """Video (B, 3, F, H, W) in [-1, 1] <-> latents (B, C_z, f, h, w), f = (F - 1) / 4 + 1, h = H / 8, w = W / 8.

    Frames are processed in chunks (8 frames when encoding, 2 latent frames when decoding, the remainder in the first chunk),
    with the causal convolutions' last frames carried over (CogVideoX paper, arXiv:2408.06072, section 2.1). GroupNorm
    statistics are taken per chunk, so the chunk sizes are part of the function; `num_sample_frames_batch_size` and
    `num_latent_frames_batch_size` may be set to others, with other results. `latents * scaling_factor` is what the transformer
    sees. Config keys and state-dict keys are those of the released checkpoints (`vae/config.json`).

    To compile, call `vae.decoder.compile(fullgraph=True)`, or the encoder's: one graph for the first chunk and one for the others, which
    compute the layers as `textbook` does, without bands or their saving of work and memory. On a processor that does not pay: a residual
    block of 128 channels on 9 frames of 48x64 took 1.1 times the processor time that it takes here uncompiled.

    Raises:
        ValueError: at construction for block types other than CogVideoX's and for options without effect; in encode/decode
            for tensors whose channels or size do not fit, and for chunk sizes that tear apart what belongs together in time.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["ResnetBlock"]  # type: ignore[misc,assignment]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("CogVideoXDownBlock3D",) * 4,
        up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 256, 512),
        latent_channels: int = 16,
        layers_per_block: int = 3,
        act_fn: str = "silu",
        norm_eps: float = 1e-6,
        norm_num_groups: int = 32,
        temporal_compression_ratio: float = 4,
        sample_height: int = 480,
        sample_width: int = 720,
        scaling_factor: float = 1.15258426,  # noqa: ARG002 - read by the pipelines
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,  # noqa: ARG002 - in the released configs; nothing reads it
        use_quant_conv: bool = False,
        use_post_quant_conv: bool = False,
        invert_scale_latents: bool = False,  # noqa: ARG002 - read by the image-to-video condition
    ) -> None:
        super().__init__()
        _check_block_types("down_block_types", down_block_types, "CogVideoXDownBlock3D", block_out_channels)
        _check_block_types("up_block_types", up_block_types, "CogVideoXUpBlock3D", block_out_channels)
        _check_unset(shift_factor=shift_factor, latents_mean=latents_mean, latents_std=latents_std)
        time_levels = int(math.log2(temporal_compression_ratio))
        block = {"groups": norm_num_groups, "eps": norm_eps, "act_fn": act_fn}
        self.encoder = Encoder(in_channels, latent_channels, block_out_channels, layers_per_block, time_levels, **block)
        self.decoder = Decoder(latent_channels, out_channels, block_out_channels, layers_per_block, time_levels, **block)
        self.quant_conv = nn.Conv3d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv3d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

        self.spatial_ratio = spatial_ratio(block_out_channels)
        self.num_sample_frames_batch_size = ENCODE_CHUNK
        self.num_latent_frames_batch_size = DECODE_CHUNK
        self.textbook = False  # compute as written, for comparison; with gradients that is done in any case
        self.saving: Saving | None = None  # chosen by hand, for measurements
        self.use_slicing = False
        self.init_tiling(sample_height // 2, sample_width // 2)

    def estimate_peak(self, shape: Sequence[int], direction: str = "decode", saving: Saving | None = None) -> int:
        """Bytes that `encode` or `decode` of a tensor of this shape takes at its peak, beside the weights as they are stored.

        Counted from the sizes of what is alive in each layer; nothing is computed. Includes the result, and the weights in the form in
        which they are used, which stay until the model is moved.

        Args:
            shape: (B, 3, F, H, W) to encode, (B, C_z, f, h, w) to decode.
            direction: "encode" or "decode".
            saving: how memory is saved; by default what the current settings and the free memory come to.
        """
        coder, (slices, batch) = self._coder(direction), (shape[0], 1) if self.use_slicing else (1, shape[0])
        saving = saving or self._ways(coder, shape, self.device)[0]
        height, width = (side * coder.out_scale // coder.in_scale for side in shape[3:])
        frames = [coder.resized(stop - start) for start, stop in chunk_spans(shape[2], coder.chunk)]
        frame = batch * coder.tower.conv_out.conv.out_channels * height * width * self.dtype.itemsize
        walked = walk_chunks(coder.tower, (batch, *shape[1:]), coder.chunk, self.dtype, self.device, saving)
        return estimate_chunks(walked, frame * sum(frames), frame * frames[-1], slices)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Video (B, 3, F, H, W) in [-1, 1] -> the latents' diagonal Gaussian, mean and log-variance (B, C_z, f, h, w) each."""
        _check_video("encode", x, self.config["in_channels"], self.spatial_ratio)
        posterior = DiagonalGaussianDistribution(self._whole(self._coder("encode"), x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C_z, f, h, w), not multiplied by the scaling factor -> video (B, 3, F, H, W).

        An odd f gives 4(f-1)+1 frames; an even f has no single first frame and gives 4f.
        """
        _check_video("decode", z, self.config["latent_channels"], 1)
        video = self._whole(self._coder("decode"), z)
        return DecoderOutput(sample=video) if return_dict else (video,)

    @apply_forward_hook
    @torch.no_grad()
    def decode_stream(self, z: Tensor) -> Iterator[Tensor]:
        """Decode latents (B, C_z, f, h, w) chunk by chunk: yields (B, 3, F', H, W), in order, as soon as each is done.

        The pieces joined along time are what `decode` returns, bit for bit. What is yielded is not kept here, so memory does not grow with
        the length of the video; with blended tiles, everything is decoded before the first piece. Slices of a batch go side by side, each
        with caches of its own: `decode` takes those of one.

        Raises:
            ValueError: as `decode`, before the first piece.
        """
        _check_video("decode", z, self.config["latent_channels"], 1)
        yield from self._code(self._coder("decode"), z)

    @apply_forward_hook
    @torch.no_grad()
    def encode_stream(self, pieces: Iterable[Tensor], num_frames: int) -> Iterator[Tensor]:
        """Encode a video that comes in pieces (B, 3, F', H, W) of any lengths, `num_frames` frames in all.

        Yields mean and log-variance of the latents, (B, 2 C_z, f', h, w), as soon as a chunk of frames is there; joined along time they are
        the parameters of what `encode` returns, bit for bit. How long the video is decides where chunks begin.

        Raises:
            ValueError: for pieces that do not fit or have another number of frames in all; with blended tiles, which need all at once.
        """
        coder = self._coder("encode")
        if self._saves(coder) and self.blended_tiling:
            raise ValueError("encode_stream cannot blend tiles, each of which needs all frames: call enable_tiling() without blended")
        yield from self._chunks(coder, _in_spans(pieces, coder, num_frames), num_frames)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode: (B, 3, F, H, W) -> (B, 3, F, H, W), through the posterior's mean or a sample of it."""
        posterior = self.encode(sample).latent_dist
        return self.decode(posterior.sample(generator) if sample_posterior else posterior.mode(), return_dict=return_dict)

    def _coder(self, direction: str) -> _Coder:
        """What encoding and decoding differ in. Raises ValueError for chunk sizes that tear apart what belongs together in time."""
        ratio = int(self.config["temporal_compression_ratio"])
        if direction == "encode":
            chunk = _check_chunk("num_sample_frames_batch_size", self.num_sample_frames_batch_size, ratio)
            return _Coder("encode", self.encoder, chunk, self.spatial_ratio, 1, lambda n: -(-n // ratio), after=self.quant_conv)
        if direction != "decode":
            raise ValueError(f"direction={direction!r} is not possible: it is one of {DIRECTIONS}")
        chunk = _check_chunk("num_latent_frames_batch_size", self.num_latent_frames_batch_size, 2)
        return _Coder(
            "decode", self.decoder, chunk, 1, self.spatial_ratio, lambda n: ratio * n - (n % 2) * (ratio - 1), before=self.post_quant_conv
        )

    def _whole(self, coder: _Coder, x: Tensor) -> Tensor:
        """All that x (B, C, F, H, W) is coded to; of batch elements that are taken one by one, each ends before the next one begins."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._whole(coder, part) for part in x.split(1)])
        return torch.cat(list(self._code(coder, x)), dim=2)

    def _code(self, coder: _Coder, x: Tensor) -> Iterator[Tensor]:
        """x (B, C, F, H, W) in pieces along time: batch elements one by one if slicing, blended tiles if asked for, chunks."""
        parts = x.split(1) if self.use_slicing else [x]
        rows, columns = self.tile_axes(x.shape[-2] // coder.in_scale, x.shape[-1] // coder.in_scale)
        larger = rows.length > rows.size or columns.length > columns.size
        if self.blended_tiling and self._saves(coder) and larger:

            def whole(tile: Tensor) -> Tensor:
                return torch.cat(list(self._walk(coder, tile)), dim=2)

            scales = {"in_scale": coder.in_scale, "out_scale": coder.out_scale}
            yield torch.cat([map_tiles(whole, part, rows, columns, **scales) for part in parts])
        elif len(parts) == 1:
            yield from self._walk(coder, x)
        else:
            yield from map(torch.cat, zip(*(self._walk(coder, part) for part in parts), strict=True))

    def _walk(self, coder: _Coder, x: Tensor) -> Iterator[Tensor]:
        chunks = (x[:, :, start:stop] for start, stop in chunk_spans(x.shape[2], coder.chunk))
        return self._chunks(coder, chunks, x.shape[2])

    def _chunks(self, coder: _Coder, chunks: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
        """Code the chunks of a video of `frames` frames, one after the other."""
        cache: ConvCache | None = None
        ways: list[Saving] = []
        try:
            for chunk in chunks if coder.before is None else map(coder.before, chunks):
                share = self.row_share(chunk.shape[3]) if coder.name == "decode" else None
                if self._as_written(coder, chunk):
                    cache = ConvCache() if cache is None else cache.advance()
                    yield _by_textbook(coder, chunk, cache, share)
                    continue
                height = chunk.shape[3] if share is None else share.sizes[share.group.rank]
                ways = ways or self._ways(coder, (*chunk.shape[:2], frames, height, chunk.shape[4]), chunk.device)
                piece, cache, ways = _in_memory(coder, chunk, cache, ways, share)
                yield piece
                del piece
        finally:  # also where whoever reads the pieces stops
            if any(hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook") for module in self.modules()):
                forget(coder.tower)  # offloaded weights are gone: what was derived from them has no business on the device

    def _as_written(self, coder: _Coder, x: Tensor) -> bool:
        """Whether to compute each layer as it is written down: for gradients, for compilers, and on request."""
        if self.textbook or torch.compiler.is_compiling() or _is_compiled(coder.tower):
            return True
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in coder.tower.parameters()))

    def _saves(self, coder: _Coder) -> bool:
        return self.use_tiling and coder.name in self.tiled_directions

    def _ways(self, coder: _Coder, shape: Sequence[int], device: torch.device) -> list[Saving]:
        """Ways to save memory in coding a tensor of this shape on `device`, the first one that fits and more thorough ones.

        The device is that of the tensor: offloaded weights are elsewhere, or nowhere, between the layers' calls.
        """
        if self.saving is not None:
            return [self.saving]
        height, width = (side * self.spatial_ratio // coder.in_scale for side in shape[3:])
        ways = savings(height, device, self.band_rows(width) if self._saves(coder) else None)

        def estimate(way: Saving) -> int:
            return self.estimate_peak(shape, coder.name, way)

        return choose_saving(ways, estimate, free_memory(device))


def _check_block_types(name: str, types: tuple[str, ...], expected: str, widths: tuple[int, ...]) -> None:
    if len(types) != len(widths) or set(types) != {expected}:
        raise ValueError(
            f"{name}={tuple(types)} is not a CogVideoX VAE: it must name {expected!r} once for each of block_out_channels={tuple(widths)}"
        )


def _check_unset(**options: object) -> None:
    """Raise ValueError for an option of the released config files that has no effect anywhere."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name}={value} would have no effect: CogVideoX scales latents by scaling_factor alone. Leave it None.")


def _check_chunk(name: str, size: int, multiple: int) -> int:
    """`size`, or a ValueError when frames that are resampled in time together would come into different chunks."""
    if size < multiple or size % multiple:
        raise ValueError(f"{name}={size} tears groups of frames apart: it must be a positive multiple of {multiple}")
    return size


def _check_video(verb: str, x: Tensor, channels: int, multiple: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels or not x.shape[2]:
        raise ValueError(f"{verb} takes (batch, {channels}, frames, height, width) with at least one frame, got {tuple(x.shape)}")
    if x.shape[-2] % multiple or x.shape[-1] % multiple:
        raise ValueError(
            f"{verb}: height and width must be multiples of {multiple}, got {x.shape[-2]}x{x.shape[-1]}: crop or pad the video first"
        )


def _is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to the model or a part of it."""
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in model.modules())


def _new_cache(saving: Saving, device: torch.device) -> ConvCache:
    return HostConvCache(device) if saving.offload else ConvCache()


def _by_textbook(coder: _Coder, chunk: Tensor, cache: ConvCache, share: RowShare | None) -> Tensor:
    """One chunk (B, C, F, H, W) as it is written down. Raises ValueError where rows are shared by ranks."""
    if share is not None:
        raise ValueError(
            "Rows are shared by ranks without gradients and without compilation only: decode under torch.no_grad(), or call "
            "disable_row_parallelism()."
        )
    if torch.is_grad_enabled():
        forget(coder.tower)  # the weights are about to change
    return coder(chunk, Textbook(cache, chunk if coder.name == "decode" else None))


def _in_memory(
    coder: _Coder, chunk: Tensor, cache: ConvCache | None, ways: list[Saving], share: RowShare | None
) -> tuple[Tensor, ConvCache, list[Saving]]:
    """One chunk (B, C, F, H, W) in the first of the `ways` for which there is memory: the result, its cache, and the ways that are left.

    Only the first chunk, the largest, goes on to the next way: caches are updated in place, and other ranks would not know.
    """
    while True:
        current = _new_cache(ways[0], chunk.device) if cache is None else cache.advance()
        try:
            return coder.exactly(chunk, current, ways[0], share), current, ways
        except (RuntimeError, MemoryError) as error:
            if cache is not None or len(ways) == 1 or share is not None or not is_out_of_memory(error):
                raise
            ways = ways[1:]
            logger.warning(f"The VAE found too little memory and goes on in smaller parts: {ways[0]}.")


def _in_spans(pieces: Iterable[Tensor], coder: _Coder, num_frames: int) -> Iterator[Tensor]:
    """The frames of `pieces` (B, 3, F', H, W) in the chunks of a video of `num_frames` frames. Raises ValueError for another number."""
    waiting: list[Tensor] = []
    spans = chunk_spans(num_frames, coder.chunk)
    seen = 0
    for piece in pieces:
        _check_video("encode", piece, coder.tower.conv_in.conv.in_channels, coder.in_scale)
        seen += piece.shape[2]
        waiting.append(piece)
        while spans and seen >= spans[0][1]:
            start, stop = spans.pop(0)
            frames = torch.cat(waiting, dim=2)
            yield frames[:, :, : stop - start]
            waiting = [frames[:, :, stop - start :]]
    if spans or seen != num_frames:
        raise ValueError(f"num_frames={num_frames}, but the pieces have {seen} frames: say how many there are in all")
