"""LoRA files of every layout: what is read from them, what is refused, and the way back."""

import json

import peft
import pytest
import torch

from diffusers_cogvideox import PRESETS
from diffusers_cogvideox.checkpoints.lora import check_fits, read_lora, to_layout, to_peft, with_alpha
from diffusers_cogvideox.checkpoints.lora_layouts import LAYOUTS, find_layout
from lora_cases import SPELLINGS, factors, spelled
from parity import TINY_TRANSFORMERS

FACTORS = factors()
LAYER = "transformer_blocks.1.attn1.to_out.0"
ALL_LAYERS = {f"transformer_blocks.{block}.attn1.{target}" for block, target in FACTORS}


# --- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_layout_gives_the_same_layers(spelling):
    lora = read_lora(spelled(FACTORS, spelling), "file")
    assert lora.layout.name == SPELLINGS[spelling][0]
    assert lora.layers.keys() == ALL_LAYERS
    for (block, target), (down, up) in FACTORS.items():
        layer = lora.layers[f"transformer_blocks.{block}.attn1.{target}"]
        assert layer.down is down
        assert layer.up is up
        assert (layer.rank, layer.shape, layer.alpha) == (4, (64, 64), None)


def test_a_whole_checkpoint_of_sat(reference):
    """The base model, the VAE and the text encoder beside the matrices are left out, whatever their names are."""
    module = torch.load(reference / "sat" / "v10_5b_mp_rank_00_model_states.pt", weights_only=True)["module"]
    linears = ("query_key_value.", "attention.dense.")
    base = {
        name.replace("weight", "original.weight").replace("bias", "original.bias") if any(x in name for x in linears) else name: value
        for name, value in module.items()
    }
    assert sum("original" in name for name in base) == 8
    others = {"first_stage_model.encoder.conv_in.weight": torch.ones(1), "conditioner.embedders.0.weight": torch.ones(1)}
    lora = read_lora(base | others | spelled(FACTORS, "sat"), "file")
    assert lora.layers.keys() == ALL_LAYERS


def test_layers_beside_the_attention():
    names = ("ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear")
    layers = [f"transformer_blocks.1.{name}" for name in names] + ["patch_embed.text_proj", "time_embedding.linear_1", "proj_out"]
    tensors = {}
    for layer in layers:
        flat = f"lora_unet__{layer.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": torch.ones(2, 8), f"{flat}.lora_up.weight": torch.ones(8, 2)}
    assert set(read_lora(tensors, "file").layers) == set(layers)


def test_the_patch_convolution():
    tensors = {
        "transformer.patch_embed.proj.lora_A.weight": torch.ones(2, 4, 2, 2),
        "transformer.patch_embed.proj.lora_B.weight": torch.ones(64, 2, 1, 1),
    }
    assert read_lora(tensors, "file").shapes == {"patch_embed.proj": (64, 4, 2, 2)}


@pytest.mark.parametrize("name", sorted({layout.name for layout in LAYOUTS}))
def test_there_and_back(name):
    """Names and bits survive the way to every layout and back, and so does alpha where the layout has a place for it."""
    lora = with_alpha(read_lora(spelled(FACTORS, "diffusers"), "file"), 3.0)
    there = to_layout(lora, name)
    assert {key: value for key, value in there.items() if not key.endswith(".alpha")} == spelled(FACTORS, {"kohya": "fun"}.get(name, name))
    again = read_lora(there, "file")
    assert again.layout.name == name
    assert {layer.alpha for layer in again.layers.values()} == {3.0 if again.layout.stores_alpha else None}
    back = to_layout(with_alpha(again, None if again.layout.stores_alpha else 3.0), "diffusers")
    assert back == spelled(FACTORS, "diffusers")  # equal dictionaries of the very same tensors


@pytest.mark.parametrize("blocks", [1, 30, 42])
def test_any_number_of_blocks_from_sat_and_back(blocks):
    source = spelled(factors(rank=2, width=6, blocks=blocks), "sat")
    lora = with_alpha(read_lora(source, "file"), 1.0)
    assert len(lora.layers) == 4 * blocks
    assert to_layout(lora, "sat") == source


