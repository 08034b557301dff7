"""Files for diffusers' `custom_pipeline=` argument, one pipeline each."""

from __future__ import annotations

from pathlib import Path

__all__ = ["community_pipeline"]


def community_pipeline() -> str:
    """Path of the text-to-video pipeline for `DiffusionPipeline.from_pretrained(folder, custom_pipeline=path, trust_remote_code=True)`."""
    return str(Path(__file__).with_name("cogvideox_plugin.py"))
