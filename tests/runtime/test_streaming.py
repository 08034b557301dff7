"""Weights that come block by block: the same results, little memory, and a clear error for what does not go with it."""

from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn
from transformers import T5EncoderModel

from diffusers_cogvideox import CogVideoXTransformer3DModel
from diffusers_cogvideox.checkpoints.stored import stored_tensors
from diffusers_cogvideox.models.modulation import tabulated
from diffusers_cogvideox.models.stand_in import is_stand_in
from diffusers_cogvideox.runtime.ring import Ring, Unit
from diffusers_cogvideox.runtime.streaming import is_streamed, load_streamed, stop_streaming, stream, streamed_bytes
from tiny_pipeline import call
from transformer_cases import inputs, tiny_twins

CPU = torch.device("cpu")


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved[variant]: the folder of a tiny transformer of four blocks."""
    folders = {}
    for variant in ("2b", "5b-i2v", "1.5-5b-i2v"):
        folders[variant] = tmp_path_factory.mktemp(variant)
        tiny_twins(variant, num_layers=4)[0].save_pretrained(folders[variant], max_shard_size="200KB")
    return folders


@pytest.fixture
def resident(saved):
    return CogVideoXTransformer3DModel.from_pretrained(saved["5b-i2v"])


@pytest.fixture
def streamed(saved):
    return load_streamed(CogVideoXTransformer3DModel, saved["5b-i2v"], "cpu")


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2b", "5b-i2v", "1.5-5b-i2v"])
@pytest.mark.parametrize("ahead", [0, 1, 9])
def test_from_disk_equals_resident(saved, variant, ahead):
    resident = CogVideoXTransformer3DModel.from_pretrained(saved[variant])
    streamed = load_streamed(CogVideoXTransformer3DModel, saved[variant], "cpu", ahead=ahead)
    kwargs = inputs(resident)
    exact = forward(resident, kwargs)
    for _ in range(2):
        torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=0)
    with tabulated(streamed, torch.tensor([999, 431]), kwargs["ofs"]):
        torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=2e-6)
    stop_streaming(streamed)
    assert all(torch.equal(value, streamed.state_dict()[name]) for name, value in resident.state_dict().items())
    torch.testing.assert_close(forward(streamed.double().float(), kwargs), exact, rtol=0, atol=0)


def test_another_dtype_is_converted(saved, resident):
    kwargs = {name: value.bfloat16() if name.endswith("hidden_states") else value for name, value in inputs(resident).items()}
    streamed = load_streamed(CogVideoXTransformer3DModel, saved["5b-i2v"], "cpu", dtype=torch.bfloat16)
    assert streamed.dtype == torch.bfloat16
    torch.testing.assert_close(forward(streamed, kwargs), forward(resident.bfloat16(), kwargs), rtol=0, atol=0)


def test_it_works_in_inference_mode(saved, resident):
    kwargs = {name: value.bfloat16() if name.endswith("hidden_states") else value for name, value in inputs(resident).items()}
    streamed = load_streamed(CogVideoXTransformer3DModel, saved["5b-i2v"], "cpu", dtype=torch.bfloat16)
    exact = forward(resident.bfloat16(), kwargs)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=0)
        with tabulated(streamed, torch.tensor([999, 431])) as tables:
            assert forward(streamed, kwargs).isfinite().all()
            tables.refresh()
    torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=0)


def test_a_text_encoder_streams_too(folders):
    folder = folders() / "text_encoder"
    resident = T5EncoderModel.from_pretrained(folder)
    streamed = load_streamed(T5EncoderModel, folder, "cpu")
    assert is_stand_in(streamed.shared.weight)
    assert is_stand_in(streamed.encoder.embed_tokens.weight)
    tokens = torch.randint(0, 160, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(streamed(tokens)[0], resident(tokens)[0], rtol=0, atol=0)
    stop_streaming(streamed)
    assert torch.equal(streamed.shared.weight, resident.shared.weight)
    assert streamed.shared.weight is streamed.encoder.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_text_encoder_keeps_the_precision_that_transformers_gives_it(folders, dtype):
    folder = folders() / "text_encoder"
    resident = T5EncoderModel.from_pretrained(folder, dtype=dtype)
    streamed = load_streamed(T5EncoderModel, folder, "cpu", dtype=dtype)
    assert {n: p.dtype for n, p in streamed.named_parameters()} == {n: p.dtype for n, p in resident.named_parameters()}
    with torch.no_grad():
        tokens = torch.randint(0, 160, (2, 9))
        torch.testing.assert_close(streamed(tokens)[0], resident(tokens)[0], rtol=0, atol=0)


def test_a_pipeline_with_streamed_models(loaded, folders):
    resident = call(loaded)
    parts = {
        "transformer": load_streamed(CogVideoXTransformer3DModel, folders() / "transformer", "cpu"),
        "text_encoder": load_streamed(T5EncoderModel, folders() / "text_encoder", "cpu"),
    }
    pipe = type(loaded).from_pretrained(folders(), **parts)
    torch.testing.assert_close(call(pipe), resident, rtol=0, atol=2e-5)


def test_a_model_in_memory_streams_from_where_it_was_saved(saved, resident):
    kwargs = inputs(resident)
    exact = forward(resident, kwargs)
    stream(resident, "cpu", source="disk", directory=saved["5b-i2v"])
    assert is_streamed(resident)
    torch.testing.assert_close(forward(resident, kwargs), exact, rtol=0, atol=0)
    stop_streaming(resident)
    assert all(p.requires_grad for p in resident.parameters())
    with torch.no_grad():
        resident.transformer_blocks[1].ff.net[2].bias.add_(1)
    with pytest.raises(ValueError, match=r"transformer_blocks.1.ff.net.2.bias differs from .*: save the model as it is"):
        stream(resident, "cpu", source="disk", directory=saved["5b-i2v"])
    assert not is_streamed(resident)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_only_two_blocks_are_there_at_a_time(streamed):
    blocks, most = streamed.transformer_blocks, []

    def weights(module):
        return sum(p.nbytes for p in module.parameters() if not is_stand_in(p) and p.numel() > 1)

    for block in blocks:
        block.ff.register_forward_hook(lambda *_: most.append([weights(block) for block in blocks]))
    with tabulated(streamed, torch.tensor([999, 431])):
        forward(streamed, inputs(streamed))
    assert len(most) == 4
    assert all(sum(map(bool, sizes)) == 1 for sizes in most), "a block that is on its way is not attached yet"
    modulations = sum(p.nbytes for norm in (blocks[0].norm1, blocks[0].norm2) for p in norm.linear.parameters())
    assert max(most[0]) == sum(p.nbytes for p in blocks[0].parameters()) - modulations
    assert not any(map(weights, blocks))
    assert not streamed._cogvideox_streaming.ring.slots


def test_bytes_are_told_in_advance(saved, streamed):
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config(CogVideoXTransformer3DModel.load_config(saved["5b-i2v"]))
    ring, parts = streamed._cogvideox_streaming.ring, streamed._cogvideox_streaming
    slots = []
    streamed.transformer_blocks[1].register_forward_hook(lambda *_: slots.extend(slot.memory.nbytes for slot in ring.slots))
    forward(streamed, inputs(streamed))
    assert len(slots) == 2
    expected = sum(slots) + sum(t.nbytes for t in parts.resident) + max(unit.nbytes for unit in parts.lent)
    assert streamed_bytes(model) == streamed_bytes(streamed) == expected
    assert streamed_bytes(model, ahead=2) - streamed_bytes(model, ahead=1) == slots[0]
    assert streamed_bytes(model, ahead=99) == streamed_bytes(model, ahead=3)


def test_an_error_in_a_pass_leaves_no_block_behind(streamed, resident):
    kwargs = inputs(resident)

    def fail(*_):
        raise RuntimeError("stop")

    handle = streamed.transformer_blocks[2].ff.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        forward(streamed, kwargs)
    assert not streamed._cogvideox_streaming.ring.slots
    assert all(is_stand_in(p) for p in streamed.transformer_blocks[2].ff.parameters())
    handle.remove()
    torch.testing.assert_close(forward(streamed, kwargs), forward(resident, kwargs), rtol=0, atol=0)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 3, 1, 0, 0, 2], [2, 0]])
def test_the_ring_gives_each_unit_its_own_values_in_any_order(order):
    values = [[torch.randn(3, 5), torch.arange(i + 1)] for i in range(4)]
    units = []
    for tensors in values:
        unit = Unit([tensor.clone() for tensor in tensors], None)
        unit.pack(pinned=False)
        unit.detach(CPU)
        units.append(unit)
    ring = Ring(units, CPU, 1)
    for index in order:
        ring.use(index)
        assert all(torch.equal(a, b) for a, b in zip(units[index].tensors, values[index], strict=True))
        ring.done(index)
        assert units[index].tensors[0].isnan().all()
    ring.empty()


# --- what acts on the model beside ------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_lora_adapters_come_and_go(saved, resident, before):
    kwargs = inputs(resident)
    plain = forward(resident, kwargs)
    streamed = load_streamed(CogVideoXTransformer3DModel, saved["5b-i2v"], "cpu")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "ff.net.0.proj", "norm1.linear"], init_lora_weights=False)
    if before:
        stop_streaming(streamed)
    for model in (resident, streamed):
        torch.manual_seed(1)
        model.add_adapter(config)
    if before:
        stream(streamed, "cpu", source="disk", directory=saved["5b-i2v"])
    exact = forward(resident, kwargs)
    torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=0)
    assert (exact - plain).abs().max() > 1e-2
    with tabulated(streamed, torch.tensor([999, 431])):
        torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=2e-6)
    streamed.set_adapters("default", 0.5)
    resident.set_adapters("default", 0.5)
    torch.testing.assert_close(forward(streamed, kwargs), forward(resident, kwargs), rtol=0, atol=0)
    streamed.delete_adapters("default")
    torch.testing.assert_close(forward(streamed, kwargs), plain, rtol=0, atol=0)


def test_a_feature_cache_goes_with_it(streamed, resident):
    kwargs = inputs(resident)
    exact = forward(resident, kwargs)
    streamed.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    used, use = [], streamed._cogvideox_streaming.ring.use
    streamed._cogvideox_streaming.ring.use = lambda index: (used.append(index), use(index))
    with streamed.cache_context("cond_uncond"):
        for _ in range(2):
            torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=2e-5)
    assert used == [0, 1, 2, 3, 0], "blocks that are skipped are not brought"
    with pytest.raises(ValueError, match=r"call disable_cache\(\) before stop_streaming"):
        stop_streaming(streamed)
    streamed.disable_cache()
    stop_streaming(streamed)
    torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=0)


def test_samples_one_by_one_bring_each_block_once(streamed, resident):
    kwargs = inputs(resident)
    used, use = [], streamed._cogvideox_streaming.ring.use
    streamed._cogvideox_streaming.ring.use = lambda index: (used.append(index), use(index))
    streamed.split_batch()
    streamed.chunk_feed_forward(16)
    torch.testing.assert_close(forward(streamed, kwargs), forward(resident, kwargs), rtol=0, atol=2e-6)
    assert used == [0, 1, 2, 3]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda m: m.to("cpu"), "moving or casting it"),
        (lambda m: m.half(), "moving or casting it"),
        (lambda m: m.state_dict(), r"state_dict\(\)"),
        (lambda m: m.save_pretrained("nowhere"), r"save_pretrained\(\)"),
        (lambda m: m.fuse_lora(), r"fuse_lora\(\)"),
        (lambda m: m.fuse_qkv_projections(), r"fuse_qkv_projections\(\)"),
        (lambda m: m.enable_group_offload(onload_device=CPU), r"enable_group_offload\(\)"),
        (lambda m: m.enable_layerwise_casting(), r"enable_layerwise_casting\(\)"),
    ],
)
def test_methods_that_would_act_on_stand_ins_refuse(streamed, act, what):
    with pytest.raises(ValueError, match=rf"{what}.* is not possible while this CogVideoXTransformer3DModel is streamed: call stop_stream"):
        act(streamed)


def test_gradients_are_refused(streamed):
    kwargs = inputs(streamed)
    kwargs["hidden_states"].requires_grad_(True)
    with pytest.raises(ValueError, match="gone before the backward pass"):
        streamed(**kwargs)


def test_requests_that_make_no_sense_are_refused(saved, resident, streamed):
    folder = saved["5b-i2v"]
    cases = [
        (resident, {"source": "tape"}, "source='tape' is unknown: use one of memory, disk"),
        (resident, {"source": "disk"}, "'disk' needs the folder"),
        (resident, {"source": "memory", "directory": folder}, "'memory' none"),
        (resident, {}, "need not be streamed to the CPU: use source='disk'"),
        (resident, {"source": "disk", "directory": folder, "ahead": -1}, "ahead=-1 is not possible"),
        (resident, {"source": "disk", "directory": saved["2b"]}, r"patch_embed.proj.weight is .* has it in the shape"),
        (streamed, {"source": "disk", "directory": folder}, "is streamed already"),
        (nn.Linear(2, 2), {"source": "disk", "directory": folder}, "weight is .* has no such tensor"),
    ]
    for model, options, message in cases:
        with pytest.raises(ValueError, match=message):
            stream(model, "cpu", **options)
    with pytest.raises(ValueError, match="is not streamed"):
        stop_streaming(resident)
    resident.enable_group_offload(onload_device=CPU, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="is offloaded already"):
        stream(resident, "cpu", source="disk", directory=folder)


def test_a_model_without_blocks_is_refused(tmp_path):
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        stream(model, "cpu", source="disk", directory=tmp_path)


def test_files_that_are_missing_or_cut_off_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .safetensors file in .*: give the folder of one model"):
        stored_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no config.json in .*: give the folder of one model"):
        load_streamed(CogVideoXTransformer3DModel, tmp_path, "cpu")
    whole = min(Path(saved["5b-i2v"]).glob("*.safetensors")).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for content in (b"", whole[:7], whole[:100], whole[:-1], b"<html>" * 99, whole[:8] + b"[" + whole[9:], whole[: 8 + length]):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(OSError, match=r"model.safetensors is corrupt .* Copy or download it again"):
            stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    name, stored = next(iter(stored_tensors(tmp_path).items()))
    (tmp_path / "model.safetensors").write_bytes(whole[: stored.offset + 1])
    with pytest.raises(OSError, match="ends too early: it has changed"):
        stored.read(torch.empty(stored.shape, dtype=stored.dtype))
    assert name


# --- compilation and accelerators -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_streamed_blocks_compile(streamed, resident, fresh_compiler):
    kwargs, graphs = inputs(resident), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    exact = forward(resident, kwargs)
    streamed.compile_repeated_blocks(backend=backend)
    with tabulated(streamed, torch.tensor([999, 431])):
        for _ in range(2):
            torch.testing.assert_close(forward(streamed, kwargs), exact, rtol=0, atol=2e-6)
    assert len(graphs) == 1, "all blocks run the same code"
    torch.compiler.reset()
    streamed.compile_repeated_blocks(backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile without fullgraph=True"):
        forward(streamed, kwargs)


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["memory", "disk"])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_streaming_to_an_accelerator(saved, resident, source, ahead):
    kwargs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs(resident).items()}
    exact = forward(CogVideoXTransformer3DModel.from_pretrained(saved["5b-i2v"]).cuda(), kwargs)
    stream(resident, "cuda", source=source, directory=saved["5b-i2v"] if source == "disk" else None, ahead=ahead)
    for _ in range(3):
        torch.testing.assert_close(forward(resident, kwargs), exact, rtol=0, atol=0)
    with tabulated(resident, torch.tensor([999, 431], device="cuda")):
        torch.testing.assert_close(forward(resident, kwargs), exact, rtol=0, atol=2e-6)
    stop_streaming(resident)
    torch.testing.assert_close(forward(resident.cuda(), kwargs), exact, rtol=0, atol=0)
