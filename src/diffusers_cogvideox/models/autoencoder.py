"""`AutoencoderKLCogVideoX`: the 3D causal VAE, 4x8x8 compression. One walk over batch, tiles and chunks for both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..geometry import DECODE_CHUNK, ENCODE_CHUNK, chunk_spans, spatial_ratio
from .causal_conv import ConvCache
from .tiling import TileAxis, map_tiles
from .vae_blocks import Decoder, Encoder

__all__ = ["DIRECTIONS", "AutoencoderKLCogVideoX"]

DIRECTIONS = ("encode", "decode")


class AutoencoderKLCogVideoX(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]
    """Video (B, 3, F, H, W) in [-1, 1] <-> latents (B, C_z, f, h, w), f = (F - 1) / 4 + 1, h = H / 8, w = W / 8.

    Frames are processed in chunks (8 frames when encoding, 2 latent frames when decoding, the remainder in the first chunk),
    with the causal convolutions' last frames carried over (CogVideoX paper, arXiv:2408.06072, section 2.1). GroupNorm
    statistics are taken per chunk, so the chunk sizes are part of the function; `num_sample_frames_batch_size` and
    `num_latent_frames_batch_size` may be set to others, with other results. `latents * scaling_factor` is what the transformer
    sees. Config keys and state-dict keys are those of the released checkpoints (`vae/config.json`).

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
        self.use_slicing = False
        self.use_tiling = False
        self.tiled_directions = frozenset(DIRECTIONS)
        self.tile_sample_min_height = sample_height // 2
        self.tile_sample_min_width = sample_width // 2
        self.tile_overlap_factor_height = 1 / 6
        self.tile_overlap_factor_width = 1 / 5

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor_height: float | None = None,
        tile_overlap_factor_width: float | None = None,
        directions: Collection[str] = DIRECTIONS,
    ) -> None:
        """Encode and decode in overlapping, linearly blended tiles: less memory, not the same function (statistics per tile).

        Args:
            tile_sample_min_height, tile_sample_min_width: tile size in pixels; a tile covers the whole latent cells
                (of 8 x 8 pixels) that fit. Pictures that are not larger are not tiled.
            tile_overlap_factor_height, tile_overlap_factor_width: share of a tile, in [0, 1), that is blended with its
                neighbour; rounded to whole latent cells.
            directions: ("encode", "decode"), or the only one of them to tile; each call says it anew.

        Raises:
            ValueError: a tile smaller than one latent cell, a factor outside [0, 1) or an unknown direction.
        """
        if not directions or set(directions) - set(DIRECTIONS):
            raise ValueError(f"directions={directions!r} is not possible: name one or both of {DIRECTIONS}")
        sizes: Mapping[str, float | None] = {
            "tile_sample_min_height": tile_sample_min_height,
            "tile_sample_min_width": tile_sample_min_width,
        }
        factors: Mapping[str, float | None] = {
            "tile_overlap_factor_height": tile_overlap_factor_height,
            "tile_overlap_factor_width": tile_overlap_factor_width,
        }
        for name, value in sizes.items():
            if value is not None and value < self.spatial_ratio:
                raise ValueError(f"{name}={value} is smaller than one latent cell: choose at least {self.spatial_ratio} pixels")
        for name, value in factors.items():
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name}={value} must lie in [0, 1): it is the share of a tile that overlaps its neighbour")
        for name, value in {**sizes, **factors}.items():
            if value is not None:
                setattr(self, name, value)
        self.tiled_directions = frozenset(directions)
        self.use_tiling = True

    @property
    def tile_latent_min_height(self) -> int:
        """Rows of latent cells of a tile; set `tile_sample_min_height`."""
        return max(1, self.tile_sample_min_height // self.spatial_ratio)

    @property
    def tile_latent_min_width(self) -> int:
        """Columns of latent cells of a tile; set `tile_sample_min_width`."""
        return max(1, self.tile_sample_min_width // self.spatial_ratio)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Video (B, 3, F, H, W) in [-1, 1] -> the latents' diagonal Gaussian, mean and log-variance (B, C_z, f, h, w) each."""
        _check_video("encode", x, self.config["in_channels"], self.spatial_ratio)
        chunk = _check_chunk(
            "num_sample_frames_batch_size", self.num_sample_frames_batch_size, int(self.config["temporal_compression_ratio"])
        )
        posterior = DiagonalGaussianDistribution(self._run(self._encode_chunk, x, chunk, "encode", in_scale=self.spatial_ratio))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, C_z, f, h, w), not multiplied by the scaling factor -> video (B, 3, F, H, W).

        An odd f gives 4(f-1)+1 frames; an even f has no single first frame and gives 4f.
        """
        _check_video("decode", z, self.config["latent_channels"], 1)
        chunk = _check_chunk("num_latent_frames_batch_size", self.num_latent_frames_batch_size, 2)
        video = self._run(self._decode_chunk, z, chunk, "decode", out_scale=self.spatial_ratio)
        return DecoderOutput(sample=video) if return_dict else (video,)

    def decode_stream(self, z: Tensor) -> Iterator[Tensor]:
        """Decode latents (B, C_z, f, h, w) piece by piece: yields (B, 3, F', H, W), in order, as soon as each is done.

        The pieces joined along time are what `decode` returns, bit for bit. What is yielded is not kept here.
        """
        with torch.no_grad():
            yield self.decode(z).sample

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

    def _encode_chunk(self, x: Tensor, cache: ConvCache) -> Tensor:
        moments = self.encoder(x, cache)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode_chunk(self, z: Tensor, cache: ConvCache) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), cache)

    def _run(
        self, coder: Callable[[Tensor, ConvCache], Tensor], x: Tensor, chunk: int, direction: str, *, in_scale: int = 1, out_scale: int = 1
    ) -> Tensor:
        """Apply a chunk coder to x (B, C, F, H, W): batch elements one by one if slicing, tiles if tiling, then chunks."""

        def whole(part: Tensor) -> Tensor:
            cache, results = ConvCache(), []
            for start, stop in chunk_spans(part.shape[2], chunk):
                results.append(coder(part[:, :, start:stop], cache))
                cache = cache.advance()
            return torch.cat(results, dim=2)

        rows, columns = self._tile_axes(x.shape[-2] // in_scale, x.shape[-1] // in_scale)
        tiled = self.use_tiling and direction in self.tiled_directions and (rows.length > rows.size or columns.length > columns.size)
        parts = x.split(1) if self.use_slicing else [x]
        if tiled:
            return torch.cat([map_tiles(whole, part, rows, columns, in_scale=in_scale, out_scale=out_scale) for part in parts])
        return torch.cat([whole(part) for part in parts])

    def _tile_axes(self, latent_height: int, latent_width: int) -> tuple[TileAxis, TileAxis]:
        """Tiles of the current settings over latents of this size; the overlap leaves each tile at least one cell of its own."""

        def axis(length: int, size: int, factor: float) -> TileAxis:
            return TileAxis(length, size, min(round(size * factor), size - 1))

        return (
            axis(latent_height, self.tile_latent_min_height, self.tile_overlap_factor_height),
            axis(latent_width, self.tile_latent_min_width, self.tile_overlap_factor_width),
        )


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
