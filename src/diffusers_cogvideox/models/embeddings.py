"""From latents, text features and scalars to tokens: patches, text projection, absolute positions, time and ofs embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import logging
from diffusers.utils.torch_utils import maybe_adjust_dtype_for_device
from torch import Tensor, nn

from ..geometry import Geometry

__all__ = ["CogVideoXPatchEmbed", "embed_scalar", "patchify", "per_sample", "resize_table", "sincos_table", "unpatchify"]

logger = logging.get_logger(__name__)

Grid = tuple[int, int, int]  # tokens in time, rows, columns


def patchify(latents: Tensor, geometry: Geometry) -> Tensor:
    """Latents (B, F, C, H, W) to tokens (B, N, C p_t p p): tokens in (frame, row, column), features in (c, p_t, p_h, p_w) order."""
    t, h, w = geometry.token_grid(latents.shape[1], latents.shape[3], latents.shape[4])
    x = latents.transpose(1, 2)  # B C F H W
    x = x.unflatten(4, (w, -1)).unflatten(3, (h, -1)).unflatten(2, (t, -1))  # B C t p_t h p_h w p_w
    return x.movedim((2, 4, 6), (1, 2, 3)).flatten(4).flatten(1, 3)


def unpatchify(tokens: Tensor, grid: Grid, geometry: Geometry) -> Tensor:
    """Inverse of `patchify`: tokens (B, N, C * p_t * p * p) on a (t, h, w) grid to latents (B, F, C, H, W)."""
    patch = geometry.patch_size_t, geometry.patch_size, geometry.patch_size
    x = tokens.unflatten(-1, (-1, *patch)).unflatten(1, grid)  # B t h w C p_t p_h p_w
    x = x.movedim((1, 2, 3), (2, 4, 6))  # B C t p_t h p_h w p_w
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3).transpose(1, 2)


def _sincos(positions: int, scale: float, channels: int, device: torch.device) -> Tensor:
    """[sin(p w_i), cos(p w_i)], w_i = 10000^(-i / (channels / 2)), of p = 0, 1, ... divided by `scale`: (positions, channels)."""
    precise = maybe_adjust_dtype_for_device(torch.float64, device)
    frequencies = 10000.0 ** -(torch.arange(channels // 2, dtype=precise, device=device) / (channels / 2))
    angles = (torch.arange(positions, dtype=torch.float32, device=device) / scale).to(precise)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_table(grid: Grid, dim: int, spatial_scale: float, temporal_scale: float, like: Tensor) -> Tensor:
    """3D sin-cos table of CogVideoX-2B: channels [time: D/4][column: 3D/8][row: 3D/8], positions divided by the two scales.

    Args:
        grid: tokens (t, h, w).
        dim: width D, a multiple of 16.
        spatial_scale, temporal_scale: `spatial_interpolation_scale` and `temporal_interpolation_scale` of the config.
        like: gives device and dtype; the angles are computed in float64 where the device has it.

    Returns:
        (N, D).

    Raises:
        ValueError: D cannot be split.
    """
    if dim % 16:
        raise ValueError(f"a model width of {dim} cannot carry 3D sin-cos positions: it must be a multiple of 16.")
    t, h, w = grid
    time = _sincos(t, temporal_scale, dim // 16 * 4, like.device).to(like.dtype)[:, None, None]
    rows, columns = (_sincos(n, spatial_scale, dim // 16 * 6, like.device).to(like.dtype) for n in (h, w))
    parts = time, columns[None, None], rows[None, :, None]
    return torch.cat([part.expand(t, h, w, -1) for part in parts], dim=-1).flatten(0, 2)


def resize_table(table: Tensor, trained: Grid, grid: Grid) -> Tensor:
    """Fit a learned position table (N, D) of the `trained` grid to `grid`: fewer frames take the first ones, other sizes are interpolated.

    The original code slices the table, which is right for fewer frames of the trained size. Anything else no model was trained for:
    the table is resized linearly along rows, columns and, for more frames, time, and a warning is logged once per size.

    Returns:
        (N', D) for the tokens of `grid`.
    """
    if grid[1:] == trained[1:] and grid[0] <= trained[0]:
        return table[: grid[0] * grid[1] * grid[2]]
    if not torch.compiler.is_compiling():
        _warn_resized(trained, grid)
    volume = table.unflatten(0, trained)[: grid[0]].movedim(-1, 0)  # D t h w
    return nn.functional.interpolate(volume[None], size=grid, mode="trilinear")[0].flatten(1).T


@cache
def _warn_resized(trained: Grid, grid: Grid) -> None:
    logger.warning(
        f"The learned position table was trained for {'x'.join(map(str, trained))} tokens (time x rows x columns) and is interpolated "
        f"to {'x'.join(map(str, grid))}: expect lower quality than at the trained size."
    )


class CogVideoXPatchEmbed(nn.Module):
    """Project text features and latent patches to the model's width and add absolute positions, if the model has them.

    CogVideoX 1.0 (`patch_size_t` None) projects with a convolution, 1.5 with a linear layer on `patchify`'s features.

    Args:
        config: the transformer's config.
    """

    pos_embedding: Tensor

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.geometry = Geometry.from_transformer(config)
        self.dim = dim = config["num_attention_heads"] * config["attention_head_dim"]
        self.scales = config["spatial_interpolation_scale"], config["temporal_interpolation_scale"]
        self.has_sincos = not config["use_rotary_positional_embeddings"]
        self.has_table = config["use_learned_positional_embeddings"]
        self.max_text_length = config["max_text_seq_length"]
        self.is_linear = config["patch_size_t"] is not None
        channels, p = config["in_channels"], config["patch_size"]
        self.proj: nn.Module
        if self.is_linear:
            self.proj = nn.Linear(channels * config["patch_size_t"] * p * p, dim)
        else:
            self.proj = nn.Conv2d(channels, dim, kernel_size=p, stride=p, bias=config["patch_bias"])
        self.text_proj = nn.Linear(config["text_embed_dim"], dim)
        if self.has_table:
            frames = self.geometry.latent_frames(config["sample_frames"])
            self.trained_grid = self.geometry.token_grid(frames, config["sample_height"], config["sample_width"])
            table = sincos_table(self.trained_grid, dim, *self.scales, like=self.text_proj.weight)
            self.register_buffer("pos_embedding", torch.cat([table.new_zeros(self.max_text_length, dim), table])[None])

    def forward(self, text: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Embed.

        Args:
            text: features of the text encoder (B, L, E).
            latents: (B, F, C, H, W).

        Returns:
            text tokens (B, L, D) and video tokens (B, N, D).

        Raises:
            ValueError: inputs on another device or in another dtype than the weights, latents that the patch does not divide, or more
                text tokens than a learned table has.
        """
        _require_match(self.text_proj, text, "encoder_hidden_states")
        _require_match(self.proj, latents, "hidden_states")
        grid = self.geometry.token_grid(latents.shape[1], latents.shape[3], latents.shape[4])
        text, video = self.text_proj(text), self._embed_patches(latents)
        if self.has_sincos:
            video = video + sincos_table(grid, self.dim, *self.scales, like=video)
        if self.has_table:
            text_table, video_table = self._learned_tables(text.shape[1], grid)
            text, video = text + text_table.to(text.dtype), video + video_table.to(video.dtype)
        return text, video

    def _embed_patches(self, latents: Tensor) -> Tensor:
        """(B, F, C, H, W) -> (B, N, D)."""
        if self.is_linear:
            return self.proj(patchify(latents, self.geometry))
        features = self.proj(latents.flatten(0, 1))  # (B F) D h w
        return features.unflatten(0, latents.shape[:2]).movedim(2, -1).flatten(1, 3)

    def _learned_tables(self, text_length: int, grid: Grid) -> tuple[Tensor, Tensor]:
        """Learned positions (L, D) of the text and (N, D) of the video."""
        if text_length > self.max_text_length:
            raise ValueError(
                f"{text_length} text tokens are more than the {self.max_text_length} (max_text_seq_length) of the learned position table: "
                "encode the prompt with at most that many tokens."
            )
        table = self.pos_embedding[0]
        return table[:text_length], resize_table(table[self.max_text_length :], self.trained_grid, grid)


def _require_match(layer: nn.Module, value: Tensor, name: str) -> None:
    """Refuse an input of another dtype or device than a layer's weights, unless autocast, a hook or quantisation takes care of it."""
    weight: Any = layer.weight
    kind = weight.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook") or not weight.is_floating_point():
        return
    if weight.device != value.device or (weight.dtype != value.dtype and not autocast):
        raise ValueError(
            f"{name} is {value.dtype} on {value.device}, but the transformer's weights are {weight.dtype} on {weight.device}: "
            "move one of them with .to(device, dtype)."
        )


def embed_scalar(value: float | Tensor, sinusoid: Timesteps, mlp: TimestepEmbedding, like: Tensor, name: str) -> Tensor:
    """Embed one number per sample: a sinusoid in float32, cast, then Linear - SiLU - Linear.

    Args:
        value: a number, or a tensor () or (1,) for the whole batch, or (B,).
        sinusoid, mlp: the two modules, with mlp output width E.
        like: (B, ...), gives batch size, device and dtype.
        name: how to call the value in an error.

    Returns:
        (1, E) or (B, E).

    Raises:
        ValueError: another number of values.
    """
    return mlp(sinusoid(per_sample(value, like, name)).to(like.dtype))


def per_sample(value: float | Tensor, like: Tensor, name: str) -> Tensor:
    """One number for the whole batch of `like` (B, ...), or one for each sample, as a tensor (1,) or (B,) on its device.

    Raises ValueError, which calls the value by `name`, for another number of values.
    """
    values = torch.as_tensor(value, device=like.device).reshape(-1)
    if len(values) not in (1, len(like)):
        raise ValueError(f"{name} has {len(values)} values for a batch of {len(like)}: give one, or one per sample.")
    return values
