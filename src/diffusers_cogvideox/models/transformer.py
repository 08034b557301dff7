"""The transformer: embed text, latents and timestep, run the expert blocks over all tokens, project the video tokens back to latents."""

# ruff: noqa: ARG002 (register_to_config keeps every constructor argument in self.config, where the parts read it)
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ..geometry import Geometry
from .attention import with_separate_projections
from .backends import BackendMixin
from .block import AdaLayerNorm, CogVideoXBlock, FinalLayerNorm, TokenNorm
from .cache_states import first_stateful_layer
from .context_parallel import BatchShare
from .embeddings import CogVideoXPatchEmbed, embed_scalar, per_sample, unpatchify
from .feature_cache import CheckedCacheMixin
from .parallel import ParallelMixin
from .single_file import SingleFileMixin

__all__ = ["CogVideoXBlock", "CogVideoXTransformer3DModel", "initialize_for_training"]


class CogVideoXTransformer3DModel(  # type: ignore[misc]
    ParallelMixin, BackendMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, CheckedCacheMixin, SingleFileMixin
):
    """Predicts the velocity of noisy video latents from text features and the timestep: every CogVideoX 1.0, 1.5 and Fun transformer.

    The arguments are the keys of the released config.json files.

    Args:
        num_attention_heads, attention_head_dim: their product is the width D.
        in_channels, out_channels: latent channels; image-to-video and Fun models read 32 or 33 (noise, condition, mask) and predict 16.
        flip_sin_to_cos, freq_shift: order (cos, sin) and frequency shift of the time sinusoid.
        time_embed_dim: width E of the time embedding.
        ofs_embed_dim: width of the embedding of `ofs` (CogVideoX 1.5 image-to-video), equal to E, or None.
        text_embed_dim: width of the text features.
        num_layers: number of blocks.
        dropout: after the embedding and in the feed-forward networks.
        attention_bias: bias of q, k, v.
        sample_width, sample_height: native latent size; grid of the 1.0 rotary positions and of a learned table.
        sample_frames: native number of pixel frames.
        patch_size, patch_size_t: latents per token in space and time; `patch_size_t` None is the convolution of CogVideoX 1.0.
        temporal_compression_ratio: pixel frames per latent frame.
        max_text_seq_length: text tokens of a learned position table; pipelines pad prompts to it.
        activation_fn, timestep_activation_fn: activations of the feed-forward and the time networks.
        norm_elementwise_affine, norm_eps: of all LayerNorms except those of q and k.
        spatial_interpolation_scale, temporal_interpolation_scale: divisors of the sin-cos positions.
        use_rotary_positional_embeddings: rotary tables are given to `forward`; otherwise a sin-cos table is added to the tokens.
        use_learned_positional_embeddings: a stored table is added to the tokens as well (CogVideoX-5B-I2V).
        patch_bias: bias of the patch convolution.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["patch_embed", "norm"]  # type: ignore[misc,assignment]
    _no_split_modules: ClassVar[list[str]] = ["CogVideoXBlock", "CogVideoXPatchEmbed"]  # type: ignore[misc,assignment]
    _repeated_blocks: ClassVar[list[str]] = ["CogVideoXBlock"]  # type: ignore[misc]
    _gradient_checkpointing_func: Any
    modulation: Any = None  # tables of the loop that runs, see modulation.py
    releases_modulation = False

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 30,
        attention_head_dim: int = 64,
        in_channels: int = 16,
        out_channels: int | None = 16,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        time_embed_dim: int = 512,
        ofs_embed_dim: int | None = None,
        text_embed_dim: int = 4096,
        num_layers: int = 30,
        dropout: float = 0.0,
        attention_bias: bool = True,
        sample_width: int = 90,
        sample_height: int = 60,
        sample_frames: int = 49,
        patch_size: int = 2,
        patch_size_t: int | None = None,
        temporal_compression_ratio: int = 4,
        max_text_seq_length: int = 226,
        activation_fn: str = "gelu-approximate",
        timestep_activation_fn: str = "silu",
        norm_elementwise_affine: bool = True,
        norm_eps: float = 1e-5,
        spatial_interpolation_scale: float = 1.875,
        temporal_interpolation_scale: float = 1.0,
        use_rotary_positional_embeddings: bool = False,
        use_learned_positional_embeddings: bool = False,
        patch_bias: bool = True,
    ) -> None:
        super().__init__()
        _check_config(self.config)
        dim = num_attention_heads * attention_head_dim
        self.patch_embed = CogVideoXPatchEmbed(self.config)
        self.embedding_dropout = nn.Dropout(dropout)
        self.time_proj = Timesteps(dim, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(dim, time_embed_dim, timestep_activation_fn)
        self.ofs_proj = Timesteps(ofs_embed_dim, flip_sin_to_cos, freq_shift) if ofs_embed_dim else None
        self.ofs_embedding = TimestepEmbedding(ofs_embed_dim, ofs_embed_dim, timestep_activation_fn) if ofs_embed_dim else None
        self.transformer_blocks = nn.ModuleList(
            CogVideoXBlock(
                dim=dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                time_embed_dim=time_embed_dim,
                dropout=dropout,
                activation_fn=activation_fn,
                attention_bias=attention_bias,
                norm_elementwise_affine=norm_elementwise_affine,
                norm_eps=norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm_final = TokenNorm(dim, norm_eps, norm_elementwise_affine)
        self.norm_out = FinalLayerNorm(time_embed_dim, dim, norm_elementwise_affine, norm_eps)
        self.proj_out = nn.Linear(dim, patch_size**2 * self.geometry.patch_size_t * (out_channels or in_channels))
        self.gradient_checkpointing = False
        self.float32_residual = False

    save_pretrained = with_separate_projections(ModelMixin.save_pretrained)
    add_adapter = with_separate_projections(PeftAdapterMixin.add_adapter)
    load_lora_adapter = with_separate_projections(PeftAdapterMixin.load_lora_adapter)

    def keep_residual_in_float32(self, enabled: bool = True) -> None:
        """Carry the tokens from block to block in float32, and compute LayerNorms, gates and sums there; linear layers and attention stay
        in the dtype of the weights.

        For float16, where the sum over the blocks of a model that was trained in bfloat16 passes 65504. Weights and results do not change
        in kind; the price is 2 D (L + N) bytes per sample for the tokens (109 MB for 49 frames of 480 x 720 on a 5B model), as much again
        while a LayerNorm runs, and no time in the matrix products. Values that overflow inside a linear layer stay infinite.
        """
        self.float32_residual = enabled

    def release_modulation(self, enabled: bool = True) -> None:
        """Keep the weights of the modulation layers off the device while a pipeline's loop runs: a seventh of the 5B model's parameters.

        The loop looks up what they make in tables, which are computed before it. Results stay the same. What moves the weights costs is
        one copy to the host and back for each call. Only does anything for weights that would stay on an accelerator during the loop.
        """
        self.releases_modulation = enabled

    def split_batch(self, enabled: bool = True) -> None:
        """Let every block work on one sample of the batch after the other, such as the two halves of guidance.

        A block's intermediate results take as much memory as those of one sample, while its weights are brought to the device once for
        all (unlike the pipelines' `sequential_guidance`). Results are the same to rounding. On a large GPU a little slower.

        Raises:
            ValueError: a cache that counts the calls of layers inside the blocks is on.
        """
        self._set_on_blocks("one_by_one", enabled, "split_batch", enabled)

    def chunk_feed_forward(self, tokens: int | None) -> None:
        """Let the feed-forward networks work on at most so many tokens of each sample at a time, None for all.

        Their intermediate results, the largest of a block, then take 8 D bytes per token and sample in half precision. Results are the
        same to rounding.

        Raises:
            ValueError: for less than one token, or while a cache is on that counts the calls of layers inside the blocks.
        """
        if tokens is not None and tokens < 1:
            raise ValueError(f"chunk_feed_forward({tokens}) is not possible: give 1 token or more, or None for all at once.")
        self._set_on_blocks("ff_tokens", tokens, "chunk_feed_forward", tokens is not None)

    def _set_on_blocks(self, name: str, value: Any, method: str, calls_more: bool) -> None:
        if calls_more and (layer := first_stateful_layer(self.transformer_blocks)):
            raise ValueError(
                f"{method} calls layers several times in a pass, and the feature cache on {layer} counts calls: call disable_cache() first."
            )
        for block in self.transformer_blocks:
            setattr(block, name, value)

    def enable_cache(self, config: Any) -> None:
        """As `CheckedCacheMixin.enable_cache`; also refuses a cache that `split_batch` or `chunk_feed_forward` would mislead."""
        super().enable_cache(config)
        layer = first_stateful_layer(self.transformer_blocks)
        if layer and any(block.one_by_one or block.ff_tokens for block in self.transformer_blocks):
            self.disable_cache()
            raise ValueError(
                f"{type(config).__name__} counts the calls of {layer}, which split_batch() and chunk_feed_forward() call several times in "
                "a pass: call split_batch(False) and chunk_feed_forward(None) first, or use a cache of whole blocks."
            )

    @property
    def geometry(self) -> Geometry:
        """Size rules of this model."""
        return self.patch_embed.geometry

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: int | float | Tensor,
        timestep_cond: Tensor | None = None,
        ofs: int | float | Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor] | Transformer2DModelOutput:
        """Predict the velocity.

        Args:
            hidden_states: noisy latents (B, F, C, H, W), with any condition already in the channels.
            encoder_hidden_states: text features (B, L, E_text).
            timestep: of the noise, 0 to 999; a number, (1,) or (B,).
            timestep_cond: always None: no model of the family has such a condition.
            ofs: the constant 2.0 for a model with `ofs_embed_dim`, None for all others.
            image_rotary_emb: (cos, sin) from `rope_for`, each (N, attention_head_dim); None rotates nothing.
            attention_kwargs: "scale" sets the LoRA scale of this call, everything else goes to the attention processor.
            return_dict: False returns a tuple.

        Returns:
            `Transformer2DModelOutput` whose sample is the velocity (B, F, out_channels, H, W).

        Raises:
            ValueError: inputs that do not fit this model or each other; the message says which and why.
        """
        grid = self._check_inputs(hidden_states, encoder_hidden_states)
        batch = BatchShare.of(len(hidden_states), self.batch_group)
        if batch:
            hidden_states, encoder_hidden_states, timestep, ofs = map(batch.own, (hidden_states, encoder_hidden_states, timestep, ofs))
        image_rotary_emb = self._check_rotary(image_rotary_emb, math.prod(grid), hidden_states.device)
        text, video = self.patch_embed(encoder_hidden_states, hidden_states)
        self._check_attention_backend(video, self.config["attention_head_dim"], "attention_mask" in (attention_kwargs or {}))
        temb = self._time(timestep, timestep_cond, ofs, hidden_states)
        text, video = self.embedding_dropout(text), self.embedding_dropout(video)
        spread = self.ranks and self.ranks.spread(text.shape[1], video.shape[1])
        if spread:
            text, video, image_rotary_emb = spread.own(text, video, image_rotary_emb)
            attention_kwargs = {**(attention_kwargs or {}), "spread": spread}
        if self.float32_residual:
            text, video = text.float(), video.float()

        streams = [text, video]
        del text, video  # the first block's input shall not outlive it
        video = self._through_blocks(streams, temb, image_rotary_emb, attention_kwargs)
        video = self.norm_out(self.norm_final(video), temb)
        video = self.proj_out(video)
        sample = unpatchify(spread.whole(video) if spread else video, grid, self.geometry)
        sample = batch.whole(sample) if batch else sample
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _through_blocks(
        self, streams: list[Tensor], temb: Tensor, rotary: tuple[Tensor, Tensor] | None, options: dict[str, Any] | None
    ) -> Tensor:
        """Video tokens (B, N, D) behind the last block, from the two streams [text (B, L, D), video (B, N, D)], which are taken out."""
        video, text = streams.pop(), streams.pop()
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                video, text = self._gradient_checkpointing_func(block, video, text, temb, rotary, options)
            else:
                video, text = block(
                    hidden_states=video, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary, attention_kwargs=options
                )
        return video

    def _time(self, timestep: float | Tensor, timestep_cond: Tensor | None, ofs: float | Tensor | None, like: Tensor) -> Tensor:
        """temb (1 or B, E); in its place rows (1 or B,) of the blocks' tables, while there are tables that hold this timestep."""
        rows = None
        if self.modulation is not None and not torch.is_grad_enabled():
            rows = self.modulation.rows(per_sample(timestep, like, "timestep"), ofs)
        return self.embed_time(timestep, timestep_cond, ofs, like) if rows is None else rows

    def embed_time(self, timestep: float | Tensor, timestep_cond: Tensor | None, ofs: float | Tensor | None, like: Tensor) -> Tensor:
        """temb (1 or B, E) of the timestep and, in CogVideoX 1.5 image-to-video, ofs; `like` (B, ...) gives batch, dtype and device.

        Raises:
            ValueError: for numbers of timesteps that are neither 1 nor B, for a timestep_cond, for ofs where the model has none, or none
                where it has.
        """
        if timestep_cond is not None:
            raise ValueError("timestep_cond is not supported: no CogVideoX model has weights for it. Leave it None.")
        temb = embed_scalar(timestep, self.time_proj, self.time_embedding, like, "timestep")
        if self.ofs_proj is None or self.ofs_embedding is None:
            if ofs is not None:
                raise ValueError("ofs was given, but this model has no ofs embedding (ofs_embed_dim is not set). Leave it None.")
            return temb
        if ofs is None:
            raise ValueError("this model needs ofs (its config has ofs_embed_dim): pass ofs=2.0, the value it was trained with.")
        return temb + embed_scalar(ofs, self.ofs_proj, self.ofs_embedding, like, "ofs")

    def _check_inputs(self, latents: Tensor, text: Tensor) -> tuple[int, int, int]:
        """Token grid (t, h, w) of the latents, or a ValueError that names what does not fit."""
        config = self.config
        if latents.ndim != 5:
            raise ValueError(f"hidden_states must be (batch, frames, channels, height, width), got shape {tuple(latents.shape)}.")
        if latents.shape[2] != config["in_channels"]:
            raise ValueError(
                f"hidden_states has {latents.shape[2]} channels (axis 2), but this model reads in_channels={config['in_channels']}. "
                "Image-to-video and Fun models take noise and condition concatenated along the channels."
            )
        if text.ndim != 3 or text.shape[-1] != config["text_embed_dim"]:
            raise ValueError(
                f"encoder_hidden_states must be (batch, tokens, text_embed_dim={config['text_embed_dim']}), got shape {tuple(text.shape)}."
            )
        if len(text) != len(latents):
            raise ValueError(f"hidden_states has batch size {len(latents)}, but encoder_hidden_states has {len(text)}: they must be equal.")
        return self.geometry.token_grid(latents.shape[1], latents.shape[3], latents.shape[4])

    def _check_rotary(self, rotary: tuple[Tensor, Tensor] | None, tokens: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """The rotary tables on `device`, or a ValueError when they belong to another size."""
        if rotary is None:
            return None
        cos, sin = rotary
        expected = (tokens, self.config["attention_head_dim"])
        if tuple(cos.shape) != expected or tuple(sin.shape) != expected:
            raise ValueError(
                f"image_rotary_emb has shapes {tuple(cos.shape)} and {tuple(sin.shape)}, but these latents have {tokens} tokens and "
                f"heads of {self.config['attention_head_dim']} channels: both must be {expected}. Make them with rope_for(config, ...)."
            )
        return cos.to(device), sin.to(device)


def _check_config(config: Mapping[str, Any]) -> None:
    if config["use_learned_positional_embeddings"] and not config["use_rotary_positional_embeddings"]:
        raise ValueError(
            "use_learned_positional_embeddings=True needs use_rotary_positional_embeddings=True: without it the sin-cos table would take "
            "the learned table's place."
        )
    if config["ofs_embed_dim"] and config["ofs_embed_dim"] != config["time_embed_dim"]:
        raise ValueError(
            f"ofs_embed_dim={config['ofs_embed_dim']} must equal time_embed_dim={config['time_embed_dim']}: the two embeddings are added."
        )


@torch.no_grad()
def initialize_for_training(model: CogVideoXTransformer3DModel) -> None:
    """Fresh weights for training from scratch, in place (adaLN-Zero of DiT, as the original code).

    Linear layers and the patch convolution are Xavier-uniform with zero biases, LayerNorms the identity; the modulations and the output
    projection are zero, so that every block starts as the identity and the prediction as zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: a patch convolution is a linear layer on patches
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    for linear in [model.proj_out, *(module.linear for module in model.modules() if isinstance(module, AdaLayerNorm))]:
        nn.init.zeros_(linear.weight)
