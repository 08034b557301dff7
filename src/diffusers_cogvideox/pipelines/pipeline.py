"""Text to video: the pipeline whose loop starts from noise alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..tasks import check_task
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
        check_task(self.transformer.config, "text")

        def from_noise(_: Tensor, like: Tensor) -> Condition:
            return noise_condition(request, self.geometry, self.latent_channels, self.scheduler, like)

        return self.generate(request, from_noise)
