"""One video made by several processes together: torchrun --nproc_per_node 2 examples/several_gpus.py [MODEL [OUTPUT.mp4]]

Every rank has the whole pipeline and makes the same call, with the same seed; within it, they share the work. Runs alone, too.
"""

import sys

import torch

from diffusers_cogvideox import CogVideoXPipeline
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.runtime.launch import together
from diffusers_cogvideox.runtime.parallel import share_work
from diffusers_cogvideox.video_io import write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/several_gpus.mp4"

with together() as launch:
    pipe = CogVideoXPipeline.from_pretrained(model).to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=not launch.first)
    if not launch.alone:
        roles = share_work(pipe)  # or mode="cfg", "ulysses", "ring", "tensor"
        print(f"rank {launch.rank} of {launch.count}: {roles.of(launch.rank)}")

    generator = torch.Generator().manual_seed(0)
    frames = pipe("a red circle moves right", num_inference_steps=25, generator=generator).frames[0]
    if launch.first:
        print(write_video(output, frames, fps=8))
