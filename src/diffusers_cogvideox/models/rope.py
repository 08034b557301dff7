"""3D rotary position code: the positions of the video tokens, their rotation angles, and the rotation itself.

The d channels of a head are split d/4 : 3d/8 : 3d/8 over time, rows and columns (CogVideoX paper, section 2.2, "3D-RoPE"). Channel pair i
of an axis with c channels turns by the angle position * theta^(-2i/c). Text tokens are not rotated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..geometry import Geometry

__all__ = [
    "apply_rotary",
    "as_complex",
    "resized_positions",
    "riflex_frequencies",
    "rope_for",
    "rotary_embedding",
    "rotate_",
    "with_text",
]

THETA = 10000.0
ROTATED = 1024  # tokens of a half-precision tensor that are float32 at a time
RIFLEX_SHARE = 0.9  # of a period that a long video may take up, as in the authors' code

Rotary = tuple[Tensor, Tensor]  # cos, sin


def rope_for(
    config: Mapping[str, Any],
    latent_frames: int,
    latent_height: int,
    latent_width: int,
    device: torch.device | str | None = None,
    *,
    riflex: bool = False,
) -> Rotary | None:
    """The rotary tables that a transformer of this `config` wants for latents of this size, or None when it has no rotary code.

    CogVideoX 1.0 squeezes the grid into the one it was trained on ("linspace", `resized_positions`). CogVideoX 1.5 counts 0, 1, 2, ...
    however large the video is (the paper prefers this extrapolation), so portrait and oversized videos need no special case.

    Args:
        config: the transformer's config (`transformer.config` or its config.json).
        latent_frames: latent frames, after the padding in front that CogVideoX 1.5 needs.
        latent_height, latent_width: latent size.
        device: where to put the tables.
        riflex: lower one frequency of the time axis, for videos much longer than the model was trained for (`riflex_frequencies`).

    Returns:
        (cos, sin), each (N, attention_head_dim) in float32 with tokens in (frame, row, column) order.

    Raises:
        ValueError: the patch does not divide the latents, the head dimension cannot be split, or `riflex` would have no effect.
    """
    if not config.get("use_rotary_positional_embeddings"):
        if riflex:
            raise ValueError("riflex=True has no effect: this transformer has no rotary positions (CogVideoX-2B). Leave it out.")
        return None
    geometry = Geometry.from_transformer(config)
    frames, rows, columns = geometry.token_grid(latent_frames, latent_height, latent_width)
    if config.get("patch_size_t") is None:
        _, *trained = geometry.token_grid(latent_frames, config["sample_height"], config["sample_width"])
        y, x = resized_positions((rows, columns), (trained[0], trained[1]), device)
    else:
        y, x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    width = config["attention_head_dim"]
    if not riflex:
        return rotary_embedding(torch.arange(frames, device=device), y, x, width)
    native = geometry.latent_frames(config["sample_frames"])
    trained_frames, *_ = geometry.token_grid(native + geometry.front_padding(native), latent_height, latent_width)
    time = riflex_frequencies(_frequencies(4 * _unit(width), device), trained_frames, frames)
    return rotary_embedding(torch.arange(frames, device=device), y, x, width, time)


def resized_positions(grid: tuple[int, int], trained: tuple[int, int], device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Positions of the rows and columns of a `grid` laid into the middle of the `trained` grid, keeping the aspect ratio (CogVideoX 1.0).

    An axis of n tokens that covers [start, stop) of the trained grid gets n equal steps from start to stop * (n - 1) / n. The last
    factor scales the whole stop, not the distance to start, as in the original code; at the trained size the positions are 0, 1, 2, ...

    Returns:
        positions of the rows (rows,) and of the columns (columns,), float32.
    """
    rows, columns = grid
    if rows / columns > trained[0] / trained[1]:
        covered = trained[0], round(trained[0] / rows * columns)
    else:
        covered = round(trained[1] / columns * rows), trained[1]
    starts = [round((whole - part) / 2) for whole, part in zip(trained, covered, strict=True)]
    y, x = (
        torch.linspace(start, (start + part) * (n - 1) / n, n, device=device, dtype=torch.float32)
        for start, part, n in zip(starts, covered, grid, strict=True)
    )
    return y, x


def rotary_embedding(t: Tensor, y: Tensor, x: Tensor, head_dim: int, time_frequencies: Tensor | None = None) -> Rotary:
    """Tables (cos, sin) for tokens at every combination of the positions t (frames,), y (rows,) and x (columns,).

    `time_frequencies` (head_dim / 8,), in radians per frame, take the place of theta^(-2i/c) on the time axis.

    Returns:
        cos and sin, each (N, head_dim) in float32, N = frames * rows * columns; both channels of a pair hold the same value.

    Raises:
        ValueError: `head_dim` is not a multiple of 16 (three axes of whole channel pairs in the ratio 2 : 3 : 3).
    """
    unit = _unit(head_dim)
    time = _frequencies(4 * unit, t.device) if time_frequencies is None else time_frequencies
    space = _frequencies(6 * unit, y.device)
    axes = (
        (t.float()[:, None] * time)[:, None, None],
        (y.float()[:, None] * space)[None, :, None],
        (x.float()[:, None] * space)[None, None, :],
    )
    joint = torch.cat([angles.expand(len(t), len(y), len(x), -1) for angles in axes], dim=-1)
    joint = joint.flatten(0, 2).repeat_interleave(2, dim=-1)  # N x head_dim
    return joint.cos(), joint.sin()


