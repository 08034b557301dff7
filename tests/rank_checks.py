"""What tests run on several ranks (see ranks.py); every rank calls the function."""

import io
import os
import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, TensorParallelConfig
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import tensor_parallel as tensor_parallel_hooks
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_cogvideox import CogVideoXPipeline, cli
from diffusers_cogvideox.generation import generate
from diffusers_cogvideox.models import collectives
from diffusers_cogvideox.models.autoencoder import AutoencoderKLCogVideoX
from diffusers_cogvideox.models.collectives import Group, add_up, exchange, gather, shares
from diffusers_cogvideox.models.vae_memory import Saving
from diffusers_cogvideox.runtime import launch, streaming
from diffusers_cogvideox.runtime.launch import Launch
from diffusers_cogvideox.runtime.memory.costs import Costs
from diffusers_cogvideox.runtime.parallel import share_work
from parity import TINY_VAE, randomize
from tiny_pipeline import call
from transformer_cases import inputs, tiny_twins

VIDEO = 1e-4  # three guided steps and a decoder, all with random weights, enlarge rounding: stock and we differ by as much


def close(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def unequal_parts() -> None:
    """Unequal parts arrive where they should, and so do their gradients."""
    group = Group.of(dist.group.WORLD)
    rank, size = group.rank, group.size
    rows, columns = shares(7, size), shares(5, size)
    whole = torch.arange(7 * 5 * 2.0).view(7, 5, 2)
    mine = whole.split(rows, 0)[rank].clone().requires_grad_()
    turned = exchange(mine, (1, columns), (0, rows), group)
    close(turned, whole.split(columns, 1)[rank])
    close(exchange(turned, (0, rows), (1, columns), group), mine)
    factor = torch.arange(7.0).view(7, 1, 1) + 1
    (turned * factor).sum().backward()
    close(mine.grad, factor.split(rows, 0)[rank].expand_as(mine))

    for shared in (True, False):
        mine.grad = None
        gathered = gather(mine, 0, rows, group, shared=shared)
        close(gathered, whole)
        (gathered * factor).sum().backward()
        times = 1 if shared else size
        close(mine.grad, times * factor.split(rows, 0)[rank].expand_as(mine))

    mine = torch.full((2,), float(rank), requires_grad=True)
    total = add_up(mine, group)
    close(total, torch.full((2,), sum(range(size)) * 1.0))
    total.sum().backward()
    close(mine.grad, torch.ones(2))


def context_parallel(cases: list[tuple[str, dict[str, int], dict[str, Any], dict[str, int]]]) -> None:
    """A model on all ranks gives the result and, added up, the gradients that it gives on one.

    A case is a variant, the degrees, changes to the model's config, and the sizes of its inputs.
    """
    group = Group.of(dist.group.WORLD)
    for variant, degrees, changes, sizes in cases:
        torch.manual_seed(0)
        model, _ = tiny_twins(variant, **changes)
        kwargs = inputs(model, **sizes)
        expected = model(**kwargs)[0]
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()

        model.enable_parallelism(config=ContextParallelConfig(**degrees))
        result = model(**kwargs)[0]
        close(result, expected)
        (result * weights).sum().backward()
        for name, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            scale = max(1.0, float(gradients[name].abs().max()))
            close(add_up(grad, group) / scale, gradients[name] / scale)
        assert all(parameter.grad is not None for parameter in model.parameters())


def masks_and_backends(degrees: dict[str, int]) -> None:
    """An attention mask over all tokens, one for each head, and kernels that diffusers' own context parallelism does not know."""
    model, _ = tiny_twins("5b", num_attention_heads=3)
    kwargs = inputs(model)
    tokens = 7 + kwargs["image_rotary_emb"][0].shape[0]
    for shape in ((2, tokens, tokens), (2, 1, 1, tokens), (1, 3, tokens, tokens)):
        mask = torch.rand(shape) > 0.3
        masked = kwargs | {"attention_kwargs": {"attention_mask": mask}}
        with torch.no_grad():
            expected = model(**masked)[0]
            assert (expected - model(**kwargs)[0]).abs().max() > 1e-2
            for backend in ("native", "_native_math"):
                model.set_attention_backend(backend)
                model.enable_parallelism(config=ContextParallelConfig(**degrees))
                close(model(**masked)[0], expected)
                model.disable_parallelism()


def compiled(degrees: dict[str, int]) -> None:
    """Blocks of a model on several ranks are compiled once, exchanges included."""
    model, _ = tiny_twins("5b", num_attention_heads=3)
    kwargs = inputs(model)
    counted = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        expected = model(**kwargs)[0]
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
        model.compile_repeated_blocks(fullgraph=True, backend=counted)
        for _ in range(2):
            close(model(**kwargs)[0], expected)
    assert counted.frame_count == 1


def stock() -> None:
    """What diffusers' own model does on two ranks: it has no plan, needs an accelerator, and with a plan computes something else."""
    ours, model = tiny_twins("5b")
    kwargs = inputs(model, text=8)
    config = ContextParallelConfig(ulysses_degree=2, ulysses_anything=True)
    if not torch.accelerator.is_available():
        with pytest.raises(ZeroDivisionError):
            model.enable_parallelism(config=config)
    type(model)._resolve_parallel_config = type(ours)._resolve_parallel_config  # as if there were one
    with pytest.raises(ValueError, match="cp_plan"):
        model.enable_parallelism(config=config)
    model._parallel_config = None
    with pytest.raises(ValueError, match="_tp_plan"):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    tokens, table = ContextParallelInput(split_dim=1), ContextParallelInput(split_dim=0)
    plan = {
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "transformer_blocks.*": {"image_rotary_emb": [table, table]},
        "proj_out": ContextParallelOutput(gather_dim=1),
    }
    with torch.no_grad():
        expected = model(**kwargs)[0]
        model.enable_parallelism(config=config, cp_plan=plan)
        assert (model(**kwargs)[0] - expected).abs().max() > 1e-2
        ours.enable_parallelism(config=config)
        close(ours(**kwargs)[0], expected, 2e-5)


def refusals() -> None:
    """What context parallelism cannot do is said."""
    model, _ = tiny_twins("5b")
    size = dist.get_world_size()
    with pytest.raises(ValueError, match="4 ranks, but 2 are running"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=4))
    with pytest.raises(ValueError, match="splits its tokens by itself"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size), cp_plan={})
    assert model._parallel_config is None
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size), cp_plan=model._cp_plan)
    with pytest.raises(RuntimeError, match="on already"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=size))
    with pytest.raises(ValueError, match="FirstBlockCacheConfig decides by the tokens"):
        model.enable_cache(FirstBlockCacheConfig())
    model.disable_parallelism()
    model._cache_config = FirstBlockCacheConfig()
    with pytest.raises(ValueError, match="FirstBlockCacheConfig decides by the tokens"):
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))


