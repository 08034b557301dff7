"""The model of what several GPUs should give counts what the code does, and the page shows what it says."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import rank_checks
import ranks
import scaling_model
from diffusers_cogvideox.runtime.parallel import Roles
from scaling_model import Video, step_seconds, work
from transformer_cases import inputs, tiny_twins

SIZES = {"text": 8, "frames": 2, "height": 8, "width": 12}
TINY = Video(layers=2, width=128, heads=4, text=8, video=48, samples=2, features=16)


@pytest.mark.parametrize("way", ["ulysses", "ring", "tensor", "halves"])
def test_the_bytes_are_those_that_are_received(way):
    counted = ranks.run(2, rank_checks.received, way, SIZES)
    todo = work(TINY, Roles(**{way: 2}), element=4)
    expected = (todo.inside + todo.across) / (4 if way != "halves" else scaling_model.BYTES)
    assert counted == [expected] * 2


def test_the_flops_are_those_of_attention_and_feed_forward():
    model, _ = tiny_twins("5b", num_attention_heads=4)
    model.set_attention_backend("_native_math")  # the counter knows matrix products
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs(model, **SIZES))
    per_module = counter.get_flop_counts()
    counted = sum(sum(per_module[name].values()) for name in per_module if name.endswith((".attn1", ".ff")))
    todo = work(TINY, Roles())
    assert counted == todo.matmul + todo.attention


def test_known_sizes():
    """Tokens and FLOPs of a guided step of CogVideoX-5B: 338 TFLOP in linear layers, 326 in attention."""
    video = Video.of("5b")
    todo = work(video, Roles())
    assert (video.text + video.video, video.heads, round(todo.matmul / 1e12), round(todo.attention / 1e12)) == (17776, 48, 338, 326)


def test_more_ranks_are_never_slower_within_a_host():
    for machine in scaling_model.MACHINES:
        seconds = [step_seconds(Video.of("5b"), Roles(ulysses=count), machine) for count in (1, 2, 4, 8)]
        assert seconds == sorted(seconds, reverse=True)


def test_the_page_shows_the_tables(monkeypatch, capsys, tmp_path):
    assert scaling_model.tables() in scaling_model.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["scaling_model.py"])
    scaling_model.main()
    assert capsys.readouterr().out.strip() == scaling_model.tables()
    copy = tmp_path / "page.md"
    copy.write_text(f"before\n{scaling_model.START}\nold\n{scaling_model.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(scaling_model, "PAGE", copy)
    monkeypatch.setattr("sys.argv", ["scaling_model.py", "--write"])
    scaling_model.main()
    written = copy.read_text(encoding="utf-8")
    assert scaling_model.tables() in written and "old" not in written and written.endswith("\nafter\n")
