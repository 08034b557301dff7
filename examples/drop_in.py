"""Code written for diffusers, on this package's classes by one added line: python examples/drop_in.py [MODEL [OUTPUT.mp4]]"""

import sys

import torch
from diffusers import DiffusionPipeline

import diffusers_cogvideox
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/drop_in.mp4"

with diffusers_cogvideox.registered():  # or register() at the start of a program
    pipe = DiffusionPipeline.from_pretrained(model)
print(f"{type(pipe.transformer).__module__}.{type(pipe.transformer).__name__}")
frames = pipe("a red circle moves right", num_inference_steps=25, generator=torch.Generator().manual_seed(0)).frames[0]
print(write_video(output, frames, fps=8))