def tensor_parallel(cases: list[tuple[str, dict[str, Any]]]) -> None:
    """A model in shares gives the result of the whole one, and the gradients of what each rank has."""
    group = Group.of(dist.group.WORLD)
    for variant, changes in cases:
        torch.manual_seed(0)
        model, _ = tiny_twins(variant, **changes)
        kwargs = inputs(model)
        expected = model(**kwargs)[0]
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        whole = sum(parameter.numel() for parameter in model.transformer_blocks.parameters())
        model.zero_grad()
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=group.size))
        assert sum(parameter.numel() for parameter in model.transformer_blocks.parameters()) < 0.8 * whole
        result = model(**kwargs)[0]
        close(result, expected)
        (result * weights).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.shape == gradients[name].shape:
                scale = max(1.0, float(gradients[name].abs().max()))
                close(parameter.grad / scale, gradients[name] / scale)
            else:
                assert torch.isfinite(parameter.grad).all()
        with pytest.raises(ValueError, match="load the model again"):
            model.disable_parallelism()
        with pytest.raises(NotImplementedError, match="sharded with tensor parallelism"):
            model.save_pretrained("anywhere")


def tensor_parallel_by_loading(folder: str) -> None:
    """diffusers reads only a rank's share of each weight, by the model's plan; here on processors, which it leaves out by name only."""
    model, _ = tiny_twins("1.5-5b-i2v")
    kwargs = inputs(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    tensor_parallel_hooks._SUPPORTED_TP_DEVICES = ("cpu",)
    loaded = type(model).from_pretrained(folder, parallel_config=TensorParallelConfig(tp_degree=2))
    assert loaded.transformer_blocks[0].attn1.to_q.weight.to_local().shape == (32, 64)
    with torch.no_grad():
        close(loaded(**kwargs)[0], model(**kwargs)[0])


def tensor_refusals() -> None:
    """What cannot be shared by heads is left as it was."""
    for changes, fused, match in (
        ({"num_attention_heads": 1}, False, "2 ranks cannot share 1 attention heads"),
        ({"activation_fn": "geglu"}, False, "gated feed-forward"),
        ({}, True, "unfuse_qkv_projections"),
    ):
        model, _ = tiny_twins("5b", **changes)
        if fused:
            model.fuse_qkv_projections()
        shapes = [parameter.shape for parameter in model.parameters()]
        with pytest.raises(ValueError, match=match):
            model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
        assert model._parallel_config is None
        assert shapes == [parameter.shape for parameter in model.parameters()]


def rows(cases: list[tuple[tuple[int, int, int], Saving | None]]) -> None:
    """A video that ranks decode together, in several chunks and in bands, is the video that one decodes. A case is (f, h, w) and a way."""
    vae = randomize(AutoencoderKLCogVideoX(**TINY_VAE)).eval()
    for shape, saving in cases:
        vae.saving = saving
        z = torch.randn(1, 4, *shape)
        with torch.no_grad():
            vae.disable_row_parallelism()
            expected = vae.decode(z).sample
            vae.enable_row_parallelism()
            scale = float(expected.abs().max())
            close(vae.decode(z).sample / scale, expected / scale)
            close(torch.cat(list(vae.decode_stream(z)), 2) / scale, expected / scale)
            vae.encode(torch.randn(1, 3, 1, 16, 16))
    with pytest.raises(ValueError, match="without gradients"):
        vae.decode(torch.randn(1, 4, 1, 4, 4))


def pipelines(folder: str, modes: list[str], options: dict[str, Any]) -> None:
    """A pipeline on all ranks makes the video that it makes on one, whatever is shared."""
    pipe = CogVideoXPipeline.from_pretrained(folder)
    expected = call(pipe, **options)
    for mode in modes:
        roles = share_work(pipe, mode)
        assert all(roles.of(rank) != "everything" for rank in range(dist.get_world_size()))
        seen = []
        handle = pipe.transformer.transformer_blocks[0].norm1.register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0].shape)
        )
        close(call(pipe, **options), expected, VIDEO)
        handle.remove()
        assert all(shape[0] == 2 // roles.halves for shape in seen) and seen
        with pytest.raises(ValueError, match="different noise or prompts"):
            call(pipe, generator=torch.Generator().manual_seed(dist.get_rank()))
        if roles.tensor == 1:
            pipe.transformer.disable_parallelism()
            pipe.transformer.disable_batch_parallelism()


def halves_and_guiders(folder: str) -> None:
    """Ranks that share a batch: one half each, also where halves are asked for one after the other; no guiders."""
    pipe = CogVideoXPipeline.from_pretrained(folder)
    expected = call(pipe, sequential_guidance=True, guidance_interval=(0.0, 0.5))
    share_work(pipe, "cfg")
    pipe.fit(ram="2GB")
    close(call(pipe, sequential_guidance=True, guidance_interval=(0.0, 0.5)), expected, VIDEO)
    with pytest.raises(ValueError, match="disable_batch_parallelism"):
        call(pipe, guider=ClassifierFreeGuidance(), guidance_scale=None)


def batches() -> None:
    """Any number of samples, with gradients."""
    group = Group.of(dist.group.WORLD)
    model, _ = tiny_twins("1.5-5b-i2v")
    model.enable_batch_parallelism()
    for batch, timestep in ((3, torch.tensor([999, 500, 1])), (3, 7), (1, torch.tensor([4])), (2, torch.tensor([4]))):
        kwargs = inputs(model) | {"timestep": timestep}
        kwargs |= {name: torch.randn(batch, *kwargs[name].shape[1:]) for name in ("hidden_states", "encoder_hidden_states")}
        model.disable_batch_parallelism()
        expected = model(**kwargs)[0]
        weights = torch.randn_like(expected)
        (expected * weights).sum().backward()
        gradient = model.proj_out.weight.grad.clone()
        model.zero_grad()
        model.enable_batch_parallelism()
        result = model(**kwargs)[0]
        close(result, expected)
        (result * weights).sum().backward()
        total = add_up(model.proj_out.weight.grad, group) / (1 if batch >= group.size else group.size)
        close(total / gradient.abs().max(), gradient / gradient.abs().max())
        model.zero_grad()


def lost(folder: str, way: str) -> None:
    """The second rank dies, or does not come, in the middle of a video."""
    pipe = CogVideoXPipeline.from_pretrained(folder)
    share_work(pipe, "ulysses")

    def leave(*_: Any) -> dict[str, Any]:
        if dist.get_rank() == 1:
            os._exit(3) if way == "dies" else time.sleep(7)
        return {}

    call(pipe, callback_on_step_end=leave)


def agreement() -> None:
    """All have what the first one makes; where that fails, the others end."""
    ranks = Launch(dist.get_rank(), dist.get_world_size())
    assert ranks.agreed(lambda: {"from": ranks.rank}) == {"from": 0}
    assert ranks.least(10 - ranks.rank) == 10 - (ranks.count - 1)

    def fail() -> None:
        raise ValueError("of the first")

    ranks.agreed(fail)


@contextmanager
def joined(*_: Any) -> Iterator[Launch]:
    """In the place of `together`: the ranks are there already."""
    yield Launch(dist.get_rank(), dist.get_world_size())


def command_lines(several: list[list[str]], place: str | None = None) -> list[tuple[int, str, str]]:
    """Exit status of each command, and what it says on stderr and stdout. `place` is where the weights of models with blocks are."""
    generate.together = joined
    if place:
        Costs.possible = lambda _, part: ["resident"] if part == "vae" else [place]
        streaming._check_request = lambda *_: None  # from memory, which makes no sense to a processor, goes as it goes elsewhere
    outcomes = []
    for arguments in several:
        said, printed = io.StringIO(), io.StringIO()
        with redirect_stderr(said), redirect_stdout(printed):
            try:
                status = cli.main(arguments)
            except SystemExit as end:
                status = end.code
        outcomes.append((status, said.getvalue(), printed.getvalue()))
    return outcomes


def interrupted(command: list[str], moment: int) -> tuple[list[int], list[int]]:
    """A command that is interrupted before the end of a step, and made again: exit statuses, and the steps that each run made."""
    make, statuses, made = generate.stream_videos, [], []

    def stream_videos(*args: Any, callback_on_step_end: Any = None, **kwargs: Any) -> Any:
        def callback(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            made[-1] += 1
            if len(made) == 1 and made[-1] == moment:
                raise KeyboardInterrupt
            return callback_on_step_end(pipe, index, timestep, tensors) if callback_on_step_end else {}

        return make(*args, callback_on_step_end=callback, **kwargs)

    generate.stream_videos = stream_videos
    for _ in range(2):
        made.append(0)
        statuses.append(command_lines([command])[0][0])
    return statuses, made


def script(path: str, *arguments: str) -> str:
    """What a script prints."""
    launch.together = joined
    sys.argv = [path, *arguments]
    printed = io.StringIO()
    with redirect_stdout(printed):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()


def received(way: str, sizes: dict[str, int]) -> int:
    """Numbers that this rank receives in a forward pass; a sum over ranks is received in parts, and its parts again."""
    group, found = Group.of(dist.group.WORLD), []
    exchange_all, send_all, add_all = (getattr(collectives, name) for name in ("_exchanged", "_sent", "_sum"))

    def exchanged(x: torch.Tensor, split: Any, join: Any, group: Group) -> torch.Tensor:
        result = exchange_all(x, split, join, group)
        found.append(result.numel() * (1 - join[1][group.rank] / sum(join[1])))
        return result

    def sent(x: torch.Tensor, dim: int, parts: Any, group: Group) -> torch.Tensor:
        found.append(x.numel() * (sum(parts) / parts[group.rank] - 1))
        return send_all(x, dim, parts, group)

    def added(x: torch.Tensor, group: Group) -> torch.Tensor:
        found.append(2 * x.numel() * (group.size - 1) / group.size)
        return add_all(x, group)

    collectives._exchanged, collectives._sent, collectives._sum = exchanged, sent, added
    model, _ = tiny_twins("5b", num_attention_heads=4)
    if way == "tensor":
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=group.size))
    elif way == "halves":
        model.enable_batch_parallelism()
    else:
        model.enable_parallelism(config=ContextParallelConfig(**{f"{way}_degree": group.size}))
    with torch.no_grad():
        model(**inputs(model, **sizes))
    return round(sum(found))
