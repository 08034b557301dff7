"""Folders: what we save diffusers loads, what diffusers saves we load, and a broken one is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffusers_cogvideox as ours
from diffusers_cogvideox import CogVideoXPipeline
from parity import StockPipeline, StockTransformer, StockVAE
from tiny_pipeline import call, sentence_model

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "model_index.json"


def test_a_folder_of_diffusers_gives_our_classes(loaded):
    classes = {name: type(component) for name, component in loaded(CogVideoXPipeline).components.items()}
    assert classes["vae"] is ours.AutoencoderKLCogVideoX
    assert classes["transformer"] is ours.CogVideoXTransformer3DModel
    assert classes["scheduler"] is ours.CogVideoXDDIMScheduler


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_x13_what_we_save_diffusers_loads(loaded, folders, tmp_path: Path, sampler: str):
    pipe = loaded(CogVideoXPipeline, "5b", sampler)
    pipe.save_pretrained(tmp_path)
    saved, original = (json.loads((folder / INDEX).read_text()) for folder in (tmp_path, folders("5b", sampler)))
    assert {k: v for k, v in saved.items() if k != "_name_or_path"} == original
    back = StockPipeline.from_pretrained(tmp_path)
    assert type(back.vae) is StockVAE
    assert type(back.transformer) is StockTransformer
    torch.testing.assert_close(call(back, num_inference_steps=4), call(pipe, num_inference_steps=4), atol=1e-3, rtol=0)


def test_a_replaced_component_is_saved_under_diffusers_name(pipe, tmp_path: Path):
    pipe.scheduler = ours.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["scheduler"] == ["diffusers", "CogVideoXDPMScheduler"]
    assert type(CogVideoXPipeline.from_pretrained(tmp_path).scheduler) is ours.CogVideoXDPMScheduler


def test_our_own_scheduler_is_saved_under_our_name(pipe, tmp_path: Path):
    pipe.scheduler = ours.CogVideoXScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text())["scheduler"] == ["diffusers_cogvideox", "CogVideoXScheduler"]
    assert type(CogVideoXPipeline.from_pretrained(tmp_path).scheduler) is ours.CogVideoXScheduler


def test_components_can_be_passed_and_left_out(folders, loaded, caplog):
    stock = loaded(StockPipeline)
    pipe = CogVideoXPipeline.from_pretrained(folders(), transformer=stock.transformer, vae=stock.vae, text_encoder=None, tokenizer=None)
    assert pipe.transformer is stock.transformer
    assert pipe.vae is stock.vae
    assert pipe.text_encoder is None
    assert "Expected types" not in caplog.text


def test_pipelines_turn_into_each_other(pipe, stock):
    assert CogVideoXPipeline.from_pipe(stock).transformer is stock.transformer
    assert CogVideoXPipeline.from_pipe(pipe).transformer is pipe.transformer


def test_text_encoder_alone(folders):
    pipe = CogVideoXPipeline.from_pretrained(folders(), transformer=None, vae=None)
    assert pipe.encode_prompt("a red circle")[0].shape == (1, 226, 24)


def test_the_tokenizer_files_of_the_hub(loaded, folders, tmp_path: Path):
    """The released repositories carry sentencepiece's own file, without tokenizer.json."""
    folder = tmp_path / "hub"
    shutil.copytree(folders(), folder)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(sentence_model())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "model_max_length": 226, "legacy": true}'
    )
    pipe, prompt = CogVideoXPipeline.from_pretrained(folder), "a red circle moves right"
    expected = loaded(CogVideoXPipeline).encode_prompt(prompt)
    torch.testing.assert_close(pipe.encode_prompt(prompt), expected)


def test_variants_and_precision(folders, tmp_path: Path):
    CogVideoXPipeline.from_pretrained(folders(), dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert CogVideoXPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16).dtype == torch.float16


# --- broken folders ---------------------------------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:3000])


def drop_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop("proj_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})


def name_shards(file: Path) -> None:
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    file.with_name(file.name + ".index.json").write_text(json.dumps(shards))


@pytest.mark.parametrize(
    ("damage", "where", "error", "message"),
    [
        (Path.unlink, INDEX, FileNotFoundError, "holds no model_index.json"),
        (
            Path.unlink,
            f"transformer/{WEIGHTS}",
            FileNotFoundError,
            r"transformer holds a config.json but no weight file",
        ),
        (Path.unlink, "text_encoder/model.safetensors", FileNotFoundError, "text_encoder holds a config.json but no weight file"),
        (cut, f"vae/{WEIGHTS}", OSError, rf"vae/{WEIGHTS} is corrupt or was not copied completely.*Copy or download it again"),
        (cut, "text_encoder/model.safetensors", OSError, "model.safetensors is corrupt"),
        (drop_tensor, f"transformer/{WEIGHTS}", OSError, "lack 1 of the model's tensors, among them 'proj_out.weight'"),
        (name_shards, f"transformer/{WEIGHTS}", FileNotFoundError, "lacks model-00001-of-00002.safetensors, model-00002"),
        (shutil.rmtree, "tokenizer", FileNotFoundError, "tokenizer is missing, although model_index.json names it"),
        (lambda file: file.write_text("{"), "vae/config.json", OSError, "vae/config.json is not valid JSON"),
        (lambda file: file.write_text("{"), INDEX, OSError, "model_index.json is not valid JSON"),
        (lambda file: file.write_text("[]"), INDEX, OSError, "model_index.json holds a list, not a JSON object"),
    ],
)
def test_broken_folders(folders, tmp_path: Path, damage, where: str, error: type[Exception], message: str):
    folder = tmp_path / "broken"
    shutil.copytree(folders(), folder)
    damage(folder / where)
    with pytest.raises(error, match=message):
        CogVideoXPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["no-such-folder", "./no-such-folder", "/no/such/folder", "a/b/c"])
def test_unknown_folders(name: str):
    with pytest.raises(FileNotFoundError, match=rf"There is no folder '{name}'.*owner/name"):
        CogVideoXPipeline.from_pretrained(name)
