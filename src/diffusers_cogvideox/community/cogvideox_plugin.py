"""Community pipeline: diffusers copies this file and takes the one pipeline class that it finds in it."""

from diffusers_cogvideox import CogVideoXPipeline

__all__ = ["CogVideoXPipeline"]
