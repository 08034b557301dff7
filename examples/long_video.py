"""Three times as many frames as the model makes at once, in the memory of one window: python examples/long_video.py [MODEL [OUTPUT.mp4]]"""

import sys

import torch

from diffusers_cogvideox import CogVideoXPipeline, ContextWindows
from diffusers_cogvideox.data.moving_shapes import FPS
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/long_video.mp4"

pipe = CogVideoXPipeline.from_pretrained(model)
windows = ContextWindows(frames=17, overlap=8, shuffle_noise=True)
settings = {"num_inference_steps": 20, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
frames = pipe("a red circle rotates on a white background", num_frames=49, context=windows, output_type="stream", **settings).frames[0]
print(write_video(output, frames, FPS))
