"""What goes wrong with checkpoints: each case ends in an error that says what, and leaves nothing behind."""

import errno
import os
import pickle
import shutil

import pytest
import torch

from diffusers_cogvideox.checkpoints import writing
from diffusers_cogvideox.conversion import plan
from parity import randomize
from sat_cases import converted, sat_transformer, sat_vae, tiny_transformer, tiny_vae, write_release, write_sat

PREFIX = "model.diffusion_model."
FUSED = f"{PREFIX}transformer.layers.0.attention.query_key_value.weight"


@pytest.fixture
def good():
    return sat_transformer(tiny_transformer("5b"))


def refused(tmp_path, source, error, message, **options):
    """The conversion must fail like this, and leave nothing: no output, no temporary files."""
    place = tmp_path / "results"
    place.mkdir(exist_ok=True)
    with pytest.raises(error, match=message):
        converted(source, place / "out", **options)
    assert not list(place.iterdir())


def saved(tmp_path, content, name="model.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


# --- the file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_truncated(tmp_path, good, kept):
    path = saved(tmp_path, good)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    refused(tmp_path, path, OSError, "corrupt or was not copied completely")


def test_web_page_under_the_name_of_weights(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"<!DOCTYPE html><html><body>Not found</body></html>")
    refused(tmp_path, tmp_path / "model.pt", OSError, "no weight file but a web page. Download it again")


def test_a_pickle_of_something_else(tmp_path):
    refused(tmp_path, saved(tmp_path, {"steps": 3}), OSError, "holds something else than tensors by name: 'steps'")
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    refused(tmp_path, tmp_path / "list.pt", OSError, "corrupt")
    refused(tmp_path, saved(tmp_path, {}), ValueError, "is empty: it holds no tensors")


class Code:
    """What a pickle can do to whoever opens it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_malicious_pickle(tmp_path, good):
    """Refused, with the way out; the code runs only where that is asked for."""
    harm = tmp_path / "harm"
    path = saved(tmp_path, {"module": good, "extra": Code(harm)})
    refused(tmp_path, path, OSError, r"without running code that it contains \((posix|nt)\.mkdir\).*--trust-pickle")
    assert not harm.exists()
    converted(path, tmp_path / "trusted", trust_pickle=True)
    assert harm.exists()


def test_archives_that_claim_too_much(tmp_path, good):
    import zipfile

    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(10**6))
    refused(tmp_path, path, OSError, "it is compressed, which PyTorch never does")
    huge = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
    (tmp_path / "huge.safetensors").write_bytes(len(huge).to_bytes(8, "little") + huge)
    refused(tmp_path, tmp_path / "huge.safetensors", OSError, "corrupt or was not copied completely")
    (tmp_path / "header.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    refused(tmp_path, tmp_path / "header.safetensors", OSError, "corrupt or was not copied completely")


def test_gguf_needs_its_package(tmp_path, monkeypatch):
    from diffusers_cogvideox.conversion import gguf

    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    refused(tmp_path, tmp_path / "model.gguf", OSError, "is a GGUF file, for which another package is needed: pip install gguf")


# --- folders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["../outside", "/etc", "1000/../../outside"])
def test_malicious_latest(tmp_path, good, tag):
    run, outside = write_sat(tmp_path / "run", good), tmp_path / "outside"
    outside.mkdir()
    (run / "latest").write_text(tag)
    refused(tmp_path, run, OSError, r"latest names .* which is outside of its folder, so it is refused")


def test_malicious_index(tmp_path):
    folder = tmp_path / "model"
    tiny_transformer("5b").save_pretrained(folder, max_shard_size="100KB")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace('"diffusion_pytorch_model-00001', '"../diffusion_pytorch_model-00001'))
    refused(tmp_path, folder, OSError, r"index\.json names .* which is outside of its folder, so it is refused")


def test_latest_that_names_nothing(tmp_path, good):
    run = write_sat(tmp_path / "run", good)
    (run / "latest").write_text("2000")
    refused(tmp_path, run, FileNotFoundError, "names '2000', but there is no folder")


def test_missing_shard(tmp_path):
    tiny_transformer("5b").save_pretrained(tmp_path / "model", max_shard_size="100KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    shards[1].unlink()
    refused(tmp_path, tmp_path / "model", FileNotFoundError, rf"lacks {shards[1].name} of {len(shards)} weight files")


def test_parts_of_a_tensor_parallel_model(tmp_path, good):
    run = write_sat(tmp_path / "run", good)
    torch.save({"module": good}, run / "1000" / "mp_rank_01_model_states.pt")
    refused(tmp_path, run, ValueError, "saved by a tensor-parallel model in 2 parts")


def test_a_folder_with_nothing_or_too_much(tmp_path, good):
    refused(tmp_path, tmp_path / "nowhere", FileNotFoundError, "no file or folder")
    (tmp_path / "folder").mkdir()
    refused(tmp_path, tmp_path / "folder", FileNotFoundError, "holds no weight file. Known are")
    for name in ("a.pt", "b.pt"):
        saved(tmp_path / "folder", good, name)
    refused(tmp_path, tmp_path / "folder", FileNotFoundError, r"holds 2 weight files \(a\.pt, b\.pt\): name one of them")


# --- the tensors --------------------------------------------------------------------------------------------------------


def test_extra_keys(tmp_path, good):
    path = saved(tmp_path, good | {f"{PREFIX}mixins.surprise.weight": torch.ones(1)})
    refused(tmp_path, path, ValueError, r"cannot be converted as a transformer: no rule knows mixins\.surprise\.weight")
    path = saved(tmp_path, good | {"blocks.0.self_attn.q.weight": torch.ones(1)})
    refused(tmp_path, path, ValueError, r"1 of 56 tensors that belong to no layout of CogVideoX that is known: blocks\.0\.self_attn")


def test_another_model(tmp_path):
    path = saved(tmp_path, {f"double_blocks.{n}.img_attn.qkv.weight": torch.ones(2) for n in range(9)})
    refused(tmp_path, path, ValueError, "9 of 9 tensors .* and 5 more. Known are .* It is the checkpoint of another model")


def test_missing_keys_name_the_closest_release(tmp_path, good):
    del good[f"{PREFIX}transformer.layers.1.mlp.dense_4h_to_h.bias"]
    refused(tmp_path, saved(tmp_path, good), ValueError, r"the closest release is \S+\); missing: transformer_blocks\.1\.ff\.net\.2\.bias")
    del good[f"{PREFIX}mixins.patch_embed.proj.weight"]
    refused(tmp_path, saved(tmp_path, good), ValueError, r"patch_embed\.proj\.weight is missing, without which the architecture")


def test_permuted_queries_keys_and_values(tmp_path, good):
    wrong = good | {FUSED: good[FUSED].T.contiguous()}  # (D, 3 D) in place of (3 D, D)
    refused(tmp_path, saved(tmp_path, wrong), ValueError, r"query_key_value\.weight: shape \(64, 192\) cannot be cut into 3 equal pieces")
    wrong = good | {FUSED: torch.cat([good[FUSED], good[FUSED][:3]])}
    refused(
        tmp_path, saved(tmp_path, wrong), ValueError, r"of a wrong shape: transformer_blocks\.0\.attn1\.to_q\.weight \(65, 64\) in place of"
    )


def test_positions_that_are_not_the_computed_ones(tmp_path, good):
    """They would be lost without a word."""
    wrong = good | {f"{PREFIX}mixins.pos_embed.freqs_cos": 2 * good[f"{PREFIX}mixins.pos_embed.freqs_cos"]}
    refused(tmp_path, saved(tmp_path, wrong), ValueError, "its rotary angles .* are not those that are computed")
    learned = sat_transformer(tiny_transformer("2b"))
    learned[f"{PREFIX}mixins.pos_embed.pos_embedding"] += 0.1
    refused(tmp_path, saved(tmp_path, learned), ValueError, "its sin-cos positions .* are not those that are computed")


def test_mixed_precisions(tmp_path, good):
    path = saved(tmp_path, good | {FUSED: good[FUSED].half()})
    refused(tmp_path, path, ValueError, r"several precisions: float16 \(3 tensors\), float32 \(61 tensors\). Choose one with --dtype")
    converted(path, tmp_path / "chosen", dtype="float16")


def test_an_unknown_variant(tmp_path, folders):
    """5 channels for 4 predicted ones: the transformer can be converted, a pipeline cannot be made."""
    from diffusers_cogvideox import CogVideoXTransformer3DModel
    from parity import TINY_TRANSFORMERS

    release = write_release(tmp_path / "release", "5b")
    model = randomize(CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"] | {"in_channels": 5}))
    (release / "transformer" / "latest").unlink()
    torch.save(model.state_dict(), release / "transformer" / "model.pt")
    options = {"like": "5b", "text_encoder": str(folders("5b"))}
    refused(tmp_path, release, ValueError, "reads 5 channels and predicts 4, which fits no task", **options)
    converted(release, tmp_path / "alone", like="5b", only="transformer")


def test_hints_that_contradict_the_tensors(tmp_path, good):
    path = saved(tmp_path, good)
    refused(tmp_path, path, ValueError, "contradicts its tensors: use_rotary_positional_embeddings False", like="2b")
    refused(tmp_path, path, FileNotFoundError, r"--like nothing names no release \(2b, 5b,", like="nothing")
    tiny_transformer("5b-i2v").save_pretrained(tmp_path / "other")
    refused(tmp_path, path, ValueError, r"contradicts its tensors: in_channels 8 \(tensors: 4\)", like=str(tmp_path / "other"))


def test_options_without_effect(tmp_path, good):
    path = saved(tmp_path, good)
    for options, flag in (
        ({"merge_lora": True}, "merge-lora"),
        ({"lora_alpha": 2.0}, "lora-alpha"),
        ({"text_encoder": "t5"}, "text-encoder"),
    ):
        refused(tmp_path, path, ValueError, f"--{flag} has no effect", **options)


def test_a_vae_without_its_encoder(tmp_path):
    tensors = {name: tensor for name, tensor in sat_vae(tiny_vae()).items() if not name.startswith("encoder.")}
    refused(tmp_path, saved(tmp_path, tensors), ValueError, "cannot be converted as a VAE")


# --- the output ---------------------------------------------------------------------------------------------------------


def test_output_that_exists(tmp_path, good):
    path, out = saved(tmp_path, good), tmp_path / "out"
    converted(path, out)
    (out / "old.safetensors").touch()
    with pytest.raises(FileExistsError, match="exists already: pass --overwrite"):
        converted(path, out)
    converted(path, out, overwrite=True)
    assert not (out / "old.safetensors").exists()
    (out / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds other things than a model \(thesis\.txt\), so it is not replaced"):
        converted(path, out, overwrite=True)
    assert (out / "thesis.txt").exists()


def test_output_within_the_input(tmp_path, good):
    run = write_sat(tmp_path / "run", good)
    for place in (run, run / "out", tmp_path):
        with pytest.raises(ValueError, match="lie within each other"):
            converted(run, place, overwrite=True)
    assert (run / "latest").exists()


def test_full_disk(tmp_path, good, monkeypatch):
    """Before anything is written where the system tells, else in the middle of it."""
    path = saved(tmp_path, good)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(tmp_path, path, OSError, r"needs 0\.1 GB, but .* has only 0\.0 GB free. Choose another disk")
    monkeypatch.undo()
    make, calls = writing._bytes, []

    def full(tensor):
        calls.append(tensor)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return make(tensor)

    monkeypatch.setattr(writing, "_bytes", full)
    refused(tmp_path, path, OSError, "nothing was written to .*No space left on device")


def test_interrupted(tmp_path, good, monkeypatch):
    make = writing._bytes
    path, earlier = saved(tmp_path, good), converted(saved(tmp_path, good, "other.pt"), tmp_path / "results" / "out")
    before = {file.name: file.read_bytes() for file in earlier.iterdir()}

    def stop(tensor):
        if tensor.shape == (4 * 64, 64):
            raise KeyboardInterrupt
        return make(tensor)

    monkeypatch.setattr(writing, "_bytes", stop)
    with pytest.raises(KeyboardInterrupt):
        converted(path, earlier, overwrite=True)
    assert {file.name: file.read_bytes() for file in earlier.iterdir()} == before  # the earlier result is untouched
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["out"]


def test_verification_that_fails_writes_nothing(tmp_path, good, monkeypatch):
    make = writing._bytes

    def flipped(tensor):
        values = bytearray(make(tensor))
        values[0] ^= 1
        return memoryview(values)

    path = saved(tmp_path, good)
    monkeypatch.setattr(writing, "_bytes", flipped)
    refused(tmp_path, path, OSError, "nothing was written to .* verification failed: .* are not what they were", verify=True)


def test_a_learned_table_alone_does_not_tell_its_size(tmp_path):
    path = saved(tmp_path, tiny_transformer("5b-i2v").state_dict())
    refused(tmp_path, path, ValueError, r"position table has 79 rows.*say for which size with --like CONFIG\.json")
    tiny_transformer("5b-i2v").save_pretrained(tmp_path / "config")
    converted(path, tmp_path / "model", like=str(tmp_path / "config"))
