"""Clips as latents: encoding them once, keeping them with a note of what they were made from, and their statistics."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.moving_shapes import MovingShapes
from ..files import atomic_path
from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.layout import frames_mask, masked
from .config import DataOptions

__all__ = ["KEPT", "VIEWS", "clips_of", "encode_clips", "latent_statistics", "made_from", "read_latents", "write_latents"]

_NOTE = "made_from"  # key of the safetensors header

KEPT = {"starts": (0,), "ends": (0, -1)}
"""The frames that the views of inpainting models keep."""


def _with_frames(kept: tuple[int, ...], video: Tensor) -> Tensor:
    frames, height, width = video.shape[2:]
    return masked(video, frames_mask(frames, height, width, kept).to(video.device))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "latents": lambda video: video,
    "images": lambda video: video[:, :, :1],
    **{view: partial(_with_frames, kept) for view, kept in KEPT.items()},
}
"""What is encoded of a clip (B, 3, F, H, W): all of it; its first frame as a picture; all of it with black in place of all but KEPT."""


def clips_of(data: DataOptions, frames: int) -> MovingShapes:
    """The clips of this length that a run trains on."""
    emphasis = data.emphasis if frames > 1 else None  # nothing moves in a single frame
    return MovingShapes(data.seed, objects=data.objects, frames=frames, height=data.height, width=data.width, emphasis=emphasis)


def latent_statistics(latents: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of latents (N, F, C, H, W), overall and per channel, and the scaling factor 1 / std."""
    values = latents.float()
    per_channel = values.transpose(0, 2).flatten(1)
    return {
        "mean": values.mean().item(),
        "std": values.std().item(),
        "scaling_factor": 1 / values.std().item(),
        "channel_mean": per_channel.mean(1).tolist(),
        "channel_std": per_channel.std(1).tolist(),
    }


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLCogVideoX, world: MovingShapes, span: range, *, view: str = "latents", bf16: bool = False, batch_size: int = 16
) -> Tensor:
    """Latents (N, F, C, H, W) float16 of the samples of `world` numbered in `span`: the posterior's mean, unscaled.

    `view` is what is encoded of each, a key of VIEWS. `bf16` runs convolutions in bfloat16.
    """
    parts = []
    for start in tqdm(range(span.start, span.stop, batch_size), desc=f"encoding {view} of {world.frames}-frame clips", mininterval=5):
        videos, _, _ = world.batch(start, min(batch_size, span.stop - start))
        video = VIEWS[view](torch.from_numpy(videos).movedim(-1, 1).to(vae.device, vae.dtype))
        with torch.autocast(video.device.type, torch.bfloat16, enabled=bf16):
            latents = vae.encode(video).latent_dist.mode()
        parts.append(latents.transpose(1, 2).half().cpu())
    return torch.cat(parts)


# --- in files -------------------------------------------------------------------------------------------------------------


def made_from(data: DataOptions, frames: int, vae: nn.Module, *, bf16: bool) -> dict[str, Any]:
    """All that the latents of clips of so many frames depend on, for `write_latents`: options by name, and a hash of the VAE's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().numpy(force=True).tobytes())  # in C order, whatever the memory format
    options = {f"data.{name}": value for name, value in asdict(data).items() if frames > 1 or name != "emphasis"}
    facts = {**options, "the weights of the vae": digest.hexdigest()[:16], "mixed_precision": "bf16" if bf16 else "no"}
    return json.loads(json.dumps(facts))


def write_latents(path: Path, latents: Tensor, facts: Mapping[str, Any]) -> None:
    """Write latents (N, F, C, H, W) with what they were made from in the header of the file."""
    with atomic_path(path) as partial:
        save_file({"latents": latents}, partial, metadata={_NOTE: json.dumps(facts)})


def read_latents(path: Path, facts: Mapping[str, Any]) -> Tensor:
    """The latents (N, F, C, H, W) of a file that was made from the same things.

    Raises:
        ValueError: when it was made from others, or does not say from what; the message names what has changed.
    """
    with safe_open(path, "pt") as file:
        note = json.loads((file.metadata() or {}).get(_NOTE, "{}"))
        if not note:
            raise ValueError(f"{path} does not say from what its clips were encoded. Delete it to have them encoded anew.")
        if changed := [f"{name} ({note.get(name)}, now {value})" for name, value in facts.items() if note.get(name) != value]:
            raise ValueError(
                f"{path} holds clips that were encoded with other settings: {', '.join(changed)}. Delete it to have them encoded anew, "
                "restore the settings, or choose another output."
            )
        return file.get_tensor("latents")
