"""True checkpoints of the original code, converted without any hint: their recorded outputs, and their own tensors on the way back."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_cogvideox import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from diffusers_cogvideox.conversion.convert import convert
from diffusers_cogvideox.conversion.options import ConvertOptions
from diffusers_cogvideox.models.rope import rope_for
from parity import StockTransformer, StockVAE
from sat_cases import converted

TRANSFORMERS = {"v10_2b": "2b", "v10_5b": "5b", "v10_5b_i2v": "5b-i2v", "v15_5b": "1.5-5b"}
UNUSED = "model.diffusion_model.transformer.position_embeddings.weight"  # SAT has it, random, and reads it nowhere


@pytest.mark.parametrize("cls", [CogVideoXTransformer3DModel, StockTransformer])
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_transformers_reproduce_the_recorded_outputs(reference, tmp_path, name, cls):
    folder = converted(reference / "sat" / f"{name}_mp_rank_00_model_states.pt", tmp_path / "model")
    model = cls.from_pretrained(folder)
    io = load_file(reference / "sat" / f"{name}_io.safetensors")
    latents = torch.cat([io["x"], io["image_latents"]], dim=2) if "image_latents" in io else io["x"]
    rotary = rope_for(model.config, latents.shape[1], *latents.shape[-2:])
    sample = model(latents, io["context"], io["timesteps"], image_rotary_emb=rotary, return_dict=False)[0]
    torch.testing.assert_close(sample, io["output"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_come_back_bit_by_bit(reference, tmp_path, name):
    file = reference / "sat" / f"{name}_mp_rank_00_model_states.pt"
    folder = converted(file, tmp_path / "model")
    back = converted(folder, tmp_path / "sat") / "1" / "mp_rank_00_model_states.pt"
    true, found = (torch.load(path, weights_only=True)["module"] for path in (file, back))
    listed = json.loads((reference / "sat" / f"{name}_config.json").read_text())["keys"]
    assert list(found) == list(listed)  # all keys, in the order of the original code
    assert {key: list(tensor.shape) for key, tensor in found.items()} == listed
    assert [key for key in true if not torch.equal(true[key], found[key])] in ([], [UNUSED])
    assert UNUSED not in found or not found[UNUSED].any()


@pytest.mark.parametrize("cls", [AutoencoderKLCogVideoX, StockVAE])
@torch.no_grad()
def test_vae_reproduces_the_recorded_outputs(reference, tmp_path, cls):
    """Stored in float16, computed with in float32, as the outputs were recorded."""
    text = convert(ConvertOptions(str(reference / "sat" / "vae_3d-vae.pt"), str(tmp_path / "vae"), dtype="float32"))
    assert "assumed: scaling_factor 0.7, that of 5b" in text
    vae, io = cls.from_pretrained(tmp_path / "vae"), load_file(reference / "sat" / "v10_vae_io.safetensors")
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(vae.encode(io["video"]).latent_dist.parameters, io["moments_full"], **close)
    torch.testing.assert_close(vae.encode(io["video"][:, :, :1]).latent_dist.parameters, io["moments_first_frame"], **close)
    torch.testing.assert_close(vae.decode(io["z"]).sample, io["dec_chunk32"], **close)
    torch.testing.assert_close(vae.decode(io["z"][:, :, :1]).sample, io["dec_one"], **close)


def test_vae_comes_back_bit_by_bit(reference, tmp_path):
    file = reference / "sat" / "vae_3d-vae.pt"
    folder = converted(file, tmp_path / "vae")
    back = torch.load(converted(folder, tmp_path / "sat") / "3d-vae.pt", weights_only=True)["state_dict"]
    true = {key: tensor for key, tensor in torch.load(file, weights_only=True)["state_dict"].items() if not key.startswith("loss.")}
    listed = json.loads((reference / "sat" / "vae_config.json").read_text())["keys"]
    assert list(back) == [key for key in listed if not key.startswith("loss.")]
    assert all(torch.equal(back[key], true[key]) for key in true)


def test_verify_proves_it(reference, tmp_path):
    file = reference / "sat" / "v10_5b_i2v_mp_rank_00_model_states.pt"
    lines = convert(ConvertOptions(str(file), str(tmp_path / "model"), verify=True)).splitlines()
    assert "verified: 53 tensors of the transformer are equal to the bit; outputs (2 of 2 blocks) differ by 0.0e+00" in lines
    again = convert(ConvertOptions(str(tmp_path / "model"), str(tmp_path / "sat"), verify=True)).splitlines()
    hashes = {line.split()[1]: line.split()[0] for line in lines if "." in line and len(line.split()) == 2}
    back = convert(ConvertOptions(str(tmp_path / "sat"), str(tmp_path / "third"), verify=True)).splitlines()
    assert hashes == {line.split()[1]: line.split()[0] for line in back if "." in line and len(line.split()) == 2}  # they survive
    assert len(hashes) == 53
    assert any("verified: 65 tensors" in line for line in again)  # by diffusers' names
