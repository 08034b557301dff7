"""CogVideoX for Hugging Face diffusers: models, sampler and pipelines as a plugin."""

from __future__ import annotations

# diffusers looks for the base classes of our components in the module that a model folder names, which is this one.
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .community import community_pipeline
from .geometry import Geometry
from .host import register, registered, unregister
from .models.autoencoder import AutoencoderKLCogVideoX
from .models.transformer import CogVideoXTransformer3DModel
from .pipelines import (
    CogVideoXContinuationPipeline,
    CogVideoXFunControlPipeline,
    CogVideoXFunInpaintPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXPipelineOutput,
    CogVideoXVideoToVideoPipeline,
    ContextWindows,
    SkipLayers,
    shifted_config,
)
from .presets import PRESETS, match_preset
from .schedulers.scheduler import CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXScheduler

__all__ = [
    "PRESETS",
    "AutoencoderKLCogVideoX",
    "CogVideoXContinuationPipeline",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CogVideoXFunControlPipeline",
    "CogVideoXFunInpaintPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXPipeline",
    "CogVideoXPipelineOutput",
    "CogVideoXScheduler",
    "CogVideoXTransformer3DModel",
    "CogVideoXVideoToVideoPipeline",
    "ContextWindows",
    "DiffusionPipeline",
    "Geometry",
    "ModelMixin",
    "SchedulerMixin",
    "SkipLayers",
    "community_pipeline",
    "match_preset",
    "register",
    "registered",
    "shifted_config",
    "unregister",
]
