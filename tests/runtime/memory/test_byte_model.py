"""What the closed forms say that a pass takes, against the storages that are alive while it runs on the meta device."""

import importlib.util
import itertools

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from diffusers_cogvideox import PRESETS, CogVideoXTransformer3DModel
from diffusers_cogvideox.models.rope import rope_for
from diffusers_cogvideox.models.transformer_memory import TransformerPass, modulation_table_bytes
from diffusers_cogvideox.runtime.memory.costs import Costs, TransformerMode
from diffusers_cogvideox.runtime.memory.facts import T5_XXL, ModelFacts
from diffusers_cogvideox.runtime.memory.text_encoder import text_encoder_peak
from diffusers_cogvideox.runtime.memory.workload import MACHINES, Workload
from diffusers_cogvideox.runtime.quantisation import QUANTISATIONS, quantisation_config, quantise, quantised_layers
from diffusers_cogvideox.runtime.streamed_parts import named_tensors
from live_storages import LiveStorages, fused_attention, live_peak
from parity import TINY_TRANSFORMERS, StockTransformer

SIZES = [(2, 16, 24, 7), (4, 20, 32, 64)]  # latent frames, height, width; tokens of text


def small(variant):
    """A config with tables of the sizes that are asked for, and heads enough for the statistics to count."""
    config = PRESETS["5b"].transformer | {"use_learned_positional_embeddings": False} | TINY_TRANSFORMERS[variant]
    return config | {"num_attention_heads": 4, "num_layers": 2, "use_rotary_positional_embeddings": variant != "2b"}


def measured(config, sizes, batch, dtype, fused=True, cls=CogVideoXTransformer3DModel, **saving):
    frames, height, width, text = sizes
    with torch.device("meta"):
        model = torch.nn.Module.to(cls(**config), dtype).eval()
    if saving:
        model.split_batch(saving.get("split_batch", False))
        model.chunk_feed_forward(saving.get("ff_tokens"))
        model.keep_residual_in_float32(saving.get("float32_residual", False))
    latents = torch.empty(batch, frames, config["in_channels"], height, width, dtype=dtype, device="meta")
    embeds = torch.empty(batch, text, config["text_embed_dim"], dtype=dtype, device="meta")
    rotary = rope_for(config, frames, height, width, "meta") or ()
    ofs = torch.empty(1, device="meta") if config.get("ofs_embed_dim") else None
    timestep = torch.empty(batch, device="meta")

    def call(latents, embeds, timestep, *rotary):
        options = {} if ofs is None else {"ofs": ofs}
        return model(latents, embeds, timestep, image_rotary_emb=rotary or None, return_dict=False, **options)

    inputs = (latents, embeds, timestep, *rotary)
    if not fused:
        return live_peak(call, *inputs, model=model)
    with fused_attention():
        return live_peak(call, *inputs, model=model)


def predicted(config, sizes, batch, dtype, **saving):
    frames, height, width, text = sizes
    shape = {"batch": batch, "frames": frames, "latent_height": height, "latent_width": width, "text": text}
    return TransformerPass(config=config, width=dtype.itemsize, **shape, **saving).peak()


MODES = [{}, {"split_batch": True}, {"ff_tokens": 256}, {"split_batch": True, "ff_tokens": 256}]


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b-i2v"])
def test_a_pass_takes_what_is_predicted(variant, dtype, mode):
    config = small(variant)
    for sizes, batch in itertools.product(SIZES, (1, 3)):
        found = measured(config, sizes, batch, dtype, **mode)
        assert predicted(config, sizes, batch, dtype, **mode) == pytest.approx(found, rel=0.1), (sizes, batch)


def test_attention_that_keeps_its_scores_takes_more():
    found = measured(small("5b"), SIZES[1], 2, torch.float32, fused=False)
    assert predicted(small("5b"), SIZES[1], 2, torch.float32, attention="math") == pytest.approx(found, rel=0.1)
    assert found > 3 * predicted(small("5b"), SIZES[1], 2, torch.float32)


def test_tokens_in_float32_between_the_layers():
    found = measured(small("5b"), SIZES[1], 2, torch.bfloat16, float32_residual=True)
    assert predicted(small("5b"), SIZES[1], 2, torch.bfloat16, float32_residual=True) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("mode", [{}, {"split_batch": True, "ff_tokens": 4096}], ids=str)
def test_the_released_size(mode):
    """CogVideoX-5B, 49 frames of 480x720, both halves of guidance: two blocks take as much as 42."""
    config, sizes = PRESETS["5b"].transformer | {"num_layers": 2}, (13, 60, 90, 226)
    found = measured(config, sizes, 2, torch.bfloat16, **mode)
    assert predicted(config, sizes, 2, torch.bfloat16, **mode) == pytest.approx(found, rel=0.02)
    assert found < 0.9 * measured(config, sizes, 2, torch.bfloat16, cls=StockTransformer)


