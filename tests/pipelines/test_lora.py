"""LoRA on a pipeline: every layout at the right strength, several at once, fused, unloaded, saved; files, folders, the hub; mistakes."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from safetensors.torch import save_file

import diffusers_cogvideox.pipelines.lora_files as lora_files
from diffusers_cogvideox import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.generation.lora_info import describe_lora, is_lora_place
from diffusers_cogvideox.generation.sources import read_loras
from diffusers_cogvideox.pipelines.lora_files import find_lora_file, open_lora
from lora_cases import SPELLINGS, delta, factors, spelled
from parity import TINY_TRANSFORMERS, StockPipeline, StockTransformer, randomize
from transformer_cases import inputs

LORA = factors()
OTHER = factors(rank=2, seed=1)
ALPHA = 3.0


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    """Our pipeline with a transformer of its own, and nothing else."""
    return pipeline(randomize(CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"])).eval())


@pytest.fixture
def stock() -> StockPipeline:
    """Diffusers' pipeline over equal weights."""
    return pipeline(randomize(StockTransformer(**TINY_TRANSFORMERS["5b"])).eval(), StockPipeline)


def pipeline(transformer, cls=CogVideoXPipeline):
    rest = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    return cls(transformer=transformer, **rest)


def forward(pipe):
    with torch.no_grad():
        torch.manual_seed(1)
        return pipe.transformer(**inputs(pipe.transformer))[0]


def merged(base: dict[str, torch.Tensor], *loras) -> torch.nn.Module:
    """A transformer without adapters whose weights are W + alpha / r * B A, computed here."""
    model = CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"])
    weights = {name: value.clone() for name, value in base.items()}
    for lora, alpha in loras:
        for block, target in lora:
            weights[f"transformer_blocks.{block}.attn1.{target}.weight"] += delta(lora, block, target, alpha)
    model.load_state_dict(weights)
    return pipeline(model.eval())


def copied(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def adapter_deltas(pipe, name: str = "a") -> dict[tuple[int, str], torch.Tensor]:
    return {
        (block, target): pipe.transformer.get_submodule(f"transformer_blocks.{block}.attn1.{target}").get_delta_weight(name).detach()
        for block, target in LORA
    }


def assert_strength(pipe, alpha: float, name: str = "a") -> None:
    for (block, target), found in adapter_deltas(pipe, name).items():
        torch.testing.assert_close(found, delta(LORA, block, target, alpha), rtol=0, atol=1e-6)


# --- strength -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layout_changes_the_weights_by_alpha_over_rank_times_b_a(pipe, spelling):
    pipe.load_lora_weights(spelled(LORA, spelling), adapter_name="a", lora_alpha=ALPHA)
    assert_strength(pipe, ALPHA)


@pytest.mark.parametrize("spelling", ["diffusers", "comfyui", "fun"])
def test_alpha_of_the_file_is_used(pipe, spelling, tmp_path):
    save_file(spelled(LORA, spelling, alpha=ALPHA), tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="a")
    assert_strength(pipe, ALPHA)


def test_the_prediction_is_that_of_merged_weights(pipe):
    base, plain = copied(pipe.transformer), forward(pipe)
    pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=ALPHA)
    found = forward(pipe)
    torch.testing.assert_close(found, forward(merged(base, (LORA, ALPHA))), rtol=0, atol=2e-5)
    assert (found - plain).abs().max() > 0.1


def test_dora_scales_the_rows_of_the_sum(pipe):
    """DoRA's definition: m * (W + dW) / |W + dW|, row by row."""
    base = copied(pipe.transformer)
    lengths = {layer: 0.5 + torch.rand(64, 1) for layer in LORA}
    name = SPELLINGS["fun"][1]
    scales = {name(*layer, "A").partition(".lora")[0] + ".dora_scale": lengths[layer] for layer in LORA}
    pipe.load_lora_weights(spelled(LORA, "fun") | scales, lora_alpha=ALPHA)
    for (block, target), m in lengths.items():
        key = f"transformer_blocks.{block}.attn1.{target}.weight"
        summed = base[key] + delta(LORA, block, target, ALPHA)
        base[key] = m * summed / summed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(forward(pipe), forward(merged(base)), rtol=0, atol=2e-5)


def test_factors_take_the_dtype_of_the_model(pipe):
    pipe.transformer.to(torch.bfloat16)
    pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=1)
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}


def test_transformers_of_diffusers_take_every_layout(stock):
    mine = pipeline(stock.transformer)
    mine.load_lora_weights(spelled(LORA, "fun"), adapter_name="a", lora_alpha=ALPHA)
    assert_strength(mine, ALPHA)


