"""Does memory grow with the length of a video? Decoding and writing it whole against writing it while it is decoded.

    python benchmarks/streaming.py [--frames 49 481] [--size 128 192] [--vae FOLDER]

The latents are noise; what they show does not change the work. Every case runs in a process of its own, whose largest resident memory is
read, and what it was before decoding is told beside it. Times are of the processor, whatever else it does. Writes results/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.video_processor import VideoProcessor

from common import RESULTS, peak_gib, write_result
from diffusers_cogvideox import PRESETS, AutoencoderKLCogVideoX, Geometry
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.pipelines.decoding import VideoDecoder
from diffusers_cogvideox.video_io import probe_video, to_uint8, write_video

WAYS = ("whole", "collected", "stream")
"""One decode of everything; all frames as an array, decoded chunk by chunk (output_type="np"); written while they are decoded."""


def frames_of(way: str, decoder: VideoDecoder, latents: torch.Tensor) -> Iterable[np.ndarray]:
    """uint8 chunks (F', H, W, 3) of latents (1, f, C, h, w)."""
    if way == "stream":
        return decoder.streams(latents, decoder.extent(latents))[0]
    if way == "collected":
        return [to_uint8(decoder.collect(latents, decoder.extent(latents), "np")[0])]
    with torch.no_grad():
        video = decoder.vae.decode(latents.transpose(1, 2) / decoder.scaling_factor).sample
    return [to_uint8(decoder.processor.postprocess_video(video, output_type="np")[0])]


def run(way: str, frames: int, given: argparse.Namespace) -> dict[str, Any]:
    """Decode and write one video in this process: seconds to the first chunk and to the end, GiB before and at most."""
    vae = AutoencoderKLCogVideoX.from_pretrained(given.vae).eval()
    geometry = Geometry.from_configs(vae.config, PRESETS["2b"].transformer)
    decoder = VideoDecoder(
        vae=vae,
        geometry=geometry,
        scaling_factor=vae.config.scaling_factor,
        device=torch.device("cpu"),
        processor=VideoProcessor(vae_scale_factor=vae.spatial_ratio),
    )
    shape = (geometry.latent_frames(frames), vae.config.latent_channels, *geometry.latent_size(*given.size))
    latents = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    marks: list[float] = []

    def marked(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for chunk in chunks:
            marks.append(time.process_time())
            yield chunk

    with tempfile.TemporaryDirectory() as folder:
        before, started = peak_gib(), time.process_time()
        path = write_video(Path(folder) / "video.mp4", marked(frames_of(way, decoder, latents)), 8)
        seconds, written = time.process_time() - started, probe_video(path).num_frames
    if written != frames:
        raise RuntimeError(f"{written} frames were written, not {frames}.")
    times = {"first_frames": round(marks[0] - started, 3), "all": round(seconds, 3)}
    return {"before_gib": before, "peak_gib": peak_gib(), "processor_seconds": times}


def main() -> None:
    """Measure every way and length in turn, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[49, 481])
    parser.add_argument("--size", type=int, nargs=2, default=[128, 192], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--vae", type=Path, default=demo_model() / "vae")
    parser.add_argument("--output", type=Path, default=RESULTS / "streaming.json")
    parser.add_argument("--way", choices=WAYS, help="measure this way alone, in this process, and print the figures")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.frames[0], given)))
        return
    check_writable(given.output)
    rows: dict[str, dict[str, Any]] = {}
    for frames in given.frames:
        for way in WAYS:
            size = map(str, given.size)
            case = ["--way", way, "--frames", str(frames), "--vae", str(given.vae), "--size", *size]
            result = subprocess.run([sys.executable, __file__, *case], check=True, capture_output=True, text=True)
            rows.setdefault(way, {})[str(frames)] = json.loads(result.stdout.splitlines()[-1])
            print(frames, way, rows[way][str(frames)], flush=True)
    config = AutoencoderKLCogVideoX.load_config(given.vae)
    facts = {"what": "decode and write on the processor, float32", "widths": config["block_out_channels"], "size": given.size}
    write_result(given.output, {**facts, "ways": rows})


if __name__ == "__main__":
    main()
