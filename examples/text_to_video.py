"""Text to video with this package's classes: python examples/text_to_video.py [MODEL [OUTPUT.mp4]]

MODEL is a pipeline folder or a hub repository such as zai-org/CogVideoX-5b, by default the small model of the package.
"""

import sys

import torch

from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/text_to_video.mp4"

pipe = CogVideoXPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
generator = torch.Generator().manual_seed(0)
frames = pipe("a red circle moves right", num_inference_steps=25, generator=generator).frames[0]
print(write_video(output, frames, fps=8))
