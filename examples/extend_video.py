"""A video and what happens next: python examples/extend_video.py [MODEL [OUTPUT.mp4 [INPUT.mp4]]]

Without INPUT.mp4 the video is a clip of moving shapes. The frames that are given stay as they are; eight more are made.
"""

import sys

import torch

from diffusers_cogvideox import CogVideoXContinuationPipeline
from diffusers_cogvideox.data.moving_shapes import FPS, MovingShapes
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/extend_video.mp4"
clip = MovingShapes().sample(0)
source, prompt = (sys.argv[3], "") if len(sys.argv) > 3 else ((clip.video + 1) / 2, clip.caption)

pipe = CogVideoXContinuationPipeline.from_pretrained(model)
settings = {"overlap_frames": 1, "num_inference_steps": 20, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
frames = pipe(source, prompt, num_frames=8, **settings).frames[0]
print(write_video(output, frames, FPS))
