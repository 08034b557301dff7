"""A video repainted as another prompt says, keeping where things are: python examples/video_to_video.py [MODEL [OUTPUT.mp4 [INPUT.mp4]]]

Without INPUT.mp4 the video is a clip of moving shapes. The lower the strength, the closer the result stays to the source.
"""

import sys

import torch

from diffusers_cogvideox import CogVideoXVideoToVideoPipeline
from diffusers_cogvideox.data.moving_shapes import FPS, MovingShapes
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/video_to_video.mp4"
source = sys.argv[3] if len(sys.argv) > 3 else (MovingShapes().sample(0).video + 1) / 2

pipe = CogVideoXVideoToVideoPipeline.from_pretrained(model)
generator = torch.Generator().manual_seed(0)
frames = pipe(source, "a red circle moves right", strength=0.7, num_inference_steps=20, guidance_scale=4.0, generator=generator).frames[0]
print(write_video(output, frames, FPS))