def _unit(head_dim: int) -> int:
    """A sixteenth of the head: time has 4 of them, rows and columns 6 each."""
    if head_dim % 16:
        raise ValueError(f"attention_head_dim={head_dim} cannot carry 3D rotary positions: it must be a multiple of 16.")
    return head_dim // 16


def _frequencies(channels: int, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of every channel pair: theta^(-2i/c), (channels / 2,), float32."""
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels
    return 1.0 / THETA**exponents


def riflex_frequencies(frequencies: Tensor, trained_frames: int, frames: int) -> Tensor:
    r"""Frequencies of the time axis for a video of `frames` token frames, more than it takes for the model to repeat itself.

    "RIFLEx: A Free Lunch for Length Extrapolation in Video Diffusion Transformers" (arXiv 2502.15894, section 3): a video that is
    longer than trained repeats itself with the period of its intrinsic frequency theta_k. Lowered to

        theta_k' = 0.9 * 2 pi / frames                (eq. 8; the factor is from the authors' code)

    the whole video stays within one period. The paper finds k by watching where videos repeat; here it is the fastest component
    that does not repeat within the trained length, 2 pi / theta_k >= trained_frames, which is the same one for all models that
    the paper treats: k = 2 (counted from 1) with a period of 20 for CogVideoX, k = 4 with a period of 50 for HunyuanVideo.

    Args:
        frequencies: theta_1 > theta_2 > ..., (c / 2,), radians per token frame.
        trained_frames: token frames of the videos that the model was trained on.
        frames: token frames of this video, or of one context window of it.

    Raises:
        ValueError: for a video that ends before the intrinsic frequency repeats, which needs no change.
    """
    periods = (2 * math.pi / frequencies).tolist()
    k = next((i for i, period in enumerate(periods) if period >= trained_frames), len(periods) - 1)
    if frames <= periods[k]:
        raise ValueError(
            f"riflex=True has no effect on {frames} token frames: this model repeats itself only after {periods[k]:.0f}. Leave it out."
        )
    lowered = frequencies.clone()
    lowered[k] = RIFLEX_SHARE * 2 * math.pi / frames
    return lowered


def with_text(rotary: Rotary, text_length: int) -> Rotary:
    """Tables for the joint sequence [text; video] from those of the video: text tokens turn by angle 0, which is exactly the identity.

    Args:
        rotary: (cos, sin), each (N, d).
        text_length: L.

    Returns:
        (cos, sin), each (L + N, d).
    """
    cos, sin = rotary
    pad = (0, 0, text_length, 0)
    return torch.nn.functional.pad(cos, pad, value=1.0), torch.nn.functional.pad(sin, pad)


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate neighbouring channel pairs, (a, b) -> (a cos - b sin, b cos + a sin), in float32.

    Args:
        x: (B, S, heads, d).
        rotary: (cos, sin), each (S, d).

    Returns:
        the rotated x, in its own dtype.
    """
    cos, sin = (table.unsqueeze(1) for table in rotary)  # S x 1 x d, over batch and heads
    signed = torch.stack((-sin[..., ::2], sin[..., 1::2]), dim=-1).flatten(-2)
    exchanged = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (b, a): for a compiler only other addresses
    return (x.float() * cos + exchanged.float() * signed).to(x.dtype)


def as_complex(rotary: Rotary) -> Tensor:
    """Tables (cos, sin), each (S, d) with equal values for both channels of a pair, as cos + i sin: (S, d / 2), complex64."""
    cos, sin = (table[:, ::2].float() for table in rotary)
    return torch.complex(cos, sin)


def rotate_(x: Tensor, turns: Tensor) -> Tensor:
    """As `apply_rotary`, in place and without gradients: (a + i b) (cos + i sin), in float32.

    One pass over memory for a float32 tensor, in place of six; one of half precision is made float32 ROTATED tokens at a time.

    Args:
        x: (B, S, heads, d), contiguous or a part of a contiguous tensor; nobody else may need it.
        turns: of `as_complex`, (S, d / 2).

    Returns:
        x.
    """
    turns = turns.unsqueeze(1)  # S x 1 x d/2, over batch and heads
    if x.dtype == torch.float32:
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns)
        return x
    for part, turn in zip(x.split(ROTATED, dim=1), turns.split(ROTATED), strict=True):
        wide = part.float()
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(turn)
        part.copy_(wide)
    return x
