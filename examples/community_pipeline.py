"""The pipeline through diffusers' `custom_pipeline=`: python examples/community_pipeline.py [MODEL [OUTPUT.mp4]]"""

import sys

import torch
from diffusers import DiffusionPipeline

from diffusers_cogvideox import community_pipeline
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/community_pipeline.mp4"

pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=community_pipeline(), trust_remote_code=True)
frames = pipe("a red circle moves right", num_inference_steps=25, generator=torch.Generator().manual_seed(0)).frames[0]
print(write_video(output, frames, fps=8))
