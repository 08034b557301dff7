"""What a compiler makes of one block of CogVideoX-5B at full size: kernels, and bytes that they read and write; ours against diffusers'.

    python benchmarks/compiled_block.py [--preset 5b] [--dtype bfloat16] [--output FILE.json]

Both halves of guidance, 49 frames of 480x720. Inductor lowers, fuses and writes the code for a processor; nothing is compiled further or
run, so neither memory for the tensors nor a GPU is needed. Matrix products and attention, which are the library's, are counted apart.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models import CogVideoXTransformer3DModel as StockTransformer
from torch._inductor import metrics
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode

from common import RESULTS, write_result
from diffusers_cogvideox import PRESETS, CogVideoXTransformer3DModel
from diffusers_cogvideox.files import check_writable
from diffusers_cogvideox.geometry import Geometry
from diffusers_cogvideox.models.rope import rope_for


class CountedError(Exception):
    """Raised in place of the last step of a compilation, with what was found."""


def _count(graph: GraphLowering) -> None:
    """The code's kernels and the bytes of each kind of node: those of a loop, and those that call a library."""
    metrics.reset()
    graph.codegen()
    _, of_nodes, _ = graph.count_bytes()
    library = sum(4 * size for node, size in of_nodes if isinstance(node, ExternKernelSchedulerNode))
    calls = sum(isinstance(node, ExternKernelSchedulerNode) for node, _ in of_nodes)
    loops = sum(4 * size for node, size in of_nodes if not isinstance(node, ExternKernelSchedulerNode | NopKernelSchedulerNode))
    raise CountedError({"kernels": metrics.generated_kernel_count, "bytes": loops, "library_calls": calls, "library_bytes": library})


def counted(cls: Any, name: str, dtype: torch.dtype) -> dict[str, int]:
    """Of one block of a class; its weights and inputs are never touched."""
    preset = PRESETS[name]
    config = preset.transformer | {"num_layers": 1}
    geometry = Geometry.from_configs(preset.vae, config)
    frames, height, width = geometry.latent_shape(preset.num_frames, preset.height, preset.width)
    frames += geometry.front_padding(frames)
    with torch.device("meta"):
        block = torch.nn.Module.to(cls(**config).transformer_blocks[0], dtype)
    block = block.to_empty(device="cpu").eval()
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    rotary = rope_for(config, frames, height, width)
    assert rotary is not None, "of models with rotary positions"
    shapes = ((2, len(rotary[0]), dim), (2, config["max_text_seq_length"], dim), (2, config["time_embed_dim"]))
    inputs = [torch.empty(shape, dtype=dtype) for shape in shapes]
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True)
    with patch.object(GraphLowering, "compile_to_module", _count), torch.no_grad():
        try:
            compiled(*inputs, image_rotary_emb=rotary)
        except Exception as error:
            found: BaseException | None = error
            while found is not None and not isinstance(found, CountedError):
                found = getattr(found, "inner_exception", None) or found.__cause__
            if found is None:
                raise
            return found.args[0]
    raise RuntimeError("nothing was compiled")


def main() -> None:
    """Count, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("5b", "1.5-5b"), default="5b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS / "compiled_block.json")
    options = parser.parse_args()
    check_writable(options.output)
    blocks = {}
    for which, cls in (("stock", StockTransformer), ("ours", CogVideoXTransformer3DModel)):
        blocks[which] = counted(cls, options.preset, getattr(torch, options.dtype))
        print(which, blocks[which], flush=True)
    what = "one block, both halves of guidance, the size that the model was trained for; as inductor writes it for a processor"
    write_result(options.output, {"what": what, "preset": options.preset, "dtype": options.dtype, "block": blocks})


if __name__ == "__main__":
    main()
