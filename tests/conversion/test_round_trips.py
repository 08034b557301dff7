"""Both ways, bit by bit: models of all variants, random architectures, LoRAs; and into the containers that each side loads."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cogvideox import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers_cogvideox.checkpoints.lora import to_peft
from diffusers_cogvideox.conversion import loras
from diffusers_cogvideox.conversion.convert import convert
from diffusers_cogvideox.conversion.options import ConvertOptions
from lora_cases import SPELLINGS, delta, factors, spelled
from parity import TINY_TRANSFORMERS, StockPipeline, StockTransformer, StockVAE, randomize
from sat_cases import converted, sat_transformer, sat_vae, tiny_transformer, tiny_vae, write_sat

COMPUTED = ("pos_embed.freqs_sin", "pos_embed.freqs_cos", "pos_embed.pos_embedding")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


def public(model):
    """The config as its file has it."""
    return {key: value for key, value in json.loads(model.to_json_string()).items() if not key.startswith("_")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", TINY_TRANSFORMERS)
def test_diffusers_to_sat_to_diffusers(tmp_path, variant, dtype):
    model = tiny_transformer(variant).to(dtype)
    model.save_pretrained(tmp_path / "model")
    sat = converted(tmp_path / "model", tmp_path / "sat")
    assert (sat / "latest").read_text() == "1"
    stored = torch.load(sat / "1" / "mp_rank_00_model_states.pt", weights_only=True, mmap=True)
    assert list(stored) == ["module"]
    expected = sat_transformer(model)
    computed = COMPUTED[: 2 if model.config.use_learned_positional_embeddings else 3]
    for name in [name for name in expected if name.endswith(computed)]:  # diffusers' own computation, on whatever processor
        tolerance = 1e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(stored["module"][name], expected[name], rtol=0, atol=tolerance)
        expected[name] = stored["module"][name]
    assert_same(stored["module"], expected)
    again = StockTransformer.from_pretrained(converted(sat, tmp_path / "again"), dtype=dtype)
    assert_same(again.state_dict(), model.state_dict())
    assert public(again) == public(model)


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_sat_to_diffusers_to_sat(tmp_path, variant):
    """A checkpoint that the original code wrote, which has no configs beside it."""
    first = converted(_saved(tiny_transformer(variant), tmp_path / "model"), tmp_path / "first")
    (first / "diffusers_configs.json").unlink()
    second = converted(converted(first, tmp_path / "there"), tmp_path / "second")
    files = [folder / "1" / "mp_rank_00_model_states.pt" for folder in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()  # the container too
    assert (first / "latest").read_bytes() == (second / "latest").read_bytes()


def _saved(model, folder):
    model.save_pretrained(folder)
    return folder


def test_vae(tmp_path):
    vae = tiny_vae()
    folder = _saved(vae, tmp_path / "vae")
    sat = converted(folder, tmp_path / "sat")
    expected = {name: tensor for name, tensor in sat_vae(vae).items() if not name.startswith("loss.")}
    assert_same(torch.load(sat / "3d-vae.pt", weights_only=True)["state_dict"], expected)
    again = StockVAE.from_pretrained(converted(sat, tmp_path / "again"))
    assert_same(again.state_dict(), vae.state_dict())
    assert public(again) == public(vae)


def test_a_vae_with_other_groups_keeps_its_config_on_the_way(tmp_path):
    """The original code has 32 groups; what is converted from diffusers may have others, which the configs beside it tell."""
    vae = randomize(StockVAE(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=2, latent_channels=4))
    sat = converted(_saved(vae, tmp_path / "vae"), tmp_path / "sat" / "vae.pt")
    with pytest.raises(ValueError, match=r"channels \(8, 8, 16, 16\) cannot be normalised in 32 groups: say how many with --like"):
        converted(sat, tmp_path / "again")
    assert public(AutoencoderKLCogVideoX.from_pretrained(converted(sat, tmp_path / "again", like=str(tmp_path / "vae")))) == public(vae)


def random_architecture(number: int) -> dict:
    """Config of a transformer that somebody may have trained."""
    rng = random.Random(number)
    heads, head, latents = rng.choice([1, 2, 3]), rng.choice([16, 32, 48]), rng.choice([2, 4, 16])
    width = rng.choice([16, 32])
    depth = rng.choice([None, None, 1, 2, 4])
    learned = depth is None and rng.random() < 0.4
    image = rng.random() < 0.5
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head,
        "num_layers": rng.choice([1, 2, 3, 11]),
        "in_channels": rng.choice([latents, 2 * latents, 2 * latents + 1]),
        "out_channels": latents,
        "time_embed_dim": width,
        "text_embed_dim": rng.choice([8, 24]),
        "max_text_seq_length": rng.choice([1, 7, 20]),
        "patch_size": rng.choice([1, 2, 4]),
        "patch_size_t": depth,
        "patch_bias": depth is None and rng.random() < 0.7,
        "attention_bias": rng.random() < 0.7,
        "ofs_embed_dim": width if depth and image else None,
        "use_rotary_positional_embeddings": bool(depth) or learned or rng.random() < 0.5,
        "use_learned_positional_embeddings": learned,
        "sample_height": 4 * rng.randint(1, 4),
        "sample_width": 4 * rng.randint(1, 5),
        "sample_frames": 4 * rng.randint(0, 3) + 1,
    }


@pytest.mark.parametrize("number", range(24))
def test_random_architectures(tmp_path, number):
    """There and back, with the configs beside the checkpoint, and without where tensors tell everything."""
    config = random_architecture(number)
    torch.manual_seed(number)
    model = randomize(CogVideoXTransformer3DModel(**config), number)
    if config["use_learned_positional_embeddings"]:
        model.patch_embed.pos_embedding.normal_()
    sat = converted(_saved(model, tmp_path / "model"), tmp_path / "sat")
    again = CogVideoXTransformer3DModel.from_pretrained(converted(sat, tmp_path / "again"))
    assert_same(again.state_dict(), model.state_dict())
    assert public(again) == public(model)
    if config["patch_size_t"] in (None, 2) and (config["patch_size_t"] is None or config["patch_size"] == 2):
        (sat / "diffusers_configs.json").unlink()
        told = CogVideoXTransformer3DModel.from_pretrained(converted(sat, tmp_path / "told"))
        assert_same(told.state_dict(), model.state_dict())
        open_sizes = {"sample_height", "sample_width", "sample_frames", "max_text_seq_length"} if config["patch_size_t"] else set()
        text = (
            set()
            if config["use_learned_positional_embeddings"] or not config["use_rotary_positional_embeddings"]
            else {"max_text_seq_length"}
        )
        unused = {"patch_bias"} if config["patch_size_t"] else set()
        differing = {key for key, value in public(model).items() if public(told)[key] != value}
        assert differing <= open_sizes | text | unused


def test_dtype_and_shards(tmp_path):
    sat = write_sat(tmp_path / "sat", sat_transformer(tiny_transformer("5b")))
    folder = converted(sat, tmp_path / "model", dtype="bfloat16", max_shard_size="100KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 110_000 for file in files)
    for cls in (StockTransformer, CogVideoXTransformer3DModel):
        state = cls.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        assert_same(state, tiny_transformer("5b").bfloat16().state_dict())


# --- LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("alpha", [1.0, 64.0])
def test_lora_of_sat_there_and_back(tmp_path, alpha, rank, blocks):
    lora = factors(rank, blocks=blocks)
    tensors = spelled(lora, "sat")
    first = converted(write_sat(tmp_path / "run", tensors), tmp_path / "lora", lora_alpha=alpha)
    second = converted(first, tmp_path / "sat", to="sat")
    stored = torch.load(second / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert_same(stored, tensors)
    third = converted(second, tmp_path / "again")  # its alpha is known from the first conversion
    files = [folder / "pytorch_lora_weights.safetensors" for folder in (first, third)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_lora_of_any_layout_at_its_strength_in_diffusers(tmp_path, spelling, folders):
    """The weights that diffusers computes with, beside W + alpha / r B A."""
    lora = factors(4)
    path = tmp_path / "lora.pt"
    torch.save(spelled(lora, spelling), path)
    file = converted(path, tmp_path / "out.safetensors", lora_alpha=2.0)
    assert len(load_file(file)) == 16
    pipe = StockPipeline.from_pretrained(folders("5b"))
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    pipe.load_lora_weights(file)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = pipe.transformer.state_dict()
    for block, target in lora:
        name = f"transformer_blocks.{block}.attn1.{target}.weight"
        torch.testing.assert_close(after[name] - before[name], delta(lora, block, target, 2.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("merge", [False, True])
def test_a_whole_sat_checkpoint_with_a_lora(tmp_path, merge):
    model, lora = tiny_transformer("5b"), factors(4)
    base = {
        name.replace("query_key_value.", "query_key_value.original.").replace("dense.", "dense.original."): tensor
        for name, tensor in sat_transformer(model).items()
    }
    run, options = write_sat(tmp_path / "run", base | spelled(lora, "sat")), {"lora_alpha": 2.0, "merge_lora": merge}
    folder = converted(run, tmp_path / "out", verify=True, **options)
    found, state = StockTransformer.from_pretrained(folder).state_dict(), model.state_dict()
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").exists() is not merge
    if not merge:
        assert_same(found, state)
        return
    for block, target in lora:
        name = f"transformer_blocks.{block}.attn1.{target}.weight"
        torch.testing.assert_close(found[name] - state[name], delta(lora, block, target, 2.0), rtol=0, atol=1e-6)
        found[name] = state[name]
    assert_same(found, state)


def negated(layers):
    return {name: replace(layer, up=-layer.up) for name, layer in layers.items()}


def test_a_lora_is_verified_too(tmp_path, monkeypatch):
    run = write_sat(tmp_path / "run", spelled(factors(4), "sat"))
    proof = "verified: 8 layers of the LoRA; what they add to the weights differs by 0.0e+00"
    assert proof in convert(ConvertOptions(str(run), str(tmp_path / "lora"), lora_alpha=2.0, verify=True)).splitlines()
    assert proof in convert(ConvertOptions(str(tmp_path / "lora"), str(tmp_path / "sat"), to="sat", verify=True)).splitlines()
    monkeypatch.setattr(loras, "to_peft", lambda lora: to_peft(replace(lora, layers=negated(lora.layers))))
    with pytest.raises(OSError, match="what the LoRA adds to the weights differs by"):
        converted(run, tmp_path / "wrong", lora_alpha=2.0, verify=True)


def test_a_model_with_a_lora_has_no_single_place_in_sat(tmp_path):
    state = {**tiny_transformer("1.5-5b").state_dict(), **spelled(factors(4), "bare")}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="choose with --only transformer, --only lora or --merge-lora"):
        converted(tmp_path / "model.pt", tmp_path / "sat", to="sat")
    merged = converted(tmp_path / "model.pt", tmp_path / "sat", to="sat", merge_lora=True, lora_alpha=4.0)
    assert (merged / "latest").exists()
