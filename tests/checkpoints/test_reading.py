"""Weight files of all sorts, whole and broken, honest and not."""

import pickle
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusers_cogvideox.checkpoints.reading import read_tensors

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}


def same(found):
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_safetensors_under_any_name(tmp_path, name):
    save_file(TENSORS, tmp_path / name, metadata={"format": "pt", "more": "yes"})
    found, header = read_tensors(tmp_path / name)
    assert same(found)
    assert header == {"format": "pt", "more": "yes"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrappers", [(), ("module",), ("state_dict",), ("model", "module")])
def test_pickles_and_their_wrappers(tmp_path, zipped, wrappers):
    content = dict(TENSORS)
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "iteration": 1000}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert same(read_tensors(tmp_path / "a.pt")[0])


def test_a_training_checkpoint_with_the_states_of_random_generators(tmp_path):
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }
    torch.save({"module": TENSORS, "iteration": 1000, **states}, tmp_path / "mp_rank_00_model_states.pt")
    assert same(read_tensors(tmp_path / "mp_rank_00_model_states.pt")[0])


class Code:
    """What pickle calls when it opens such an object."""

    def __reduce__(self):
        return (pytest.fail, ("foreign code was run",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_needs_code_is_refused(tmp_path, zipped):
    torch.save({"module": {"a": Code()}}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(OSError, match=r"a\.pt cannot be opened without running code .* \(_pytest\.outcomes\.\w+\), so") as refused:
        read_tensors(tmp_path / "a.pt")
    assert "weights_only" not in str(refused.value)  # PyTorch's own message tells how to run it


def test_a_picture_is_no_weight_file(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    with pytest.raises(OSError, match=r"a\.png is no weight file, or is corrupt, so it is refused"):
        read_tensors(tmp_path / "a.png")


def test_a_whole_module_is_refused(tmp_path):
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "a.pt")
    with pytest.raises(OSError, match=r"\(torch\.nn\.modules\.linear\.Linear\), so it is refused"):
        read_tensors(tmp_path / "a.pt")


def test_pickles_can_be_forbidden(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    with pytest.raises(OSError, match=r"not a safetensors file, and use_safetensors=True"):
        read_tensors(tmp_path / "a.pt", allow_pickle=False)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "pickle"])
@pytest.mark.parametrize("kept", [0.5, 0.95])
def test_a_file_that_is_cut_off(tmp_path, kind, kept):
    path = tmp_path / "a.pt"
    large = {"a": torch.randn(64, 64)}
    save_file(large, path) if kind == "safetensors" else torch.save(large, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(OSError, match=r"corrupt or was not copied completely|refused"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html><html>Not found</html>", "but a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b'{"error": "not found"}', "but a JSON file"),
        (b"", "corrupt or was not copied completely"),
        (b"no weights at all", "corrupt"),
        (pickle.dumps([1, 2]), "corrupt"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(OSError, match=message):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds a Tensor, not tensors by name"),
        ({"a": torch.ones(2), "steps": 3}, "something else than tensors by name: 'steps'"),
        ({3: torch.ones(2)}, "not tensors by name"),
    ],
)
def test_pickles_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(OSError, match=message):
        read_tensors(tmp_path / "a.pt")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_tensors(tmp_path / "a.pt")