# --- several, fused, unloaded -------------------------------------------------------------------------------------------


@pytest.fixture
def two(pipe):
    """The pipeline with two adapters of different layouts, and its weights before."""
    before = copied(pipe.transformer)
    pipe.load_lora_weights(spelled(LORA, "sat"), adapter_name="a", lora_alpha=1)
    pipe.load_lora_weights(spelled(OTHER, "fun", alpha=2.0), adapter_name="b")
    return pipe, before


@pytest.mark.parametrize(("names", "weights"), [(["a", "b"], [0.5, 2.0]), (["b"], [1.0]), (["a"], [0.0])])
def test_adapters_and_their_weights(two, names, weights):
    pipe, before = two
    pipe.set_adapters(names, weights)
    known = {"a": (LORA, 1.0), "b": (OTHER, 2.0)}
    chosen = [(known[name][0], known[name][1] * weight) for name, weight in zip(names, weights, strict=True)]
    torch.testing.assert_close(forward(pipe), forward(merged(before, *chosen)), rtol=0, atol=2e-5)
    assert pipe.get_list_adapters() == {"transformer": ["a", "b"]}


def test_scale_of_one_call(pipe):
    before = copied(pipe.transformer)
    pipe.load_lora_weights(spelled(LORA, "diffusers"), lora_alpha=ALPHA)
    torch.manual_seed(1)
    with torch.no_grad():
        found = pipe.transformer(**inputs(pipe.transformer), attention_kwargs={"scale": 0.5})[0]
    torch.testing.assert_close(found, forward(merged(before, (LORA, 0.5 * ALPHA))), rtol=0, atol=2e-5)


def test_unloading_restores_every_bit(two):
    pipe, before = two
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_fusing_and_unfusing(two):
    pipe, before = two
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    expected = copied(merged(before, (LORA, 1.0), (OTHER, 1.0)).transformer)
    pipe.fuse_lora(adapter_names=["a", "b"])
    assert pipe.num_fused_loras == 2
    assert_weights(pipe, expected)
    torch.testing.assert_close(forward(pipe), forward(merged(expected)), rtol=0, atol=2e-5)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert_weights(pipe, before)


def test_what_is_fused_stays_when_it_is_unloaded(pipe):
    before = copied(pipe.transformer)
    pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=1)
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    assert_weights(pipe, copied(merged(before, (LORA, 0.5)).transformer))


def assert_weights(pipe, expected):
    found = {name.replace(".base_layer", ""): value for name, value in pipe.transformer.state_dict().items() if "lora_" not in name}
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_deleting_one_of_two(two):
    pipe, before = two
    pipe.delete_adapters("a")
    pipe.set_adapters("b")
    torch.testing.assert_close(forward(pipe), forward(merged(before, (OTHER, 2.0))), rtol=0, atol=2e-5)


def test_hot_swapping(pipe):
    pipe.load_lora_weights(spelled(factors(seed=2), "diffusers"), adapter_name="a", lora_alpha=1)
    pipe.load_lora_weights(spelled(LORA, "sat"), adapter_name="a", hotswap=True, lora_alpha=1)
    assert_strength(pipe, 1.0)


# --- saving -------------------------------------------------------------------------------------------------------------


def test_diffusers_loads_what_we_save_at_the_right_strength(pipe, stock, tmp_path):
    pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=ALPHA)
    pipe.save_lora_weights(tmp_path, pipe.transformer)
    stock.load_lora_weights(tmp_path, adapter_name="a")
    assert_strength(stock, ALPHA)
    torch.testing.assert_close(forward(stock), forward(pipe), rtol=0, atol=2e-5)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, adapter_name="a")
    assert_strength(pipe, ALPHA)


def test_patterns_survive_saving(pipe, stock, tmp_path):
    tensors = spelled(LORA, "fun", alpha=ALPHA)
    tensors["lora_unet__transformer_blocks_1_attn1_to_out_0.alpha"] = torch.tensor(8.0)
    pipe.load_lora_weights(tensors, adapter_name="a")
    CogVideoXPipeline.save_lora_weights(tmp_path, pipe.transformer)
    stock.load_lora_weights(tmp_path, adapter_name="a")
    torch.testing.assert_close(adapter_deltas(stock), adapter_deltas(pipe), rtol=0, atol=1e-6)
    torch.testing.assert_close(adapter_deltas(stock)[1, "to_out.0"], delta(LORA, 1, "to_out.0", 8.0), rtol=0, atol=1e-6)


