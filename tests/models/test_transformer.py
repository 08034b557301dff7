"""The transformer computes what stock computes, forwards and backwards, and what the original code recorded; bad inputs are named."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cogvideox.checkpoints.sat import MODEL_PREFIX, transformer_rules
from diffusers_cogvideox.models.rope import rope_for
from diffusers_cogvideox.models.transformer import CogVideoXTransformer3DModel, initialize_for_training
from diffusers_cogvideox.presets import PRESETS
from parity import TINY_TRANSFORMERS, StockTransformer, randomize
from transformer_cases import VARIANTS, inputs, tiny_twins

TOLERANCE = {"rtol": 0, "atol": 2e-5}  # at outputs of standard deviation 1

# Parameters and state-dict entries of the released models, as published.
RELEASED = {
    "2b": (1_693_783_872, 736),
    "5b": (5_570_283_072, 1024),
    "5b-i2v": (5_570_479_680, 1025),
    "1.5-5b": (5_570_676_352, 1024),
    "1.5-5b-i2v": (5_571_594_880, 1028),
    "fun-2b-inp": (1_693_914_432, 736),
    "fun-5b-inp": (5_570_491_968, 1024),
}


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


# --- parity with stock ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient_equal_stocks(variant):
    ours, stock = tiny_twins(variant)
    kwargs = inputs(stock)
    results = []
    for model in (ours, stock):
        leaves = {name: kwargs[name].clone().requires_grad_() for name in ("hidden_states", "encoder_hidden_states")}
        sample = model(**kwargs | leaves)[0]
        probe = torch.randn(sample.shape, generator=torch.Generator().manual_seed(1))
        (sample * probe).sum().div(sample.numel() ** 0.5).backward()
        results.append((sample, dict(model.named_parameters()) | leaves))
    (sample, mine), (expected, theirs) = results
    assert 0.5 < expected.std() < 2
    torch.testing.assert_close(sample, expected, **TOLERANCE)
    assert mine.keys() == theirs.keys()
    for name, parameter in theirs.items():
        torch.testing.assert_close(mine[name].grad, parameter.grad, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("size", [(12, 8), (4, 4), (6, 20)])
@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b"])
def test_other_sizes_equal_stocks(variant, size):
    ours, stock = tiny_twins(variant)
    kwargs = inputs(stock, None, *size)
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), **TOLERANCE)


@pytest.mark.parametrize(("variant", "frames"), [("2b", 1), ("2b", 4), ("5b", 1), ("5b", 5), ("1.5-5b", 2), ("fun-inp", 1)])
def test_other_lengths_equal_stocks(variant, frames):
    ours, stock = tiny_twins(variant)
    kwargs = inputs(stock, frames, batch=1)
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), **TOLERANCE)


@pytest.mark.parametrize(
    "changes", [{"patch_bias": False}, {"attention_bias": False}, {"norm_elementwise_affine": False}, {"patch_size": 4}]
)
def test_other_configs_equal_stocks(changes):
    ours, stock = tiny_twins("5b", **changes)
    kwargs = inputs(stock)
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), **TOLERANCE)


@pytest.mark.parametrize("variant", ["5b", "5b-i2v"])
def test_without_rotary_tables_nothing_is_rotated_as_in_stock(variant):
    ours, stock = tiny_twins(variant)
    kwargs = inputs(stock) | {"image_rotary_emb": None}
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), **TOLERANCE)


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b-i2v"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_error_is_not_above_stocks(variant, autocast):
    ours, stock = tiny_twins(variant)
    errors = {}
    kwargs = [inputs(stock) for _ in range(4)]
    exact = [forward(stock, k) for k in kwargs]
    for model in (ours, stock):
        if not autocast:
            model.to(torch.bfloat16)
            kwargs = [k | {n: k[n].bfloat16() for n in ("hidden_states", "encoder_hidden_states")} for k in kwargs]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            differences = [forward(model, k).float() - e for k, e in zip(kwargs, exact, strict=True)]
        errors[model] = torch.cat([d.flatten() for d in differences]).std()
    # Ours rounds once less per modulation and gate (0.95 to 0.98 of stock's error); other CPUs' kernels may scatter a little.
    assert errors[ours] <= 1.02 * errors[stock]


# --- the original code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "variant"), [("v10_2b", "2b"), ("v10_5b", "5b"), ("v10_5b_i2v", "5b-i2v"), ("v15_5b", "1.5-5b")])
def test_recorded_outputs_of_the_original_code(name, variant, reference):
    checkpoint = torch.load(reference / "sat" / f"{name}_mp_rank_00_model_states.pt", weights_only=True)["module"]
    named = {key.removeprefix(MODEL_PREFIX): value for key, value in checkpoint.items()}
    state = {key: value.float() for key, value in transformer_rules(variant == "5b-i2v").forward(named).items()}
    model = CogVideoXTransformer3DModel(**TINY_TRANSFORMERS[variant]).eval()
    model.load_state_dict(state)
    io = load_file(reference / "sat" / f"{name}_io.safetensors")
    latents = torch.cat([io["x"], io["image_latents"]], dim=2) if "image_latents" in io else io["x"]
    rotary = rope_for(model.config, latents.shape[1], *latents.shape[-2:])
    sample = forward(model, {"hidden_states": latents, "encoder_hidden_states": io["context"], "timestep": io["timesteps"],
                             "image_rotary_emb": rotary, "return_dict": False})  # fmt: skip
    torch.testing.assert_close(sample, io["output"], **TOLERANCE)


# --- where stock fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [1, 5, 12])
def test_sincos_model_takes_any_number_of_text_tokens(text):
    ours, _ = tiny_twins("2b")
    _, wide = tiny_twins("2b", max_text_seq_length=text)
    wide.load_state_dict(ours.state_dict())
    kwargs = inputs(wide, text=text)
    torch.testing.assert_close(forward(ours, kwargs), forward(wide, kwargs), **TOLERANCE)


def test_learned_table_serves_fewer_frames():
    ours, _ = tiny_twins("5b-i2v")
    _, short = tiny_twins("5b-i2v", sample_frames=5)
    state = ours.state_dict()
    state["patch_embed.pos_embedding"] = torch.randn(1, 7 + 72, 64)
    ours.load_state_dict(state)
    short.load_state_dict(state | {"patch_embed.pos_embedding": state["patch_embed.pos_embedding"][:, : 7 + 48]})
    kwargs = inputs(short, frames=2)
    torch.testing.assert_close(forward(ours, kwargs), forward(short, kwargs), **TOLERANCE)


def test_learned_table_serves_other_sizes_and_shorter_text():
    ours, stock = tiny_twins("5b-i2v")
    assert forward(ours, inputs(stock, 3, 12, 8, text=4)).isfinite().all()


def test_fractional_and_plain_number_timesteps():
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    expected = forward(stock, kwargs | {"timestep": torch.tensor([12.5, 12.5])})
    for timestep in (12.5, torch.tensor(12.5), torch.tensor([12.5])):
        torch.testing.assert_close(forward(ours, kwargs | {"timestep": timestep}), expected, **TOLERANCE)


def test_attention_mask_hides_tokens():
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours)
    mask = torch.ones(2, 1, 7 + 72, dtype=torch.bool)
    mask[:, :, 5:7] = False  # two padding tokens at the end of the text
    masked = forward(ours, kwargs | {"attention_kwargs": {"attention_mask": mask}})
    short = forward(ours, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"][:, :5]})
    torch.testing.assert_close(masked, short, **TOLERANCE)


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_released_configs_have_stocks_tensors(name):
    with torch.device("meta"):
        ours, stock = (cls(**PRESETS[name].transformer) for cls in (CogVideoXTransformer3DModel, StockTransformer))
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    assert list(shapes.items()) == [(k, tuple(v.shape)) for k, v in stock.state_dict().items()]
    if name in RELEASED:
        assert (sum(p.numel() for p in ours.parameters()), len(shapes)) == RELEASED[name]


def test_learned_table_has_the_released_size():
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(**PRESETS["5b-i2v"].transformer | {"num_layers": 0})
    assert model.patch_embed.pos_embedding.numel() == 54_607_872


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_folders_are_exchangeable_with_stock(variant, tmp_path):
    ours, stock = tiny_twins(variant)
    kwargs = inputs(stock)
    expected = forward(stock, kwargs)
    ours.save_pretrained(tmp_path / "ours")
    stock.save_pretrained(tmp_path / "stock")
    for folder in ("ours", "stock"):
        for cls in (CogVideoXTransformer3DModel, StockTransformer):
            torch.testing.assert_close(forward(cls.from_pretrained(tmp_path / folder), kwargs), expected, **TOLERANCE)
    assert json.loads((tmp_path / "ours/config.json").read_text()) == json.loads((tmp_path / "stock/config.json").read_text())


def test_loads_in_half_precision(tmp_path):
    ours, _ = tiny_twins("5b-i2v")
    ours.save_pretrained(tmp_path)
    model = CogVideoXTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {v.dtype for v in model.state_dict().values()} == {torch.bfloat16}


def test_default_forward_returns_an_output_object():
    ours, _ = tiny_twins("5b")
    kwargs = inputs(ours) | {"return_dict": True}
    with torch.no_grad():
        assert ours(**kwargs).sample.shape == (2, 3, 4, 8, 12)


# --- training ---------------------------------------------------------------------------------------------------------


def test_initialisation_starts_at_zero_with_identity_blocks():
    model = randomize(CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"]))
    initialize_for_training(model)
    kwargs = inputs(model)
    assert (forward(model, kwargs) == 0).all()
    video, text, temb = torch.randn(2, 6, 64), torch.randn(2, 3, 64), torch.randn(2, 32)
    for ours, unchanged in zip(model.transformer_blocks[0](video, text, temb), (video, text), strict=True):
        torch.testing.assert_close(ours, unchanged, rtol=0, atol=0)
    weight = model.patch_embed.proj.weight  # Xavier-uniform on fan-in 4 * 2 * 2 and fan-out 64
    bound = (6 / (16 + 64)) ** 0.5
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_every_parameter_learns_after_two_steps():
    model = CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["1.5-5b-i2v"])
    initialize_for_training(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        kwargs = inputs(model)
        (model(**kwargs)[0] - torch.randn(2, 4, 4, 8, 12)).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.grad.any()] == []


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "change", "message"),
    [
        ("5b", lambda k: {"hidden_states": k["hidden_states"][:, :, :3]}, "3 channels .* in_channels=4"),
        ("5b", lambda k: {"hidden_states": k["hidden_states"][0]}, r"must be \(batch, frames, channels"),
        ("5b", lambda k: {"hidden_states": k["hidden_states"][..., :7]}, "cannot be cut into patches of 1x2x2"),
        ("1.5-5b", lambda k: {"hidden_states": k["hidden_states"][:, :3]}, "cannot be cut into patches of 2x2x2"),
        ("5b", lambda k: {"encoder_hidden_states": k["encoder_hidden_states"][..., :5]}, "text_embed_dim=24.*got shape"),
        ("5b", lambda k: {"encoder_hidden_states": k["encoder_hidden_states"][:1]}, "batch size 2, but encoder_hidden_states has 1"),
        ("5b", lambda k: {"image_rotary_emb": tuple(t[:-1] for t in k["image_rotary_emb"])}, r"72 tokens .* must be \(72, 32\)"),
        ("5b", lambda k: {"hidden_states": k["hidden_states"].bfloat16()}, "hidden_states is torch.bfloat16 .* weights are torch.float32"),
        ("5b", lambda k: {"encoder_hidden_states": k["encoder_hidden_states"].to("meta")}, "encoder_hidden_states is .* on meta"),
        ("5b", lambda _: {"timestep": torch.ones(3)}, "timestep has 3 values for a batch of 2"),
        ("5b", lambda _: {"timestep_cond": torch.ones(1)}, "timestep_cond is not supported"),
        ("5b", lambda _: {"ofs": torch.ones(1)}, "no ofs embedding"),
        ("1.5-5b-i2v", lambda _: {"ofs": None}, "needs ofs.*ofs=2.0"),
        ("5b-i2v", lambda _: {"encoder_hidden_states": torch.randn(2, 8, 24)}, "8 text tokens are more than the 7"),
    ],
)  # fmt: skip
def test_unfitting_inputs_are_named(variant, change, message):
    ours, _ = tiny_twins(variant)
    kwargs = inputs(ours)
    with pytest.raises(ValueError, match=message):
        ours(**kwargs | change(kwargs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_learned_positional_embeddings": True}, "needs use_rotary_positional_embeddings=True"),
        ({"ofs_embed_dim": 16}, "ofs_embed_dim=16 must equal time_embed_dim=32"),
    ],
)
def test_impossible_configs_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["2b"] | changes)
