"""The names of the original code (SAT) for the transformer and the VAE, as reversible tables to the names of diffusers."""

from __future__ import annotations

from functools import cache

from .rules import KeyRules, Rule, rename

__all__ = ["MODEL_PREFIX", "POSITIONS", "ROPE_COS", "ROPE_SIN", "UNUSED_POSITIONS", "transformer_rules", "vae_rules"]

MODEL_PREFIX = "model.diffusion_model."
"""What stands before the names of the transformer in a checkpoint."""

POSITIONS, ROPE_SIN, ROPE_COS = (f"mixins.pos_embed.{name}" for name in ("pos_embedding", "freqs_sin", "freqs_cos"))
UNUSED_POSITIONS = "transformer.position_embeddings.weight"
"""Tensors that are computed, or that nothing reads: diffusers has none of them, but a `pos_embedding` where it is learned."""

_KIND = ".{kind}"
_MODULATIONS = {
    "transformer_blocks.{layer}.norm1.linear.{kind}": (0, 1, 2, 6, 7, 8),  # shift, scale, gate of the video; of the text
    "transformer_blocks.{layer}.norm2.linear.{kind}": (3, 4, 5, 9, 10, 11),
}
_PROJECTIONS = {f"transformer_blocks.{{layer}}.attn1.to_{letter}.{{kind}}": (index,) for index, letter in enumerate("qkv")}
_ATTENTION = "transformer.layers.{layer}.attention"
_OUT = "transformer_blocks.{layer}.attn1.to_out.0"


def _renamed(pairs: dict[str, str], prefix: str = "", target: str = "") -> list[Rule]:
    """Weight and bias of modules that only change their names."""
    return [rename(f"{prefix}{source}{_KIND}", f"{target}{name}{_KIND}") for source, name in pairs.items()]


_HEAD = {"mixins.patch_embed.proj": "patch_embed.proj", "mixins.patch_embed.text_proj": "patch_embed.text_proj"}
_QK_NORMS = {
    f"mixins.adaln_layer.{name}_layernorm_list.{{layer}}": f"transformer_blocks.{{layer}}.attn1.norm_{name[0]}" for name in ("query", "key")
}
_FINAL = {
    "mixins.final_layer.norm_final": "norm_out.norm",
    "mixins.final_layer.linear": "proj_out",
    "mixins.final_layer.adaLN_modulation.1": "norm_out.linear",
}
_BLOCK = {
    "post_attention_layernorm": "norm2.norm",
    "mlp.dense_h_to_4h": "ff.net.0.proj",
    "mlp.dense_4h_to_h": "ff.net.2",
}
_TIME = {
    "transformer.final_layernorm": "norm_final",
    **{f"time_embed.{index}": f"time_embedding.linear_{number}" for index, number in ((0, 1), (2, 2))},
    **{f"ofs_embed.{index}": f"ofs_embedding.linear_{number}" for index, number in ((0, 1), (2, 2))},
}
# `.original` stands in models that carry a LoRA. Of several sources of one target, the first is written.
_RULES = (
    *_renamed(_HEAD),
    Rule("mixins.adaln_layer.adaLN_modulations.{layer}.1.{kind}", _MODULATIONS),
    *_renamed(_QK_NORMS),
    *_renamed(_FINAL),
    *_renamed({"input_layernorm": "norm1.norm"}, "transformer.layers.{layer}.", "transformer_blocks.{layer}."),
    Rule(f"{_ATTENTION}.query_key_value.{{kind}}", _PROJECTIONS),
    rename(f"{_ATTENTION}.dense.{{kind}}", f"{_OUT}.{{kind}}"),
    *_renamed(_BLOCK, "transformer.layers.{layer}.", "transformer_blocks.{layer}."),
    *_renamed(_TIME),
    Rule(f"{_ATTENTION}.query_key_value.original.{{kind}}", _PROJECTIONS),
    rename(f"{_ATTENTION}.dense.original.{{kind}}", f"{_OUT}.{{kind}}"),
)
_DROPPED = {
    r"^mixins\.pos_embed\.freqs_(sin|cos)$": "rotary angles, which are computed",
    r"(position|word)_embedding|embed_tokens": "a text embedding that nothing reads",
    r"\.matrix_[AB]\.": "a LoRA",
}
_SINCOS = {r"^mixins\.pos_embed\.pos_embedding$": "sin-cos positions, which are computed"}


@cache
def transformer_rules(learned_positions: bool) -> KeyRules:
    """The table of the transformer, of names behind `MODEL_PREFIX`.

    Args:
        learned_positions: whether the position table is learned (CogVideoX-5B-I2V) and kept, or computed and dropped.
    """
    if learned_positions:
        return KeyRules((rename(POSITIONS, "patch_embed.pos_embedding"), *_RULES), _DROPPED)
    return KeyRules(_RULES, _DROPPED | _SINCOS)


_NORM = ("", ".norm_layer", ".conv_y.conv", ".conv_b.conv")  # encoder: the first; decoder: the others


def _resnet(source: str, target: str, norms: tuple[str, ...]) -> list[Rule]:
    """The layers of one residual block."""
    names = [f"norm1{norm}" for norm in norms] + ["conv1.conv"] + [f"norm2{norm}" for norm in norms] + ["conv2.conv"]
    return _renamed({name: name for name in names} | {"nin_shortcut": "conv_shortcut"}, source, target)


def _half(side: str, levels: int, norms: tuple[str, ...]) -> list[Rule]:
    """The encoder or the decoder. SAT numbers the decoder's levels from the finest, diffusers from the coarsest."""
    middle = [
        rule for number in (1, 2) for rule in _resnet(f"{side}.mid.block_{number}.", f"{side}.mid_block.resnets.{number - 1}.", norms)
    ]
    stages = []
    for level in range(levels):
        word, place, sampler = ("down", level, "downsample") if side == "encoder" else ("up", levels - 1 - level, "upsample")
        source, target = f"{side}.{word}.{level}.", f"{side}.{word}_blocks.{place}."
        stages += _resnet(f"{source}block.{{layer}}.", f"{target}resnets.{{layer}}.", norms)
        stages += _renamed({f"{sampler}.conv": f"{sampler}rs.0.conv"}, source, target)
    body = [*stages, *middle] if side == "encoder" else [*middle, *stages]
    ends = [f"norm_out{norm}" for norm in norms] + ["conv_out.conv"]
    kept = [_renamed({name: name for name in names}, f"{side}.", f"{side}.") for names in (["conv_in.conv"], ends)]
    return [*kept[0], *body, *kept[1]]


@cache
def vae_rules(levels: int) -> KeyRules:
    """The table of a VAE with this many resolutions."""
    rules = [*_half("encoder", levels, _NORM[:1]), *_half("decoder", levels, _NORM[1:])]
    return KeyRules(tuple(rules), {r"^loss\.|\.loss\.": "a part of the training loss"})
