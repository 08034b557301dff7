"""The part that all tasks share: components, state, text to embeddings, one call, latents to video."""

# Annotations stay real objects here: diffusers reads the classes of the components from `__init__`.

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import AutoencoderKLCogVideoX as StockVAE
from diffusers.models import CogVideoXTransformer3DModel as StockTransformer
from diffusers.models.modeling_utils import get_parameter_device
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.video_processor import VideoProcessor
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from ..geometry import Geometry
from ..models.autoencoder import AutoencoderKLCogVideoX
from ..models.transformer import CogVideoXTransformer3DModel
from ..presets import PRESETS, match_preset
from ..runtime.calibration import Calibration
from ..runtime.health import check_dtype, run_checked
from .caching import CacheReport, with_cache
from .conditioning import Condition
from .decoding import VideoDecoder
from .denoising import denoise
from .fitting import FittingMixin
from .inversion import InversionMixin
from .lora import CogVideoXLoraMixin
from .native import native_call
from .output import CogVideoXPipelineOutput
from .portability import PortablePipeline
from .prompts import PromptInputs
from .request import OUTPUT_TYPES, Request
from .sampling import Stepper, check_scheduler, set_timesteps
from .single_file import SingleFilePipelineMixin
from .story import joined_parts

__all__ = ["CogVideoXPipelineBase"]

MakeCondition = Callable[[Tensor, Tensor], Condition]
"""(timesteps (N,), a tensor with the dtype and device of the latents) -> Condition."""

Walk = Callable[[Tensor], tuple[Tensor, Stepper]]
"""The scheduler's timesteps (N,) -> the timesteps (M,) to walk, and the step to walk them with."""


