"""A video through the VAE and back, in tiles: python examples/reconstruct.py [MODEL [OUTPUT.mp4 [INPUT.mp4]]]

Without INPUT.mp4 the video is a clip of moving shapes. Frames are cropped to what the VAE takes: 8k + 1 of them, sizes in multiples of 8.
"""

import sys

import torch

from diffusers_cogvideox import AutoencoderKLCogVideoX
from diffusers_cogvideox.data.moving_shapes import FPS, MovingShapes
from diffusers_cogvideox.demo import demo_model
from diffusers_cogvideox.video_io import read_video, write_video

model = sys.argv[1] if len(sys.argv) > 1 else demo_model()
output = sys.argv[2] if len(sys.argv) > 2 else "outputs/reconstruct.mp4"

vae = AutoencoderKLCogVideoX.from_pretrained(model, subfolder="vae")
vae.enable_tiling(64, 64)
if len(sys.argv) > 3:
    frames, fps = read_video(sys.argv[3])
    pixels = torch.from_numpy(frames) / 127.5 - 1
else:
    pixels, fps = torch.from_numpy(MovingShapes().sample(0).video), FPS
count, height, width = (n - (n - start) % 8 for n, start in zip(pixels.shape, (1, 0, 0), strict=False))
video = pixels[:count, :height, :width].movedim(-1, 0)[None]  # 1 3 F H W
with torch.no_grad():
    latents = vae.encode(video).latent_dist.mode()
    rebuilt = vae.decode(latents).sample
psnr = -10 * torch.log10(((rebuilt - video) / 2).square().mean())
print(f"{tuple(video.shape[2:])} -> {tuple(latents.shape[1:])}, PSNR {psnr:.1f} dB")
print(write_video(output, ((rebuilt[0].movedim(0, -1) / 2 + 0.5).clamp(0, 1) * 255).round().byte(), fps))