def test_the_state_dict_is_what_diffusers_takes(stock):
    tensors, metadata = CogVideoXPipeline.lora_state_dict(spelled(LORA, "fun", alpha=ALPHA), return_lora_metadata=True)
    assert CogVideoXPipeline.lora_state_dict(spelled(LORA, "fun", alpha=ALPHA)).keys() == tensors.keys()
    stock.load_lora_into_transformer(tensors, stock.transformer, adapter_name="a", metadata=metadata)
    assert_strength(stock, ALPHA)


def test_saving_tensors_alone_warns(pipe, tmp_path, caplog):
    pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=ALPHA, adapter_name="a")
    tensors = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="a")
    pipe.save_lora_weights(tmp_path, tensors)
    assert "saved without its alpha" in caplog.text
    caplog.clear()
    pipe.save_lora_weights(tmp_path, tensors, transformer_lora_adapter_metadata=pipe.transformer.peft_config["a"].to_dict())
    assert caplog.text == ""
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as content:
        assert json.loads(content.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == ALPHA


def test_saving_needs_one_adapter(two, tmp_path):
    pipe, _ = two
    with pytest.raises(ValueError, match=r"has 2 adapters \(a, b\), so it is not clear what to save"):
        pipe.save_lora_weights(tmp_path, pipe.transformer)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=r"has 0 adapters \(none\)"):
        pipe.save_lora_weights(tmp_path, pipe.transformer)


# --- where files are ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_name", [None, "pytorch_lora_weights.safetensors"])
def test_a_folder(tmp_path, weight_name):
    save_file(spelled(LORA, "diffusers"), tmp_path / "pytorch_lora_weights.safetensors")
    save_file(spelled(OTHER, "diffusers"), tmp_path / "another.safetensors")
    (tmp_path / "notes.txt").touch()
    assert open_lora(tmp_path, weight_name=weight_name).shapes == open_lora(tmp_path.parent, subfolder=tmp_path.name).shapes
    assert {layer.rank for layer in open_lora(tmp_path).layers.values()} == {4}
    assert {layer.rank for layer in open_lora(tmp_path, weight_name="another.safetensors").layers.values()} == {2}