# --- alpha --------------------------------------------------------------------------------------------------------------


def alphas(lora):
    return {layer.alpha for layer in lora.layers.values()}


@pytest.mark.parametrize("spelling", ["diffusers", "comfyui", "fun", "bare"])
def test_alpha_among_the_tensors(spelling):
    assert alphas(read_lora(spelled(FACTORS, spelling, alpha=2.0), "file")) == {2.0}


@pytest.mark.parametrize(
    "header",
    [
        {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})},
        {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 2})},
        {"lora_config": json.dumps({"r": 4, "lora_alpha": 2, "init_lora_weights": True})},
        {"ss_network_alpha": "2.0", "ss_network_dim": "4"},
    ],
)
def test_alpha_in_the_header(header):
    assert alphas(read_lora(spelled(FACTORS, "diffusers"), "file", header)) == {2.0}


def test_alpha_in_a_file_of_its_own():
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"], lora_dropout=0.1).to_dict()
    assert alphas(read_lora(spelled(FACTORS, "peft"), "file", config=config)) == {2.0}


def test_a_header_without_alpha():
    assert alphas(read_lora(spelled(FACTORS, "fun"), "file", {"ss_network_alpha": "None", "format": "pt"})) == {None}


def test_alpha_by_layer_and_by_root_of_the_rank():
    """PEFT's own layer is the oracle: its scaling is our alpha / rank."""
    config = peft.LoraConfig(r=4, lora_alpha=2, alpha_pattern={"to_k": 6}, use_rslora=True, target_modules=["to_q", "to_k"])
    model = peft.inject_adapter_in_model(config, torch.nn.ModuleDict({"to_q": torch.nn.Linear(64, 64), "to_k": torch.nn.Linear(64, 64)}))
    lora = read_lora(spelled(FACTORS, "bare"), "file", config=config.to_dict())
    for name in ("to_q", "to_k"):
        layer = lora.layers[f"transformer_blocks.0.attn1.{name}"]
        assert layer.alpha / layer.rank == pytest.approx(model[name].scaling["default"])


def test_two_alphas_that_contradict_each_other():
    header = {"lora_config": json.dumps({"lora_alpha": 4})}
    with pytest.raises(ValueError, match=r"has alpha 2 among the tensors, but 4 in the metadata"):
        read_lora(spelled(FACTORS, "diffusers", alpha=2.0), "file", header)


@pytest.mark.parametrize(("spelling", "assumed"), [("diffusers", 4.0), ("fun", 4.0), ("bare", 4.0), ("sat", 1.0)])
def test_an_assumed_alpha_is_announced(spelling, assumed, caplog):
    lora = with_alpha(read_lora(spelled(FACTORS, spelling), "my.safetensors"))
    assert alphas(lora) == {assumed}
    (message,) = caplog.messages
    assert message.startswith("my.safetensors does not say its alpha (rank 4). Assumed is alpha = ")
    assert "lora_alpha=..." in message
    assert "rank 128, alpha 64" in message


def test_a_given_alpha_needs_no_warning(caplog):
    assert alphas(with_alpha(read_lora(spelled(FACTORS, "sat"), "file"), 64)) == {64}
    assert alphas(with_alpha(read_lora(spelled(FACTORS, "fun", alpha=2.0), "file"), 2)) == {2.0}
    assert not caplog.messages


def test_an_alpha_that_is_given_against_the_file():
    lora = read_lora(spelled(FACTORS, "fun", alpha=2.0), "file")
    with pytest.raises(ValueError, match=r"lora_alpha=3 contradicts file, which says 2: leave it out"):
        with_alpha(lora, 3)
    with pytest.raises(ValueError, match=r"lora_alpha=0 is not possible"):
        with_alpha(lora, 0)


