"""Pipelines: from a prompt to a video."""

from __future__ import annotations

from .conditioning import Condition
from .continuation import CogVideoXContinuationPipeline
from .fun_control import CogVideoXFunControlPipeline
from .fun_inpaint import CogVideoXFunInpaintPipeline
from .image_to_video import CogVideoXImageToVideoPipeline
from .output import CogVideoXPipelineOutput
from .pipeline import CogVideoXPipeline
from .sampling import shifted_config
from .skip_layers import SkipLayers
from .video_to_video import CogVideoXVideoToVideoPipeline
from .windows import ContextWindows

__all__ = [
    "CogVideoXContinuationPipeline",
    "CogVideoXFunControlPipeline",
    "CogVideoXFunInpaintPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXPipeline",
    "CogVideoXPipelineOutput",
    "CogVideoXVideoToVideoPipeline",
    "Condition",
    "ContextWindows",
    "SkipLayers",
    "shifted_config",
]
