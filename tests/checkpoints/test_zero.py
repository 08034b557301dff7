"""DeepSpeed's ZeRO checkpoints, written in its layout by hand, for 1, 2 and 3 ranks."""

import math

import pytest
import torch

from diffusers_cogvideox.checkpoints.zero import merge
from parity import StockTransformer
from sat_cases import converted, sat_transformer, tiny_transformer

SHAPES = [{"a.weight": (3, 5), "a.bias": (3,), "scalar": ()}, {"b.weight": (7, 2)}]
FROZEN = {"frozen.weight": (5, 3)}


def parameters(shapes=SHAPES):
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=random) for group in shapes for name, shape in group.items()}


def padded(vector, length):
    """Padding that nobody may read."""
    return torch.cat([vector, torch.full((length - len(vector),), torch.nan)])


def stages_1_and_2(groups, values, ranks, stage):
    """Contents of the optimiser files: each group's flat vector, padded to 2 numbers per rank, in equal parts."""
    flat = [torch.cat([values[name].flatten() for name in group]) for group in groups]
    flat = [padded(vector, math.ceil(len(vector) / (2 * ranks)) * 2 * ranks) for vector in flat]
    return [
        {
            "optimizer_state_dict": {
                "zero_stage": stage,
                "partition_count": [ranks] * len(groups),
                "single_partition_of_fp32_groups": [vector.chunk(ranks)[rank].clone() for vector in flat],
            }
        }
        for rank in range(ranks)
    ]


def cut(value, ranks):
    share = math.ceil(value.numel() / ranks)
    return padded(value.flatten(), share * ranks).chunk(ranks)


def stage_3(groups, values, ranks):
    """Each parameter in equal parts; the last ones padded."""
    return [
        {
            "optimizer_state_dict": {
                "zero_stage": 3,
                "partition_count": ranks,
                "fp32_flat_groups": [torch.cat([cut(values[name], ranks)[rank] for name in group]) for group in groups],
            }
        }
        for rank in range(ranks)
    ]


def model_files(groups, ranks, stage, frozen=None, buffers=None, shared=None):
    frozen, buffers = frozen or {}, buffers or {}
    held = [{name: value if stage < 3 else cut(value, ranks)[rank] for name, value in frozen.items()} for rank in range(ranks)]
    return [
        {
            "module": {name: value.bfloat16() for name, value in buffers.items()},
            "buffer_names": list(buffers),
            "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in groups],
            "frozen_param_shapes": {name: value.shape for name, value in frozen.items()},
            "frozen_param_fragments": held[rank],
            "shared_params": shared or {},
            "ds_version": "0.16.4",
        }
        for rank in range(ranks if stage == 3 else 1)
    ]


def written(stage, ranks, groups=SHAPES, values=None, **more):
    values = values or parameters(groups)
    optimizers = stage_3(groups, values, ranks) if stage == 3 else stages_1_and_2(groups, values, ranks, stage)
    return model_files(groups, ranks, stage, **more), optimizers


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_merging(stage, ranks):
    frozen, buffers = {"frozen.weight": torch.randn(5, 3)}, {"table": torch.randn(4)}
    files = written(stage, ranks, frozen=frozen, buffers=buffers, shared={"tied.weight": "b.weight"})
    found = {name: tensor.make() for name, tensor in merge(*files).items()}
    expected = parameters() | frozen | {"table": buffers["table"].bfloat16(), "tied.weight": parameters()["b.weight"]}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_more_ranks_than_numbers(stage):
    groups = [{"a": (1,), "b": (2,)}]
    found = merge(*written(stage, 5, groups))
    assert all(torch.equal(found[name].make(), value) for name, value in parameters(groups).items())


def test_one_group_without_a_list():
    models, optimizers = written(2, 2, SHAPES[:1])
    models[0]["param_shapes"] = models[0]["param_shapes"][0]
    assert torch.equal(merge(models, optimizers)["a.weight"].make(), parameters(SHAPES[:1])["a.weight"])


@pytest.mark.parametrize("stage", [2, 3])
def test_what_does_not_fit_together(stage):
    models, optimizers = written(stage, 2)
    with pytest.raises(ValueError, match="written by 2 ranks, but holds the optimiser files of 1"):
        merge(models, optimizers[:1])
    models[0]["param_shapes"][1]["more"] = torch.Size((40,))
    with pytest.raises(ValueError, match="but its parameters need 54" if stage == 2 else "end within more"):
        merge(models, optimizers)
    del models[0]["param_shapes"][1]["more"], models[0]["param_shapes"][1]["b.weight"]
    with pytest.raises(ValueError, match=r"but (its|the) parameters need"):
        merge(models, optimizers)
    del models[0]["param_shapes"]
    with pytest.raises(ValueError, match="lacks 'param_shapes', which DeepSpeed writes"):
        merge(models, optimizers)


def test_missing_files_of_stage_3():
    models, optimizers = written(3, 2, frozen={"frozen.weight": torch.randn(5, 3)})
    with pytest.raises(ValueError, match="written by 2 ranks, but holds the model files of 1"):
        merge(models[:1], optimizers)
    models[1]["frozen_param_fragments"] = {}
    with pytest.raises(ValueError, match=r"frozen parameters are missing: frozen\.weight"):
        merge(models, optimizers)


@pytest.mark.parametrize("sat", [False, True])
@pytest.mark.parametrize(("stage", "ranks"), [(1, 3), (2, 2), (3, 1), (3, 3)])
def test_a_training_checkpoint_on_disk(tmp_path, stage, ranks, sat):
    """As DeepSpeed names the files, of a model of diffusers and of one of the original code."""
    model = tiny_transformer("1.5-5b-i2v")
    values = sat_transformer(model) if sat else dict(model.state_dict())
    names = sorted(values)
    groups = [{name: tuple(values[name].shape) for name in half} for half in (names[:30], names[30:])]
    models, optimizers = written(stage, ranks, groups, values)
    folder = tmp_path / "checkpoint-100" / "global_step100"
    folder.mkdir(parents=True)
    (folder.parent / "latest").write_text("global_step100")
    for rank, content in enumerate(models):
        torch.save(content, folder / (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"))
    for rank, content in enumerate(optimizers):
        torch.save(content, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    found = StockTransformer.from_pretrained(converted(folder.parent, tmp_path / "model")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())
    if stage == 3:
        (folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
        message = "but holds the optimiser files of 2" if ranks > 1 else "in which ZeRO stage 3 keeps the weights"
        with pytest.raises((ValueError, OSError), match=message):
            converted(folder.parent, tmp_path / "other")