def in_4_bits(model):
    """Quantise the blocks by bitsandbytes' own layers, as it does on a GPU while loading; the tensors that they keep beside the weights."""
    bitsandbytes, scales = importlib.import_module("bitsandbytes"), []
    config = quantisation_config("nf4", "cuda")
    how = {"compress_statistics": config.bnb_4bit_use_double_quant, "quant_type": config.bnb_4bit_quant_type}
    names = {layer: name for name, layer in model.named_modules()}
    for layer in list(quantised_layers(model)):
        made = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=config.bnb_4bit_compute_dtype, **how)
        made.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, **how)
        made.bias = layer.bias
        made.to("cpu")  # quantises
        scales += [value for value in made.weight.quant_state.as_dict().values() if isinstance(value, torch.Tensor)]
        model.set_submodule(names[layer], made)
    return scales


@pytest.mark.filterwarnings("ignore::UserWarning:torchao", "ignore::DeprecationWarning:torchao")
@pytest.mark.parametrize("name", ["int8", "fp8", "fp8-cast", "nf4"])
def test_quantised_weights_and_what_their_layers_take(name):
    """Storages of the processor: those of the weights and of a pass in all, where the layers at work are unpacked."""
    package = QUANTISATIONS[name].package
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install 'diffusers-cogvideox[quant]'")
    preset, config = PRESETS["5b"], small("5b") | {"num_attention_heads": 8, "num_layers": 3}
    facts = ModelFacts(name="tiny", pipeline=preset.pipeline, transformer=config, vae=preset.vae, quantised=name)
    for frames, height, width, text in ((1, 4, 4, 3), SIZES[0]):
        model = torch.nn.Module.to(CogVideoXTransformer3DModel(**config), torch.bfloat16).eval()
        scales = in_4_bits(model) if name == "nf4" else quantise(model, name, "cpu") and []
        inputs = torch.zeros(1, frames, config["in_channels"], height, width), torch.zeros(1, text, config["text_embed_dim"])
        inputs = [value.bfloat16() for value in inputs]
        rotary = rope_for(config, frames, height, width)
        live = LiveStorages()
        live.count([*scales, *(tensor for _, tensor in named_tensors(model))])
        live.ignore([*inputs, *rotary, *model.parameters()])  # of which some are wrappers around what was counted
        weights = live.now
        with torch.no_grad(), live:
            model(*inputs, 5.0, image_rotary_emb=rotary, return_dict=False)
        work = Workload(height=8 * height, width=8 * width, num_frames=4 * frames - 3, guided=False, text_tokens=text)
        costs = Costs(facts=facts, work=work, dtype="bfloat16", device="cuda", machine=MACHINES["cuda"])
        assert costs.weights("transformer", name) == pytest.approx(weights, rel=0.02)
        assert weights < 0.6 * costs.weights("transformer")
        mode = TransformerMode(name)
        predicted = costs.weights("transformer", name) + costs.transformer_pass(mode).peak()
        if name == "nf4":  # bitsandbytes unpacks within its kernel: whether as a whole, is the device's affair
            assert live.peak <= predicted
        else:
            assert predicted == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "length"), [(1, 226), (4, 226), (1, 32)])
def test_the_text_encoder_takes_what_is_predicted(batch, length, dtype):
    config = T5_XXL | {"num_layers": 2}
    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**config)).to(dtype).eval()
    found = live_peak(model, torch.empty(batch, length, dtype=torch.long, device="meta"), model=model)
    assert text_encoder_peak(config, batch, length, dtype.itemsize) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(
    ("name", "transformer"),
    [("2b", 1_693_783_872), ("5b", 5_570_283_072), ("5b-i2v", 5_570_479_680 + 54_607_872), ("1.5-5b", 5_570_676_352)],
)
def test_parameters_are_those_of_the_releases(name, transformer):
    """Counted on instances of the released models; 5B-I2V with its table of positions."""
    facts = ModelFacts.of_preset(PRESETS[name])
    assert facts.transformer_part.parameters == transformer
    assert facts.text_part.parameters == 4_762_310_656
    assert facts.vae_parameters == 215_583_907


def test_tables_are_those_of_the_schedule():
    """0.794 B parameters of modulation layers give way to 155 MB of tables, for 50 steps of the 5B model."""
    facts = ModelFacts.of_preset(PRESETS["5b"])
    assert facts.transformer_part.modulation == pytest.approx(0.797e9, rel=0.01)
    assert modulation_table_bytes(PRESETS["5b"].transformer, 50, 2) == pytest.approx(155e6, rel=0.03)


def test_in_float16_a_part_of_t5_stays_in_float32():
    part = ModelFacts.of_preset(PRESETS["2b"]).text_part
    assert part.bytes("float16") - part.bytes("bfloat16") == 2 * 24 * 4096 * 10240
