"""Pipelines: from a prompt to a video."""

from __future__ import annotations

from .conditioning import Condition
from .output import CogVideoXPipelineOutput
from .pipeline import CogVideoXPipeline
from .sampling import shifted_config

__all__ = ["CogVideoXPipeline", "CogVideoXPipelineOutput", "Condition", "shifted_config"]
