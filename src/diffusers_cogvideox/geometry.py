"""Every size rule of the family, once: pixels <-> latents <-> tokens, legal frame counts, padding, chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["DECODE_CHUNK", "ENCODE_CHUNK", "MAX_FRAMES", "MAX_SIDE", "Geometry", "chunk_spans", "spatial_ratio"]

# GroupNorm statistics are taken per chunk, so these two sizes are part of the function that the VAE computes.
ENCODE_CHUNK = 8  # pixel frames
DECODE_CHUNK = 2  # latent frames

# Far above what any model of the family was trained for; a larger number is a slip of the keyboard.
MAX_FRAMES = 8193
MAX_SIDE = 8192  # pixels


def chunk_spans(length: int, size: int) -> list[tuple[int, int]]:
    """Split `length` frames into consecutive (start, stop) spans of `size`; the remainder joins the first span.

    >>> chunk_spans(13, 2)[:2], chunk_spans(3, 8)
    ([(0, 3), (3, 5)], [(0, 3)])
    """
    first = min(length, size + length % size)
    starts = [0, *range(first, length, size)]
    return list(zip(starts, [*starts[1:], length], strict=True))


def spatial_ratio(block_out_channels: Sequence[int]) -> int:
    """Pixels per latent of a VAE with these widths, one per level: every level but the last halves height and width."""
    return 2 ** (len(block_out_channels) - 1)


def _rounded_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one video for one model: F frames of H x W pixels, latent frames of h x w, tokens on a (t, y, x) grid."""

    temporal_ratio: int = 4
    spatial_ratio: int = 8
    patch_size: int = 2
    patch_size_t: int = 1

    @classmethod
    def from_transformer(cls, transformer: Mapping[str, Any]) -> Geometry:
        """Read the ratios that a transformer's config.json knows; `spatial_ratio` keeps the released VAE's value."""
        return cls(
            temporal_ratio=int(transformer["temporal_compression_ratio"]),
            patch_size=transformer["patch_size"],
            patch_size_t=transformer.get("patch_size_t") or 1,
        )

    @classmethod
    def from_configs(cls, vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> Geometry:
        """Read the four ratios from the two models' configs (config.json of vae/ and transformer/)."""
        ratios = {"temporal_ratio": int(vae["temporal_compression_ratio"]), "spatial_ratio": spatial_ratio(vae["block_out_channels"])}
        return replace(cls.from_transformer(transformer), **ratios)

    # --- frames ---------------------------------------------------------------------------------------------------

    @property
    def frame_step(self) -> int:
        """Legal frame counts are `frame_step * k + 1`: the decoder returns exactly those (an odd number of latent frames)."""
        return self.temporal_ratio * DECODE_CHUNK

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a causal video of `frames` frames: the first frame alone, then one per `temporal_ratio`."""
        return (frames - 1) // self.temporal_ratio + 1

    def frames(self, latent_frames: int) -> int:
        """Frames of a causal video of `latent_frames` latent frames; inverse of `latent_frames`."""
        return (latent_frames - 1) * self.temporal_ratio + 1

    def decoded_frames(self, latent_frames: int) -> int:
        """Frames that the chunked decoder returns: an even number of latent frames has no single first frame."""
        return self.frames(latent_frames) if latent_frames % 2 else latent_frames * self.temporal_ratio

    def front_padding(self, latent_frames: int) -> int:
        """Latent frames to add in front so that `patch_size_t` divides the total (CogVideoX 1.5 pads in front)."""
        return -latent_frames % self.patch_size_t

    def padded_frames(self, frames: int) -> int:
        """Smallest legal count of at least `frames`: what is generated for a video that is cropped to `frames`, at its end.

        Raises:
            ValueError: for a count that is not between 1 and MAX_FRAMES.
        """
        if not 1 <= frames <= MAX_FRAMES:
            nearest = 1 if frames < 1 else MAX_FRAMES
            raise ValueError(f"num_frames={frames} is not possible: it must be between 1 and {MAX_FRAMES}. Nearest legal: {nearest}.")
        return _rounded_up(frames - 1, self.frame_step) + 1

    def patched_frames(self, frames: int) -> int:
        """Smallest count of at least `frames` whose latents are whole patches in time, for videos that are padded at their end."""
        latent_frames = self.latent_frames(self.padded_frames(frames))
        return self.frames(latent_frames + self.front_padding(latent_frames))

    def unpadded_frames(self, latent_frames: int) -> int:
        """Frames of the video in `latent_frames` latent frames, of which `front_padding` may be one or more."""
        return self.frames(latent_frames - self.front_padding(latent_frames - 1))

    def check_frames(self, frames: int, name: str = "num_frames") -> int:
        """Return `frames` when a video of just that length can be generated, or raise ValueError naming the nearest legal counts.

        `name` is what the count is called where it was passed.
        """
        if frames < 1 or (frames - 1) % self.frame_step:
            below = max(0, (frames - 1) // self.frame_step) * self.frame_step + 1
            nearest = sorted({below, below + self.frame_step if frames > 0 else 1})
            raise ValueError(
                f"{name}={frames} cannot be decoded exactly: it must be {self.frame_step}k+1 (1 for a still image). "
                f"Nearest legal: {' or '.join(map(str, nearest))}."
            )
        return frames

    # --- pixels ---------------------------------------------------------------------------------------------------

    @property
    def pixel_multiple(self) -> int:
        """Height and width must be multiples of this: one token covers `patch_size` latents of `spatial_ratio` pixels."""
        return self.spatial_ratio * self.patch_size

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Latent (h, w) of a video of `height` x `width` pixels."""
        return height // self.spatial_ratio, width // self.spatial_ratio

    def pixel_size(self, latent_height: int, latent_width: int) -> tuple[int, int]:
        """Pixels (H, W) of latents of h x w."""
        return latent_height * self.spatial_ratio, latent_width * self.spatial_ratio

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Smallest legal (H, W) of at least `height` x `width`: what is generated for a video that is cropped to that size.

        Raises:
            ValueError: for a side of less than one token, or of more than MAX_SIDE pixels.
        """
        m = self.pixel_multiple
        if not all(m <= n <= MAX_SIDE for n in (height, width)):
            nearest = [min(max(n, m), MAX_SIDE) for n in (height, width)]
            raise ValueError(
                f"size {height}x{width} (height x width) is not possible: each must be between {m} and {MAX_SIDE} pixels. "
                f"Nearest legal size: {nearest[0]}x{nearest[1]}."
            )
        return _rounded_up(height, m), _rounded_up(width, m)

    def margins(self, height: int, width: int) -> tuple[int, int]:
        """Pixels (top, left) between the edge of the padded picture and the `height` x `width` in its middle that is kept."""
        padded = self.padded_size(height, width)
        return (padded[0] - height) // 2, (padded[1] - width) // 2

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latents (f, h, w) that a video of `frames` x `height` x `width` is cut from: padded, without `front_padding`."""
        return self.latent_frames(self.padded_frames(frames)), *self.latent_size(*self.padded_size(height, width))

    def check_size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) when just that size can be generated, or raise ValueError naming the nearest legal size."""
        m = self.pixel_multiple
        if height < m or width < m or height % m or width % m:
            nearest = [max(m, round(n / m) * m) for n in (height, width)]
            raise ValueError(
                f"size {height}x{width} (height x width) is not possible: both must be positive multiples of {m}. "
                f"Nearest legal size: {nearest[0]}x{nearest[1]}."
            )
        return height, width

    # --- tokens ---------------------------------------------------------------------------------------------------

    def token_grid(self, latent_frames: int, latent_height: int, latent_width: int) -> tuple[int, int, int]:
        """Tokens (t, y, x) of latents, after `front_padding`. Raises ValueError when the patch does not divide them."""
        p, p_t = self.patch_size, self.patch_size_t
        if latent_frames % p_t or latent_height % p or latent_width % p:
            raise ValueError(
                f"latents of {latent_frames}x{latent_height}x{latent_width} (frames x height x width) cannot be cut into "
                f"patches of {p_t}x{p}x{p}: each must divide. Pad frames in front and choose pixels in multiples of {self.pixel_multiple}."
            )
        return latent_frames // p_t, latent_height // p, latent_width // p
