"""Files that are written one tensor at a time are the files that the libraries write."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_cogvideox.checkpoints.lazy import LazyTensor, combine, lazily
from diffusers_cogvideox.checkpoints.writing import parse_bytes, write_pickle, write_safetensors, write_shards

TENSORS = {
    "a.weight": torch.randn(5, 7),
    "b": torch.randn(3, 3).bfloat16(),
    "c": torch.zeros(1).half(),
    "scalar": torch.tensor(3.0),
    "counts": torch.arange(4),
    "empty": torch.zeros(0, 3),
}


def same(found):
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_safetensors_as_the_library_writes_them(tmp_path):
    write_safetensors(tmp_path / "ours", lazily(TENSORS), {"format": "pt"})
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_pickles_as_torch_writes_them(tmp_path):
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    write_pickle(tmp_path / "ours" / "x.pt", {"module": lazily(TENSORS)})
    torch.save({"module": TENSORS}, tmp_path / "theirs" / "x.pt")
    ours, theirs = (zipfile.ZipFile(tmp_path / folder / "x.pt") for folder in ("ours", "theirs"))
    assert ours.testzip() is None
    assert set(theirs.namelist()) - set(ours.namelist()) <= {"x/.data/serialization_id"}
    assert not [name for name in ours.namelist() if ours.read(name) != theirs.read(name)]


@pytest.mark.parametrize("mapped", [True, False])
def test_pickles_are_loaded(tmp_path, mapped):
    write_pickle(tmp_path / "x.pt", {"module": lazily(TENSORS)})
    found = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mapped)["module"]
    assert same(found)
    assert not mapped or all(tensor.data_ptr() % 64 == 0 for tensor in found.values())


@pytest.mark.parametrize(("size", "files"), [(10**6, 1), (150, 2), (1, 6)])
def test_shards_as_diffusers_names_them(tmp_path, size, files):
    paths = write_shards(tmp_path, "model", lazily(TENSORS), size)
    assert len(paths) == files
    assert same({name: tensor for path in paths for name, tensor in load_file(path).items()})
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() is (files > 1)
    if files > 1:
        assert paths[0].name == f"model-00001-of-{files:05d}.safetensors"
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
        assert all(name in load_file(tmp_path / file) for name, file in content["weight_map"].items())


def test_tensors_are_made_when_they_are_written(tmp_path):
    made = []
    tensors = {
        name: LazyTensor(torch.empty(2, device="meta"), lambda name=name: made.append(name) or torch.zeros(2)) for name in ("a", "b")
    }
    total = combine(lambda a, b: torch.cat([a, b]), list(tensors.values())).to(torch.float16)
    assert (total.shape, total.dtype, total.nbytes) == ((4,), torch.float16, 8)
    assert not made
    steps = []
    write_safetensors(tmp_path / "x", {"total": total}, {}, steps.append)
    assert made == ["a", "b"]
    assert steps == [8]


def test_shapes_are_checked_before_anything_is_made():
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        combine(lambda a, b: torch.cat([a, b]), [LazyTensor.of(torch.zeros(1, 2)), LazyTensor.of(torch.zeros(1, 3))])


def test_sizes():
    assert [parse_bytes(text) for text in ("5GB", "1.5 MB", "20kb")] == [5 * 10**9, 1_500_000, 20_000]
    for text in ("5", "GB", "five GB", "0GB", "-1GB", "5GiB"):
        with pytest.raises(ValueError, match="size"):
            parse_bytes(text)
