"""One seed, several samplers, one contact sheet: python examples/compare_samplers.py [MODEL [OUTPUT.png]]"""

import sys

import diffusers
import numpy as np
import torch

from diffusers_cogvideox import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import contact_sheet, write_image

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/compare_samplers.png"

pipe = CogVideoXPipeline.from_pretrained(model)
samplers = {
    "DDIM": (CogVideoXDDIMScheduler, 0.0),
    "DDIM, eta 1 (as noisy as DDPM)": (CogVideoXDDIMScheduler, 1.0),
    "SDE-DPM-Solver++": (CogVideoXDPMScheduler, 0.0),
    "DDIM of diffusers": (diffusers.CogVideoXDDIMScheduler, 0.0),
}
rows = []
for scheduler, eta in samplers.values():
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    frames = pipe("a red circle moves right", num_inference_steps=20, eta=eta, generator=generator).frames[0]
    rows.append(np.stack([np.asarray(frame) for frame in frames]))
print(write_image(output, contact_sheet(rows, labels=list(samplers))))
