"""Pipelines on several ranks: who does what, and that the video is the same."""

from types import SimpleNamespace

import pytest

import rank_checks
import ranks
from diffusers_cogvideox.models.collectives import Group
from diffusers_cogvideox.runtime.parallel import MODES, Roles, divide_roles, share_work, shares_batches


def test_auto_takes_the_halves_first():
    assert divide_roles("auto", 4, heads=30, guided=True) == Roles(halves=2, ulysses=2)
    assert divide_roles("auto", 4, heads=30, guided=False) == Roles(ulysses=4)
    assert divide_roles("auto", 3, heads=30, guided=True) == Roles(ulysses=3)
    assert divide_roles("auto", 16, heads=6, guided=True) == Roles(halves=2, ring=2, ulysses=4)
    assert divide_roles("auto", 1, heads=30, guided=True).of(0) == "everything"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_every_rank_has_a_role(mode, count):
    if mode == "cfg" and count % 2:
        return
    roles = divide_roles(mode, count, heads=30, guided=True)
    assert roles.halves * roles.ring * roles.ulysses * roles.tensor == count
    assert len({roles.of(rank) for rank in range(count)}) == count


@pytest.mark.parametrize(
    ("mode", "count", "guided", "match"),
    [
        ("fast", 2, True, "unknown"),
        ("cfg", 3, True, "not two halves"),
        ("cfg", 2, False, "only one half"),
        ("ulysses", 31, True, "30 heads"),
        ("tensor", 31, True, "30 heads"),
    ],
)
def test_impossible_roles(mode, count, guided, match):
    with pytest.raises(ValueError, match=match):
        divide_roles(mode, count, heads=30, guided=guided)


def test_needs_ranks(pipe):
    with pytest.raises(RuntimeError, match="torchrun"):
        share_work(pipe)


@pytest.mark.parametrize(
    ("count", "variant", "modes"),
    [(2, "5b", ["auto", "ulysses", "ring", "tensor"]), (3, "1.5-5b", ["ring"]), (4, "5b", ["auto"])],
)
def test_the_same_video(folders, count, variant, modes):
    ranks.run(count, rank_checks.pipelines, str(folders(variant)), modes, {})


def test_halves_and_guiders(folders):
    ranks.run(2, rank_checks.halves_and_guiders, str(folders()))


def test_ranks_without_a_half_of_their_own_are_told(caplog):
    transformer = SimpleNamespace(batch_group=Group("halves", 0, 2))
    assert shares_batches(transformer, 2) and not caplog.text
    assert shares_batches(transformer, 1) and "1 sample at a time, which 2 ranks cannot share" in caplog.text
    assert not shares_batches(SimpleNamespace(batch_group=None), 1)


def test_batches():
    ranks.run(2, rank_checks.batches)