def test_ranks_and_alphas_by_layer_become_patterns():
    """PEFT, given the config, makes every layer with its own rank and strength."""
    mixed = {layer: factors(rank=2 if layer[1] == "to_v" else 4)[layer] for layer in FACTORS}
    tensors = spelled(mixed, "fun", alpha=2.0)
    tensors["lora_unet__transformer_blocks_1_attn1_to_k.alpha"] = torch.tensor(8.0)
    _, config = to_peft(read_lora(tensors, "file"))
    blocks = torch.nn.ModuleList(
        torch.nn.ModuleDict({"attn1": torch.nn.ModuleDict({n: torch.nn.Linear(64, 64) for n in ("to_q", "to_k", "to_v")})})
        for _ in range(2)
    )
    config["target_modules"] = [name for name in config["target_modules"] if "to_out" not in name]
    model = peft.inject_adapter_in_model(peft.LoraConfig(**config), torch.nn.ModuleDict({"transformer_blocks": blocks}))
    found = {name: (m.r["default"], m.scaling["default"]) for name, m in model.named_modules() if hasattr(m, "scaling")}
    for block in range(2):
        assert found[f"transformer_blocks.{block}.attn1.to_q"] == (4, 0.5)
        assert found[f"transformer_blocks.{block}.attn1.to_k"] == (4, (0.5, 2.0)[block])
        assert found[f"transformer_blocks.{block}.attn1.to_v"] == (2, 1.0)


# --- DoRA ---------------------------------------------------------------------------------------------------------------


def with_magnitudes(spelling, suffix, shape):
    """The LoRA with magnitudes of a shape beside every pair."""
    name = SPELLINGS[spelling][1]
    return spelled(FACTORS, spelling) | {name(*layer, "A").partition(".lora")[0] + suffix: torch.ones(shape) for layer in FACTORS}


@pytest.mark.parametrize(
    ("spelling", "suffix", "shape"),
    [("diffusers", ".lora_magnitude_vector", (64,)), ("fun", ".dora_scale", (64, 1)), ("comfyui", ".dora_scale", (64, 1))],
)
def test_magnitudes_of_dora_are_kept(spelling, suffix, shape):
    tensors, config = to_peft(with_alpha(read_lora(with_magnitudes(spelling, suffix, shape), "file"), 4))
    assert config["use_dora"]
    assert tensors[f"{LAYER}.lora_magnitude_vector"].shape == (64,)


@pytest.mark.parametrize("shape", [(1, 64), (32,)])
def test_magnitudes_that_peft_has_no_place_for(shape):
    with pytest.raises(ValueError, match=r"magnitudes of shape .* only one for each of its 64 rows"):
        read_lora(with_magnitudes("fun", ".dora_scale", shape), "file")


def test_a_dora_that_lacks_magnitudes():
    tensors = with_magnitudes("diffusers", ".lora_magnitude_vector", (64,))
    del tensors[f"transformer.{LAYER}.lora_magnitude_vector"]
    with pytest.raises(ValueError, match=rf"it is a DoRA, but lacks the magnitudes of {LAYER}"):
        read_lora(tensors, "file")
    with pytest.raises(ValueError, match="it is a DoRA, but lacks the magnitudes of"):
        read_lora(spelled(FACTORS, "diffusers"), "file", {"lora_config": '{"lora_alpha": 4, "use_dora": true}'})


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "transformer.transformer_blocks.0.attn1.to_q.diff_b",
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.bias",
    ],
)
def test_names_that_are_not_known_are_listed(name):
    with pytest.raises(ValueError, match=rf"file cannot be used as a LoRA \(layout diffusers\): no rule knows {name}\."):
        read_lora(spelled(FACTORS, "diffusers") | {name: torch.ones(4, 64)}, "file")


def test_a_lora_of_another_family_of_models():
    other = {f"diffusion_model.blocks.0.self_attn.q.lora_{letter}.weight": torch.ones(4, 4) for letter in "AB"}
    with pytest.raises(ValueError, match=r"no rule knows diffusion_model\.blocks\.0\.self_attn\.q"):
        read_lora(other, "file")