class CogVideoXPipelineBase(SingleFilePipelineMixin, FittingMixin, PortablePipeline, CogVideoXLoraMixin, InversionMixin):
    """Components, state and the course of one call of every CogVideoX pipeline.

    A task is a subclass whose `__call__` makes the `Condition` of a `Request`, and hands both to `generate`. Callbacks may set
    `_guidance_scale` and `_interrupt` while the loop runs. diffusers' own models and schedulers are accepted as components too.

    Args:
        tokenizer: T5 tokenizer.
        text_encoder: T5 encoder.
        vae: 3D causal VAE.
        transformer: expert transformer.
        scheduler: any scheduler of the DDPM family that predicts velocities.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components: list[str] = []  # noqa: RUF012 - diffusers reads plain class attributes
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]  # noqa: RUF012

    calibration: Calibration | None = None
    cache_report: CacheReport | None = None
    tokenizer: Any
    text_encoder: Any
    vae: Any
    transformer: Any
    scheduler: Any

    def __init__(
        self,
        tokenizer: T5Tokenizer,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLCogVideoX | StockVAE,
        transformer: CogVideoXTransformer3DModel | StockTransformer,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler)
        self.video_processor = VideoProcessor(vae_scale_factor=self.vae_scale_factor_spatial)
        self._guidance_scale = 1.0
        self._attention_kwargs: dict[str, Any] | None = None
        self._current_timestep: Tensor | None = None
        self._interrupt = False
        self._num_timesteps = 0

    # --- facts about the model, under the names that diffusers' pipelines have --------------------------------------

    @property
    def geometry(self) -> Geometry:
        """Size rules of this model; a component that was left out counts as the released one."""
        vae = PRESETS["2b"].vae if self.vae is None else self.vae.config
        transformer = PRESETS["2b"].transformer if self.transformer is None else self.transformer.config
        return Geometry.from_configs(vae, transformer)

    @property
    def latent_channels(self) -> int:
        """Channels C of a video's latents: what the transformer predicts."""
        return self.transformer.config.out_channels or self.transformer.config.in_channels

    @property
    def vae_scale_factor_spatial(self) -> int:
        """Pixels per latent, in height and in width."""
        return self.geometry.spatial_ratio

    @property
    def vae_scale_factor_temporal(self) -> int:
        """Frames per latent frame."""
        return self.geometry.temporal_ratio

    @property
    def vae_scaling_factor_image(self) -> float:
        """What the VAE's latents are multiplied with for the transformer."""
        return PRESETS["5b"].vae["scaling_factor"] if self.vae is None else self.vae.config.scaling_factor

    @property
    def guidance_scale(self) -> float:
        """The guidance scale w of the current call, before any schedule (`use_dynamic_cfg`)."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step predicts with and without the prompt."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the current call."""
        return self._num_timesteps

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the current call hands to the attention processors."""
        return self._attention_kwargs

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the step that is running, None outside the loop."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after that step; what exists is decoded."""
        return self._interrupt

    def call_defaults(self) -> dict[str, int]:
        """What `__call__` uses for frames, size and text length when it is told nothing: what the model was trained for (`native_call`).

        Raises ValueError without a transformer.
        """
        if self.transformer is None:
            raise ValueError("The pipeline has no transformer: load it with one.")
        return native_call(self.transformer.config, self.geometry)

    # --- parts that can be called alone -----------------------------------------------------------------------------

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        num_videos_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompts and of the unconditional half, (B * num_videos_per_prompt, L, D_text) each.

        The parameters are those of `__call__`. The second result is None without guidance. The videos of one prompt follow
        each other. `dtype` is by default that of the text encoder, or of the embeddings that are passed.

        Raises:
            ValueError, TypeError: for inputs that exclude each other or do not match in number or shape.
        """
        inputs = PromptInputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        if inputs.starts:
            raise TypeError(f"prompt={prompt!r} by frame is for a call with context windows: encode its texts as a list.")
        where = device or self._execution_device
        encoder = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder, "length": max_sequence_length, "device": where}

        def finished(embeds: Tensor) -> Tensor:
            return embeds.to(where, dtype or embeds.dtype).repeat_interleave(num_videos_per_prompt, dim=0)

        positive = finished(inputs.encode(**encoder))
        if not do_classifier_free_guidance:
            return positive, None
        if inputs.prompt_embeds is not None:  # the unconditional half must be as long as the embeddings that were passed
            encoder["length"] = positive.shape[1]
        return positive, finished(inputs.encode_negative(**encoder))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Video (B, 3, F, H, W) in about [-1, 1] from the loop's latents (B, f, C, h, w), whole and on the device."""
        latents = latents.transpose(1, 2).to(self.vae.dtype) / self.vae_scaling_factor_image
        return run_checked(self.vae, lambda: self.vae.decode(latents).sample, "while decoding")

    def decode_frames(
        self,
        latents: Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
    ) -> Any:
        """What a call makes of its latents (B, f, C, h, w): the frames, of any `output_type` but "latent", chunk by chunk.

        Takes the `latents` of an error that ended a call while it decoded, and the result of output_type="latent". By default all
        frames and pixels are shown that the latents hold.

        Raises:
            ValueError: for another output type, and for more frames or pixels than there are.
            FloatingPointError: for frames that are not finite.
        """
        if output_type not in OUTPUT_TYPES or output_type == "latent":
            raise ValueError(f"output_type={output_type!r} is not possible: use one of {OUTPUT_TYPES[:-1]}.")
        self.check_component("vae")
        decoder = VideoDecoder(
            vae=self.vae,
            geometry=self.geometry,
            scaling_factor=self.vae_scaling_factor_image,
            device=self._execution_device,
            processor=self.video_processor,
            release=self.maybe_free_model_hooks,
            stage=self._stage,
        )
        extent = decoder.extent(latents, num_frames, height, width)
        return decoder.streams(latents, extent) if output_type == "stream" else decoder.collect(latents, extent, output_type)

    def fuse_qkv_projections(self) -> None:
        """Compute query, key and value of every attention layer of the transformer with one matrix product."""
        self.transformer.fuse_qkv_projections()

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        self.transformer.unfuse_qkv_projections()

    def check_component(self, name: str, remedy: str = "load it with one") -> None:
        """Raise ValueError when a component that a call needs is missing, or elsewhere than the call runs.

        A component that is offloaded is where its hooks bring it when it runs.
        """
        component, device = getattr(self, name), self._execution_device
        if component is None:
            raise ValueError(f"The pipeline has no {name}: {remedy}.")
        place = get_parameter_device(component)  # with group offloading, the device that it is brought to
        if not hasattr(component, "_hf_hook") and place.type != device.type:
            raise ValueError(
                f"{name} is on {place}, but the pipeline runs on {device}. Move all of it with pipe.to({device.type!r}), "
                "or use pipe.enable_model_cpu_offload()."
            )

    # --- one call ---------------------------------------------------------------------------------------------------

    def generate(self, request: Request, make_condition: MakeCondition) -> CogVideoXPipelineOutput | tuple[Any]:
        """Timesteps, condition, text, loop, video: one call of any task.

        Raises:
            ValueError: for a request, scheduler or component placement that cannot give what was asked for.
        """
        latents, padding = self.run_loop(request, make_condition)
        frames, *_ = self.geometry.latent_shape(request.num_frames, request.height, request.width)
        return self._finish(latents[:, padding:][:, :frames], request)

    def run_loop(self, request: Request, make_condition: MakeCondition, walk: Walk | None = None) -> tuple[Tensor, int]:
        """Everything up to the latents (B, F, C, H, W) at the end of the loop, and how many of the frames pad it in front.

        `walk` takes the place of the scheduler's own way from the condition's first step to the end. Raises as `generate` does.
        """
        request.check_size(self.geometry)
        request.check_callback(self._callback_tensor_inputs)
        check_scheduler(self.scheduler, request.eta)
        self._check_components(request)
        self._check_precision()
        request.report_size(self.geometry)
        self._begin(request)
        self._guidance_scale = request.guidance_scale
        self._attention_kwargs = request.attention_kwargs
        self._current_timestep, self._interrupt = None, False

        device = self._execution_device
        timesteps = set_timesteps(self.scheduler, request.num_inference_steps, request.timesteps, device)
        # Pixels are encoded before text: an offloaded text encoder, the largest model, then comes after that, and leaves for the loop.
        with self._stage("encode"):
            condition = make_condition(timesteps, torch.empty(0, dtype=self.transformer.dtype, device=device))
        with self._stage("text"):
            positive, negative = self._embeddings(request)
        timesteps, step = walk(timesteps) if walk else (timesteps[condition.first_step :], None)
        self._num_timesteps = len(timesteps)

        def run(again: bool = False) -> Tensor:
            if again:  # the scheduler forgets the loop before
                set_timesteps(self.scheduler, request.num_inference_steps, request.timesteps, device)
            return denoise(self, condition, timesteps, request, positive, negative, step)

        with self._stage("denoise"):
            return with_cache(self, request, len(timesteps), run), condition.padding

    def _embeddings(self, request: Request) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the request in the transformer's dtype: (B, L, D_text), and the unconditional half or None.

        The K prompts of one video by frame, and as many unconditional halves, stand one behind the other: (B, K L, D_text).
        """
        starts, videos = request.inputs.starts, request.num_videos_per_prompt
        positive, negative = self.encode_prompt(
            **vars(request.inputs.one_by_one()),
            do_classifier_free_guidance=request.guided and not request.zero_unconditional,
            num_videos_per_prompt=1 if starts else videos,
            max_sequence_length=request.max_sequence_length,
            dtype=self.transformer.dtype,
        )
        if starts:
            positive, negative = joined_parts(positive, videos), None if negative is None else joined_parts(negative, videos)
        width = self.transformer.config.text_embed_dim
        if positive.shape[-1] != width:
            raise ValueError(f"prompt_embeds are {positive.shape[-1]} wide, but the transformer reads embeddings of width {width}.")
        return positive, torch.zeros_like(positive) if request.guided and request.zero_unconditional else negative

    def _check_components(self, request: Request) -> None:
        """Raise ValueError when a component that every task uses is missing or misplaced; a text encoder that is missing is told later."""
        self.check_component("transformer")
        if request.output_type != "latent":
            self.check_component("vae", "load it with one, or ask for output_type='latent'")
        if request.reads_text and self.text_encoder is not None:
            self.check_component("text_encoder")

    def _check_precision(self) -> None:
        """Warn about a precision in which a released model overflows, unless its safe mode is on."""
        preset = match_preset(self.transformer.config)
        if preset and not getattr(self.transformer, "float32_residual", False):
            check_dtype(preset.name, preset.dtype, self.transformer.dtype)

    def _finish(self, latents: Tensor, request: Request) -> CogVideoXPipelineOutput | tuple[Any]:
        """Decode latents (B, F, C, H, W) to the output type and size that were asked for, and let offloading take the models back."""
        if request.output_type == "latent":
            video = latents
            self.maybe_free_model_hooks()
        else:
            video = self.decode_frames(latents, request.num_frames, request.height, request.width, request.output_type)
        return CogVideoXPipelineOutput(frames=video) if request.return_dict else (video,)
