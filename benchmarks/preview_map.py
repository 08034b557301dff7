"""How well a linear map of the latents shows the colours of a video, for the live preview of `cogvideox generate --preview`.

    python benchmarks/preview_map.py [--model FOLDER] [--write]

Fits the map on clips of moving shapes, and beside it the one that needs no clips (fitted to random colours), and measures both on held-out
clips. Writes results/preview_map.json and a contact sheet; with --write also the map into the model's cogvideox.json, which has to be
done again when the VAE was trained anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write_result
from diffusers_cogvideox import AutoencoderKLCogVideoX, Geometry
from diffusers_cogvideox.data.moving_shapes import MovingShapes
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.files import atomic_path, check_writable
from diffusers_cogvideox.generation.model_folder import RECOMMENDATIONS, ModelFolder
from diffusers_cogvideox.generation.preview import Preview, PreviewMap, fit_to_vae, mean_colours
from diffusers_cogvideox.options import DEMO
from diffusers_cogvideox.pipelines.folder import read_json
from diffusers_cogvideox.video_io import contact_sheet, write_image


@torch.no_grad()
def encoded(vae: AutoencoderKLCogVideoX, count: int, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` clips (B, 3, F, H, W) and their latents (B, C, f, h, w)."""
    clips = torch.from_numpy(MovingShapes(seed=7, held_out=held_out).batch(0, count)[0]).movedim(-1, 1)
    return clips, torch.cat([vae.encode(clip).latent_dist.mode() for clip in clips.split(4)])


def measured(colours: PreviewMap, latents: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Share of the variance that a map explains, and its PSNR on [-1, 1] colours (B, 3, f, h, w)."""
    found = colours(latents)
    spread = (wanted - wanted.mean(dim=(0, 2, 3, 4), keepdim=True)).square().sum()
    share = 1 - ((found - wanted).square().sum() / spread).item()
    return {"explained": round(share, 4), "psnr_db": round(float(psnr(found.numpy(), wanted.numpy(), 2)), 2)}


def store(folder: Path, colours: PreviewMap) -> None:
    """Put the map into the model's cogvideox.json, one row of numbers per line."""
    file = folder / RECOMMENDATIONS
    content = read_json(file) if file.is_file() else {}
    text = json.dumps({**content, "preview": "MAP"}, indent=2)
    numbers = colours.to_json()
    rows = ",\n".join(f"      {json.dumps(row)}" for row in numbers["weight"])
    body = f'{{\n    "weight": [\n{rows}\n    ],\n    "bias": {json.dumps(numbers["bias"])}\n  }}'
    with atomic_path(file) as partial:
        partial.write_text(text.replace('"MAP"', body) + "\n", encoding="utf-8")


def main() -> None:
    """Fit, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "preview_map.json")
    given = parser.parse_args()
    check_writable(given.output)
    folder = ModelFolder.open(given.model)
    vae = AutoencoderKLCogVideoX.from_pretrained(folder.path, subfolder="vae", torch_dtype=torch.float32)
    geometry = Geometry.from_configs(vae.config, folder.configs["transformer"])
    clips, latents = encoded(vae, given.clips, held_out=False)
    maps = {"clips": PreviewMap.fit(latents, mean_colours(clips, geometry)), "random colours": fit_to_vae(vae, geometry)}
    clips, latents = encoded(vae, 32, held_out=True)
    rows: dict[str, Any] = {name: measured(colours, latents, mean_colours(clips, geometry)) for name, colours in maps.items()}
    print(rows)
    write_result(given.output, {"model": folder.fingerprint(), "fitted_clips": given.clips, "held_out_clips": 32, "fitted_to": rows})
    shown = [((clips[0].movedim(0, -1) + 1) * 127.5).round().byte()[:: geometry.temporal_ratio]]
    shown += [torch.from_numpy(Preview(given.output, m, geometry, 1.0).frames(latents[:1].transpose(1, 2))) for m in maps.values()]
    print(write_image(given.output.with_suffix(".png"), contact_sheet(shown, labels=["video", *maps])))
    if given.write:
        store(folder.path, maps["clips"])


if __name__ == "__main__":
    main()
