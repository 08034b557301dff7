"""The pipelines by name: thin classes that turn their arguments into a `Request` and a `Condition`."""

# Annotations stay real objects here: diffusers reads the classes of the components from `__init__`.

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.models import AutoencoderKLCogVideoX as StockVAE
from diffusers.models import CogVideoXTransformer3DModel as StockTransformer
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.transformer import CogVideoXTransformer3DModel
from ..presets import match_preset
from .base import CogVideoXPipelineBase
from .conditioning import Condition, noise_condition
from .output import CogVideoXPipelineOutput
from .request import Request

__all__ = ["CogVideoXPipeline"]


class CogVideoXPipeline(CogVideoXPipelineBase):
    """Text to video.

    Loads the released text-to-video checkpoints (CogVideoX-2b, -5b, 1.5-5B) with this package's models and schedulers;
    diffusers' own models and schedulers are accepted as components too.

    Args:
        tokenizer: T5 tokenizer.
        text_encoder: T5 encoder.
        vae: 3D causal VAE.
        transformer: expert transformer.
        scheduler: any scheduler of the DDPM family that predicts velocities.
    """

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX | StockVAE,
        transformer: CogVideoXTransformer3DModel | StockTransformer,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self._register(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float = 6,
        use_dynamic_cfg: bool | str = False,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
        sequential_guidance: bool = False,
        zero_unconditional: bool = False,
    ) -> CogVideoXPipelineOutput | tuple[Any]:
        """Make videos of what the prompts say.

        Args:
            prompt: one text or a list of B texts.
            negative_prompt: what to steer away from, one text for all or one for each prompt; "" by default.
            height, width: pixels, multiples of 16; by default the size that the model was trained for.
            num_frames: 8k + 1; by default as trained.
            num_inference_steps, timesteps: number of steps, or own falling timesteps for schedulers that take them.
            guidance_scale: w in u + w (c - u); 1 or less predicts once per step, without guidance.
            use_dynamic_cfg: True or "stock" for swinging guidance as released, "progress" for a smooth rise from 1 to 1 + w.
            num_videos_per_prompt: videos for each prompt; they follow each other in the result.
            eta: share of fresh noise in a DDIM step, 0 to 1.
            generator: source of the noise, one for all videos or one for each.
            latents: noise to start from, (videos, latent frames, channels, height / 8, width / 8).
            prompt_embeds, negative_prompt_embeds: embeddings (B, L, D_text) in place of text.
            output_type, return_dict: "pil", "np", "pt" or "latent"; False for a tuple in place of an output object.
            attention_kwargs: handed to the attention processors; `{"scale": s}` scales a LoRA.
            callback_on_step_end: f(pipe, step, timestep, tensors) after each step; what it returns replaces the tensors.
            callback_on_step_end_tensor_inputs: which to show it: "latents" (default), "prompt_embeds", "negative_prompt_embeds".
            max_sequence_length: text tokens; by default as the transformer's config says.
            sequential_guidance: predict the two halves one after the other: half the activation memory, no faster.
            zero_unconditional: zeros for the unconditional half, as in the original code, in place of the embedding of "".

        Raises ValueError or TypeError, before anything runs, for arguments that cannot give what they ask for.
        """
        request = Request.from_call(locals(), self.call_defaults())
        self._check_task()

        def from_noise(_: Tensor, like: Tensor) -> Condition:
            return noise_condition(request, self.geometry, self.latent_channels, self.scheduler, latents, like)

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
