"""`from_single_file` of the models and the pipelines: files of both layouts, through diffusers' machinery."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import diffusers_cogvideox as ours
from diffusers_cogvideox import AutoencoderKLCogVideoX, CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXTransformer3DModel
from parity import TINY_VAE, StockVAE, randomize
from sat_cases import sat_transformer, sat_vae, tiny_transformer, tiny_vae
from tiny_pipeline import call


def same(found, made):
    return all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in found.state_dict().items())


@pytest.fixture
def everything(tmp_path):
    """A training checkpoint of the original code, with transformer and VAE."""
    vae = {f"first_stage_model.{name}": tensor for name, tensor in sat_vae(tiny_vae()).items()}
    torch.save({"module": sat_transformer(tiny_transformer("5b")) | vae}, tmp_path / "all.pt")
    return tmp_path / "all.pt"


@pytest.mark.parametrize("variant", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_transformer_of_the_original_code(tmp_path, variant):
    torch.save({"module": sat_transformer(tiny_transformer(variant))}, tmp_path / "model.pt")
    model = CogVideoXTransformer3DModel.from_single_file(str(tmp_path / "model.pt"))
    assert type(model) is CogVideoXTransformer3DModel
    assert not model.training
    assert same(model, tiny_transformer(variant))
    half = CogVideoXTransformer3DModel.from_single_file(tmp_path / "model.pt", dtype=torch.bfloat16)
    assert same(half, tiny_transformer(variant).bfloat16())


def test_vae_and_its_scale(everything):
    vae = AutoencoderKLCogVideoX.from_single_file(everything)
    assert same(vae, tiny_vae())
    assert vae.config.scaling_factor == 0.7  # of the transformer in the same file
    tensors = sat_vae(tiny_vae())
    assert AutoencoderKLCogVideoX.from_single_file(tensors, config="2b").config.scaling_factor == 1.15258426


def test_files_and_tensors_of_diffusers(tmp_path):
    model = tiny_transformer("5b")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    model.save_config(tmp_path / "config")
    for source in (tmp_path / "model.safetensors", model.state_dict()):
        for config in ("5b", str(tmp_path / "config")):
            assert same(CogVideoXTransformer3DModel.from_single_file(source, config=config), model)
    with pytest.raises(ValueError, match="rotary"):
        CogVideoXTransformer3DModel.from_single_file(model.state_dict())
    with pytest.raises(ValueError, match=r"the state dict holds no vae but only: transformer"):
        AutoencoderKLCogVideoX.from_single_file(model.state_dict())


def test_pipeline_around_a_file(tmp_path, folders):
    """What the file lacks comes from a pipeline folder; it makes a video."""
    everything, made = tmp_path / "all.pt", randomize(StockVAE(**TINY_VAE), seed=1).eval()
    vae = {f"first_stage_model.{name}": tensor for name, tensor in sat_vae(made).items()}
    torch.save({"module": sat_transformer(tiny_transformer("5b")) | vae}, everything)
    pipe = CogVideoXPipeline.from_single_file(everything, config=str(folders("5b")))
    assert same(pipe.transformer, tiny_transformer("5b"))
    assert same(pipe.vae, made)
    assert call(pipe).isfinite().all()


def test_parts_that_are_passed_are_kept(tmp_path, folders):
    everything = tmp_path / "model.pt"
    torch.save({"module": sat_transformer(tiny_transformer("5b"))}, everything)
    vae = AutoencoderKLCogVideoX.from_pretrained(folders("5b"), subfolder="vae")
    pipe = CogVideoXImageToVideoPipeline.from_single_file(everything, config=str(folders("5b")), vae=vae, dtype=torch.float16)
    assert pipe.vae is vae
    assert pipe.transformer.dtype == pipe.text_encoder.dtype == torch.float16
    with pytest.raises(ValueError, match="no released architecture, so the rest of its pipeline must be named"):
        CogVideoXPipeline.from_single_file(everything)


def test_diffusers_own_table_leads_here(everything):
    """diffusers' loader of components in single files, with its registry."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES, _get_single_file_loadable_mapping_class

    for cls in (AutoencoderKLCogVideoX, CogVideoXTransformer3DModel):
        entry = SINGLE_FILE_LOADABLE_CLASSES[_get_single_file_loadable_mapping_class(cls)]
        made = tiny_vae() if cls is AutoencoderKLCogVideoX else tiny_transformer("5b")
        names = sat_vae(made) if cls is AutoencoderKLCogVideoX else sat_transformer(made)
        found = entry["checkpoint_mapping_fn"](checkpoint=names, config={**json.loads(made.to_json_string()), "_class_name": cls.__name__})
        assert found.keys() == made.state_dict().keys()
        assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in found.items())


def test_while_registered(tmp_path):
    import diffusers

    torch.save({"module": sat_transformer(tiny_transformer("5b"))}, tmp_path / "model.pt")
    with ours.registered():
        assert same(diffusers.CogVideoXTransformer3DModel.from_single_file(tmp_path / "model.pt"), tiny_transformer("5b"))


def test_addresses_on_the_hub(monkeypatch, everything):
    from diffusers_cogvideox.conversion import single_file

    asked = []
    monkeypatch.setattr(single_file, "hf_hub_download", lambda *where: asked.append(where) or str(everything))
    CogVideoXTransformer3DModel.from_single_file("https://huggingface.co/somebody/model/blob/main/all.pt")
    assert asked == [("somebody/model", "all.pt")]


def test_gguf(tmp_path):
    """Of a file with exact and with quantised tensors."""
    gguf = pytest.importorskip("gguf")
    from diffusers import GGUFQuantizationConfig

    from sat_cases import converted

    model = tiny_transformer("1.5-5b-i2v")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "cogvideox")
    for name, tensor in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "ff.net" in name and tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy().astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder = converted(tmp_path / "model.gguf", tmp_path / "model")
    found = CogVideoXTransformer3DModel.from_pretrained(folder).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0.02 if "ff.net" in name else 0)
    quantised = CogVideoXTransformer3DModel.from_single_file(
        tmp_path / "model.gguf", quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32)
    )
    assert quantised.transformer_blocks[0].ff.net[2].weight.dtype == torch.uint8
