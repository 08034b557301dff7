"""What quantised weights cost in quality: the error of one pass, of whole videos, and what the videos still show.

    python benchmarks/quantisation.py [--prompts 24]

The shipped model on the CPU. The reference is the same transformer in float32; bfloat16 is what all ways compute in. nf4, whose kernels
need a GPU, is measured by rounding the weights to it and back. Writes results/quantisation.json.
"""

from __future__ import annotations

import argparse
import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import RESULTS, write_result
from diffusers_cogvideox.evaluation.metrics import psnr
from diffusers_cogvideox.evaluation.shapes import evaluate_shapes, held_out_prompts
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.generation.settings import choose_settings, load_pipeline
from diffusers_cogvideox.models.rope import rope_for
from diffusers_cogvideox.options import DEMO, EvaluateOptions
from diffusers_cogvideox.runtime.quantisation import KEPT, QUANTISATIONS, quantise
from diffusers_cogvideox.runtime.streamed_parts import named_tensors

TIMESTEPS = (999, 749, 499, 249, 49)


def rounded_to_nf4(model: nn.Module) -> nn.Module:
    """The same layers as other ways quantise, with weights that nf4 can hold."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not any(part in KEPT for part in name.split(".")):
            packed, state = quantize_4bit(layer.weight.data.float(), quant_type="nf4", compress_statistics=True)
            layer.weight.data = dequantize_4bit(packed, state).to(layer.weight.dtype)
    return model


def in_way(name: str, transformer: nn.Module) -> nn.Module:
    """A copy of the float32 transformer, stored in the way of that name."""
    model = copy.deepcopy(transformer)
    if name != "float32":
        nn.Module.to(model, torch.bfloat16)
    if name == "nf4":
        return rounded_to_nf4(model)
    return model if name in ("float32", "bfloat16") else quantise(model, name, "cpu")


@torch.no_grad()
def velocities(transformer: Any, embeds: Tensor) -> Tensor:
    """Predictions (T, B, F, C, H, W) for noise, in float32, at some timesteps."""
    config = transformer.config
    shape = (len(embeds), (config.sample_frames - 1) // 4 + 1, config.out_channels, config.sample_height, config.sample_width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rotary = rope_for(config, shape[1], *shape[3:], noise.device)
    inputs = {"hidden_states": noise.to(transformer.dtype), "encoder_hidden_states": embeds.to(transformer.dtype)}
    passes = (transformer(**inputs, timestep=t, image_rotary_emb=rotary, return_dict=False)[0].float() for t in TIMESTEPS)
    return torch.stack(list(passes))


def main() -> None:
    """Measure every way that can be measured here, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--output", type=Path, default=RESULTS / "quantisation.json")
    given = parser.parse_args()
    check_writable(given.output)
    options = EvaluateOptions("shapes", DEMO, prompts=given.prompts, baselines=False)
    pipe = load_pipeline(choose_settings(options, DEMO))
    transformer = pipe.transformer
    texts = [prompt.text for prompt in held_out_prompts(8)]
    embeds, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=transformer.config.max_text_seq_length)

    rows: dict[str, dict[str, Any]] = {}
    references: dict[str, tuple[Tensor, list[np.ndarray]]] = {}
    for name in ("float32", "bfloat16", *QUANTISATIONS):
        package = QUANTISATIONS[name].package if name in QUANTISATIONS else None
        if name == "fp8-dynamic" or (package and find_spec(package) is None):
            rows[name] = {"skipped": f"{package} is not installed" if name != "fp8-dynamic" else "needs a GPU of compute capability 8.9"}
            continue
        pipe.transformer = in_way(name, transformer)
        report = evaluate_shapes(pipe, options)
        result = velocities(pipe.transformer, embeds), [sample.video for sample in report.samples if sample.video is not None]
        references[name] = result
        rates = report.rows["generated"].rates
        rows[name] = {"rates": {key: f"{rate.right}/{rate.asked}" for key, rate in rates.items()}}
        if name != "nf4":
            rows[name]["mib"] = round(sum(tensor.nbytes for _, tensor in named_tensors(pipe.transformer)) / 2**20, 3)
        for other in ("float32", "bfloat16"):
            if other != name and other in references:
                rows[name][f"against {other}"] = compared(result, references[other])
        print(name, rows[name], flush=True)
    write_result(given.output, {"prompts": given.prompts, "timesteps": TIMESTEPS, "ways": rows})


def compared(result: tuple[Tensor, list[np.ndarray]], exact: tuple[Tensor, list[np.ndarray]]) -> dict[str, float]:
    """Relative rms error of the velocity, and the PSNR of the videos in dB (median and worst)."""
    error = (result[0] - exact[0]).square().mean().sqrt() / exact[0].square().mean().sqrt()
    quality = [psnr(video, other, 255) for video, other in zip(result[1], exact[1], strict=True)]
    return {"velocity": round(float(error), 5), "psnr": round(float(np.median(quality)), 2), "worst_psnr": round(min(quality), 2)}


if __name__ == "__main__":
    main()
