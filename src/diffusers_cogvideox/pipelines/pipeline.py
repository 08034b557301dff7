"""Text to video: the pipeline whose loop starts from noise alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..presets import match_preset
from .base import CogVideoXPipelineBase
from .call import task_call
from .conditioning import Condition, noise_condition
from .output import CogVideoXPipelineOutput
from .request import Request

__all__ = ["CogVideoXPipeline"]


class CogVideoXPipeline(CogVideoXPipelineBase):
    """Text to video: loads the released text-to-video checkpoints, CogVideoX-2b, -5b and 1.5-5B."""

    @task_call()
    def __call__(self, request: Request) -> CogVideoXPipelineOutput | tuple[Any]:
        """Make videos of what the prompts say."""
        self._check_task()

        def from_noise(_: Tensor, like: Tensor) -> Condition:
            return noise_condition(request, self.geometry, self.latent_channels, self.scheduler, like)

        return self.generate(request, from_noise)

    def _check_task(self) -> None:
        """Raise ValueError for a transformer that wants more than noise: an image, a mask or a control video."""
        config = self.transformer.config
        if config.in_channels != self.latent_channels:
            preset = match_preset(config)
            raise ValueError(
                f"This transformer reads {config.in_channels} channels, {config.in_channels - self.latent_channels} more than the latents "
                f"of a video have: it is not a text-to-video model. Use {preset.pipeline if preset else 'the pipeline of its task'}."
            )