def test_a_folder_of_peft(pipe, tmp_path):
    """`PeftModel.save_pretrained` keeps alpha in a file of its own."""
    config = peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    model = peft.get_peft_model(pipe.transformer, config)
    expected = model.base_model.model.transformer_blocks[1].attn1.to_q.get_delta_weight("default").detach()
    model.save_pretrained(tmp_path)
    fresh = pipeline(randomize(CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"])))
    fresh.load_lora_weights(tmp_path, adapter_name="a")
    torch.testing.assert_close(fresh.transformer.transformer_blocks[1].attn1.to_q.get_delta_weight("a").detach(), expected)


def test_a_folder_of_a_sat_run(pipe, tmp_path):
    (tmp_path / "1000").mkdir()
    (tmp_path / "latest").write_text("1000\n")
    torch.save({"module": spelled(LORA, "sat"), "iteration": 1000}, tmp_path / "1000" / "mp_rank_00_model_states.pt")
    pipe.load_lora_weights(tmp_path, adapter_name="a", lora_alpha=1)
    assert_strength(pipe, 1.0)


def test_a_run_that_points_elsewhere(tmp_path):
    (tmp_path / "latest").write_text("../other")
    with pytest.raises(OSError, match=r"names '../other', which is outside of its folder"):
        find_lora_file(tmp_path)


@pytest.mark.parametrize("names", [(), ("a.safetensors", "b.safetensors")])
def test_a_folder_that_leaves_a_choice(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=rf"holds {len(names)} weight files .*weight_name=\.\.\."):
        open_lora(tmp_path)


def test_the_hub(monkeypatch, tmp_path):
    """Files are listed and fetched with the caller's arguments; PEFT's config comes along."""
    remote = tmp_path / "remote"
    (remote / "sub").mkdir(parents=True)
    save_file(spelled(LORA, "peft"), remote / "sub" / "adapter_model.safetensors")
    (remote / "sub" / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 3}')
    calls = []

    def download(repository: str, file: str, **options) -> str:
        calls.append((repository, file, options))
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(remote / file, tmp_path / "cache" / Path(file).name)

    monkeypatch.setattr(lora_files, "hf_hub_download", download)
    monkeypatch.setattr(
        lora_files.HfApi, "list_repo_files", lambda *_, **__: ["README.md", "x.safetensors", "sub/adapter_model.safetensors"]
    )
    lora = open_lora("owner/name", subfolder="sub", revision="v1", token=None)
    assert {layer.alpha for layer in lora.layers.values()} == {3.0}
    assert calls == [("owner/name", f"sub/adapter_{file}", {"revision": "v1"}) for file in ("config.json", "model.safetensors")]


@pytest.mark.parametrize("place", ["nowhere", "./a/b", "/no/such.safetensors"])
def test_places_that_are_not_there(place):
    with pytest.raises(FileNotFoundError, match=f"there is no file or folder '{place}'"):
        open_lora(place)


def test_repositories_that_are_not_there(monkeypatch):
    def refuse(*_, **__):
        raise HFValidationError("bad name")

    monkeypatch.setattr(lora_files, "hf_hub_download", refuse)
    with pytest.raises(FileNotFoundError, match="no such repository"):
        open_lora("owner/na me", weight_name="a.safetensors")


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """owner/name in the hub's cache, with links as it makes them; there is no network in these tests."""
    folder = tmp_path / "hub" / "models--owner--name"
    snapshot = folder / "snapshots" / ("0" * 40)
    (snapshot / "sub").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    for number, (file, alpha) in enumerate([("adapter_model.safetensors", 3), ("sub/other.safetensors", 5)]):
        save_file(
            spelled(LORA, "peft"), folder / "blobs" / str(number), metadata={"lora_config": json.dumps({"r": 4, "lora_alpha": alpha})}
        )
        (snapshot / file).symlink_to(folder / "blobs" / str(number))
    (snapshot / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 2}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize(("text", "file", "alpha"), [("", "adapter_model", 2), ("/sub/other.safetensors", "sub/other", 5)])
def test_a_repository_without_a_connection(cached, text, file, alpha):
    path = lora_files.fetch_lora(f"owner/name{text}")
    assert path == cached / f"{file}.safetensors"
    (found,) = read_loras((f"owner/name{text}:0.5",))
    assert (found.file.path, found.scale) == (str(path), 0.5)  # the name, not what the link points to
    assert {layer.alpha for layer in open_lora(found.file.path).layers.values()} == {alpha}
    found.file.check()
    if text:
        assert is_lora_place(f"owner/name{text}") and describe_lora(f"owner/name{text}")["alphas"] == [alpha]


@pytest.mark.parametrize("text", ["owner/else", "owner/name/no.safetensors", "owner/na me", "owner/name/sub/no.safetensors"])
def test_what_is_not_in_the_cache_either(cached, text):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder 'owner/.*', and no such repository or file on the hub or in"):
        lora_files.fetch_lora(text)


@pytest.mark.parametrize("text", ["no.safetensors", "folder/no.safetensors", "./a/b", "/a/b/c", "../a/b"])
def test_files_that_are_no_repositories(cached, text):
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*{Path(text).name}\.$"):
        read_loras((text,))


# --- mistakes -----------------------------------------------------------------------------------------------------------


def test_a_lora_of_another_width(pipe):
    before = copied(pipe.transformer)
    with pytest.raises(ValueError, match=r"in 8 of 8 layers: .*LoRA \(96, 96\), model \(64, 64\)"):
        pipe.load_lora_weights(spelled(factors(width=96), "sat"), lora_alpha=1)
    assert pipe.transformer.state_dict().keys() == before.keys()


def test_fused_projections(pipe):
    pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"projections are fused: call unfuse_qkv_projections\(\) first"):
        pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=1)
    pipe.unfuse_qkv_projections()
    pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=1)
    with pytest.raises(ValueError, match="Unload LoRA"):
        pipe.fuse_qkv_projections()


def test_arguments_that_nobody_reads(pipe):
    with pytest.raises(TypeError, match="unknown arguments lora_rank: known are weight_name"):
        pipe.load_lora_weights(spelled(LORA, "sat"), lora_rank=4)


def test_a_name_that_is_taken(pipe):
    pipe.load_lora_weights(spelled(LORA, "sat"), adapter_name="a", lora_alpha=1)
    with pytest.raises(ValueError, match="a already in use"):
        pipe.load_lora_weights(spelled(LORA, "sat"), adapter_name="a", lora_alpha=1)


def test_pickles_can_be_forbidden(pipe, tmp_path):
    torch.save(spelled(LORA, "diffusers"), tmp_path / "lora.bin")
    with pytest.raises(OSError, match="not a safetensors file"):
        pipe.load_lora_weights(tmp_path, use_safetensors=True)


def test_what_is_missing_is_said(pipe, monkeypatch):
    with pytest.raises(ValueError, match="no transformer to load a LoRA into"):
        pipeline(None).load_lora_weights(spelled(LORA, "sat"), lora_alpha=1)
    monkeypatch.setattr("diffusers_cogvideox.pipelines.lora.is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install peft"):
        pipe.load_lora_weights(spelled(LORA, "sat"), lora_alpha=1)
