"""See the video come out of the noise, and stop early: python examples/watch_denoising.py [MODEL [OUTPUT.png]]"""

import sys

import torch

from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import contact_sheet, write_image

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/watch_denoising.png"

pipe = CogVideoXPipeline.from_pretrained(model)
rows = []


def show(pipe: CogVideoXPipeline, step: int, _timestep: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict:
    """Decode every fourth state of the latents; stop after the sixteenth step."""
    if step % 4 == 3:
        video = pipe.decode_latents(tensors["latents"])[0].movedim(0, -1)  # F H W 3
        rows.append(((video / 2 + 0.5).clamp(0, 1) * 255).byte().numpy())
    pipe._interrupt = step == 15
    return {}


pipe("a red circle moves right", num_inference_steps=20, generator=torch.Generator().manual_seed(0), callback_on_step_end=show)
labels = [f"after step {4 * i}" for i in range(1, len(rows) + 1)]
print(write_image(output, contact_sheet(rows, labels=labels)))
