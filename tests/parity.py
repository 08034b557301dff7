"""The only file that imports diffusers' own CogVideoX classes ("stock"): our oracle. Tiny configs for every released variant."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX as StockVAE,
)
from diffusers import (
    CogVideoXDDIMScheduler as StockDDIMScheduler,
)
from diffusers import (
    CogVideoXDPMScheduler as StockDPMScheduler,
)
from diffusers import (
    CogVideoXFunControlPipeline as StockFunControlPipeline,
)
from diffusers import (
    CogVideoXImageToVideoPipeline as StockImageToVideoPipeline,
)
from diffusers import (
    CogVideoXPipeline as StockPipeline,
)
from diffusers import (
    CogVideoXTransformer3DModel as StockTransformer,
)
from diffusers import (
    CogVideoXVideoToVideoPipeline as StockVideoToVideoPipeline,
)
from torch import nn

__all__ = [
    "TINY_TRANSFORMERS",
    "TINY_VAE",
    "StockDDIMScheduler",
    "StockDPMScheduler",
    "StockFunControlPipeline",
    "StockImageToVideoPipeline",
    "StockPipeline",
    "StockTransformer",
    "StockVAE",
    "StockVideoToVideoPipeline",
    "narrow",
    "randomize",
    "twins",
]

TINY_VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_height": 64,
    "sample_width": 96,
    "scaling_factor": 0.7,
}

_TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "num_layers": 2,
    "max_text_seq_length": 7,
    "sample_height": 8,
    "sample_width": 12,
    "sample_frames": 9,
}
_ROPE = _TINY | {"use_rotary_positional_embeddings": True}
_V15 = _ROPE | {"patch_size_t": 2, "patch_bias": False, "sample_height": 20, "sample_width": 20, "sample_frames": 13}

# One tiny transformer per released architecture; 33 input channels (Fun-InP) become 4 + 1 + 4.
TINY_TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2b": _TINY,
    "5b": _ROPE,
    "5b-i2v": _ROPE | {"in_channels": 8, "use_learned_positional_embeddings": True},
    "1.5-5b": _V15,
    "1.5-5b-i2v": _V15 | {"in_channels": 8, "ofs_embed_dim": 32},
    "fun-inp": _ROPE | {"in_channels": 9},
    "fun-control": _ROPE | {"in_channels": 8},
    "fun-1.5-inp": _V15 | {"in_channels": 9},
    "fun-1.5-control": _V15 | {"in_channels": 8},
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter with seeded noise, so that zero or one initialisations hide nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.copy_(noise / fan_in**0.5)
            else:
                parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
    return model


def narrow(vae: Any) -> nn.Module:
    """A VAE like `vae` with so few channels that videos of full size take seconds, and random weights."""
    return randomize(type(vae).from_config(vae.config, block_out_channels=(2, 2, 2, 2), norm_num_groups=1)).eval()


def twins(ours: type[nn.Module], stock: type[nn.Module], config: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Our model and stock's from one config with the same random weights, both in eval mode."""
    theirs = randomize(stock(**config)).eval()
    mine = ours(**config).eval()
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs
