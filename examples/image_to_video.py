"""A picture that starts to move: python examples/image_to_video.py [MODEL [OUTPUT.mp4 [IMAGE]]]

Without IMAGE it is the first frame of a clip of moving shapes.
"""

import sys

import torch

from diffusers_cogvideox import CogVideoXImageToVideoPipeline
from diffusers_cogvideox.data.moving_shapes import FPS, MovingShapes
from diffusers_cogvideox.demo import demo_image_model
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_image_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/image_to_video.mp4"
clip = MovingShapes().sample(0)
image = sys.argv[3] if len(sys.argv) > 3 else (clip.video[0] + 1) / 2

pipe = CogVideoXImageToVideoPipeline.from_pretrained(model)
settings = {"num_inference_steps": 20, "guidance_scale": 4.0, "generator": torch.Generator().manual_seed(0)}
frames = pipe(image, clip.caption, **settings).frames[0]
print(write_video(output, frames, FPS))
