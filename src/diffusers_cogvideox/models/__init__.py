"""The two networks, as plain modules: they know nothing of prompts, samplers or files."""

from __future__ import annotations

from .autoencoder import AutoencoderKLCogVideoX
from .transformer import CogVideoXTransformer3DModel

__all__ = ["AutoencoderKLCogVideoX", "CogVideoXTransformer3DModel"]