def test_matrices_of_sat_in_the_wrong_place():
    with pytest.raises(ValueError, match=r"no rule knows .*query_key_value\.matrix_A\.3"):
        read_lora(spelled(FACTORS, "sat, bare") | {"transformer.layers.0.attention.query_key_value.matrix_A.3": torch.ones(4)}, "file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_B.weight": None}, "lacks lora_B.weight"),
        ({"lora_B.weight": torch.ones(64, 3)}, r"A \(4, 64\) and B \(64, 3\), which share no rank"),
        ({"lora_A.weight": torch.ones(64)}, "which share no rank"),
        ({"lora_A.weight": torch.ones(0, 64), "lora_B.weight": torch.ones(64, 0)}, "which share no rank"),
        ({"alpha": torch.ones(2)}, r"alpha of shape \(2,\), not one number"),
    ],
)
def test_half_and_misshapen_layers(change, message):
    tensors = spelled(FACTORS, "diffusers") | {f"transformer.{LAYER}.{role}": tensor for role, tensor in change.items()}
    with pytest.raises(ValueError, match=rf"{LAYER} .*{message}"):
        read_lora({name: tensor for name, tensor in tensors.items() if tensor is not None}, "file")


@pytest.mark.parametrize(
    ("tensors", "message"), [({}, "file is empty"), ({"proj_out.weight": torch.ones(2, 2)}, "holds no LoRA: none of its 1")]
)
def test_files_without_a_lora(tensors, message):
    assert find_layout(tensors) is None
    with pytest.raises(ValueError, match=message):
        read_lora(tensors, "file")


@pytest.mark.parametrize("options", [{"init_lora_weights": "pissa"}, {"use_qalora": True}, {"fan_in_fan_out": True}])
def test_options_that_would_be_ignored(options):
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], **options).to_dict()
    with pytest.raises(ValueError, match=rf"ask for what is not supported: {next(iter(options))}="):
        read_lora(spelled(FACTORS, "diffusers"), "file", config=config)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_a_header_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="the metadata about the LoRA cannot be read"):
        read_lora(spelled(FACTORS, "diffusers"), "file", {"lora_adapter_metadata": text})


# --- fitting, and what a layout cannot express --------------------------------------------------------------------------


def test_a_lora_of_2b_on_5b():
    lora = read_lora(spelled(factors(rank=1, width=1920, blocks=30), "diffusers"), "my.safetensors")
    check_fits(lora, PRESETS["2b"].transformer)
    with pytest.raises(
        ValueError,
        match=r"my.safetensors does not fit this transformer \(5b\) in 120 of 120 layers: .*LoRA \(1920, 1920\), model \(3072, 3072\).*"
        r"and 116 more\. It is a LoRA for 2b, fun-2b-inp, fun-2b-control\.",
    ):
        check_fits(lora, PRESETS["5b"].transformer)


def test_more_blocks_than_the_model_has():
    lora = read_lora(spelled(factors(blocks=3), "diffusers"), "file")
    with pytest.raises(ValueError, match=r"in 4 of 12 layers: .*blocks\.2\..*model has none.*for none of the released models"):
        check_fits(lora, TINY_TRANSFORMERS["5b"] | {"patch_size": 2})


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("sat", spelled({**FACTORS, (0, "to_q"): factors(rank=2)[0, "to_q"]}, "diffusers"), "several ranks or alphas"),
        ("sat", spelled({layer: pair for layer, pair in FACTORS.items() if layer[1] != "to_k"}, "diffusers"), r"does not adapt .*to_k"),
        ("sat", with_magnitudes("diffusers", ".lora_magnitude_vector", (64,)), "cannot be written in the layout sat: no rule knows"),
        ("lycoris", spelled(FACTORS, "diffusers"), "there is no layout 'lycoris': known are bare, comfyui"),
    ],
)
def test_what_a_layout_cannot_express(name, tensors, message):
    with pytest.raises(ValueError, match=message):
        to_layout(with_alpha(read_lora(tensors, "file"), 4), name)


def test_strength_must_be_known_before_writing():
    with pytest.raises(ValueError, match="does not say the alpha of"):
        to_layout(read_lora(spelled(FACTORS, "sat"), "file"), "diffusers")
