"""Do real clips go through every task at their full size? 49 frames of 480x720, and the VAE that ships with the package.

    python benchmarks/real_clips.py FOLDER [--frames 49] [--tile 256] [--processes 1]

FOLDER holds videos (.mp4). Of each, the shipped VAE makes latents and the video again (tiled: the PSNR of that says what a VAE that was
trained on drawn shapes of 64x64 pixels keeps of a real picture), and a transformer of the released 5B layout at a tiny width with random
weights, over that VAE's latents, does one step each of image to video, video to video (from half the noise) and inversion. Their latents
mean nothing; what counts is that all numbers are finite, their shapes, and peak memory, for which every clip has a process of its own.
Writes results/real_clips.json, and a contact sheet of every clip before and after the VAE.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import RESULTS, Stages, write_result
from diffusers_cogvideox import (
    PRESETS,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogVideoXVideoToVideoPipeline,
)
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.video_io import contact_sheet, read_video, to_uint8, write_image

WIDTH = {"num_attention_heads": 1, "attention_head_dim": 32, "num_layers": 1, "time_embed_dim": 32, "text_embed_dim": 32}
TOKENS = 8
SHOWN = 3  # every third pixel of a picture goes into the contact sheet


def tiny(preset: str, vae: AutoencoderKLCogVideoX) -> dict[str, Any]:
    """Components of a pipeline for a release at a tiny width, without text encoder."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(**PRESETS[preset].transformer | WIDTH | {"max_text_seq_length": TOKENS}).eval()
    scheduler = CogVideoXDDIMScheduler(**PRESETS[preset].scheduler)
    return {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": transformer, "scheduler": scheduler}


def calls(vae: AutoencoderKLCogVideoX, frames: np.ndarray) -> dict[str, Callable[[], torch.Tensor]]:
    """What is done with a clip (F, H, W, 3), by name: a call that returns latents."""
    text, image = tiny("5b", vae), tiny("5b-i2v", vae)
    common = {"prompt_embeds": torch.zeros(1, TOKENS, WIDTH["text_embed_dim"]), "height": frames.shape[1], "width": frames.shape[2]}
    once = {**common, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    half = {**once, "num_inference_steps": 2, "strength": 0.5}
    inverted = {**common, "num_inference_steps": 2, "iterations": 1}
    return {
        "image to video": lambda: CogVideoXImageToVideoPipeline(**image)(image=frames[0], num_frames=len(frames), **once).frames,
        "video to video": lambda: CogVideoXVideoToVideoPipeline(**text)(video=frames, **half).frames,
        "inversion": lambda: CogVideoXPipeline(**text).invert(video=frames, **inverted).latents,
    }


@torch.no_grad()
def rebuilt(vae: AutoencoderKLCogVideoX, frames: np.ndarray) -> np.ndarray:
    """The clip (F, H, W, 3) through the VAE and back."""
    video = torch.from_numpy(frames).movedim(-1, 0)[None].float() / 127.5 - 1
    decoded = vae.decode(vae.encode(video).latent_dist.mode()).sample[0]
    return to_uint8((decoded.clamp(-1, 1) / 2 + 0.5).movedim(0, -1).numpy())


def measure(path: Path, limit: int, tile: int) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Figures of one clip, and the clip before and after the VAE. Raises FloatingPointError for a result that is not finite."""
    vae = AutoencoderKLCogVideoX.from_pretrained(demo_model(), subfolder="vae", dtype=torch.float32).eval()
    vae.enable_tiling(tile, tile)
    frames, stages, shapes = read_video(path)[0][:limit], Stages(), {}
    with stages.stage("vae and back"):
        again = rebuilt(vae, frames)
    for name, call in calls(vae, frames).items():
        with stages.stage(name):
            latents = call()
        if not latents.isfinite().all():
            raise FloatingPointError(f"{path}: {name} is not finite")
        shapes[name] = list(latents.shape)
        print(path.name, name, shapes[name], stages.seconds[name], flush=True)
    figures = {
        "frames_height_width": list(frames.shape[:3]),
        "psnr_of_vae": round(float(psnr(again, frames, 255)), 2),
        "latents": shapes,
        "peak_gib": stages.peak_gib,
    }
    return figures, [video[:, ::SHOWN, ::SHOWN] for video in (frames, again)]


def main() -> None:
    """Measure every clip and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frames", type=int, default=49)
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "real_clips.json")
    given = parser.parse_args()
    check_writable(given.output)
    paths = sorted(given.folder.glob("*.mp4"))
    with get_context("spawn").Pool(given.processes, maxtasksperchild=1) as pool:
        measured = pool.map(partial(measure, limit=given.frames, tile=given.tile), paths, chunksize=1)
    clips = dict(zip((path.name for path in paths), measured, strict=True))
    figures = {name: found for name, (found, _) in clips.items()}
    write_result(given.output, {"frames": given.frames, "tile": given.tile, "clips": figures})
    labels = [f"{name}, {what}" for name in clips for what in ("as it is", "through the VAE")]
    write_image(given.output.with_suffix(".png"), contact_sheet([video for _, shown in clips.values() for video in shown], labels=labels))


if __name__ == "__main__":
    main()
