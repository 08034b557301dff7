"""Files of prompts: every mistake is named before anything runs, what is there is not made again, and one failure stops nothing."""

import json
from pathlib import Path

import pytest

import diffusers_cogvideox.generation.generate as generating
from diffusers_cogvideox import cli
from diffusers_cogvideox.generation.batch import read_items
from diffusers_cogvideox.generation.generate import generate
from diffusers_cogvideox.generation.plan import plan
from diffusers_cogvideox.options import GenerateOptions, MistakesError

CIRCLE = {"prompt": "a red circle"}


@pytest.fixture
def folder(folders) -> Path:
    return folders()


@pytest.fixture
def batch(folder, tmp_path):
    """batch([line, ...], **options): the options for a JSONL file of these objects, or lines as they are."""

    def options(lines, **changes) -> GenerateOptions:
        file = tmp_path / "batch.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        defaults = {"model": str(folder), "output": str(tmp_path / "out"), "steps": 1, "device": "cpu", "size": "32x48"}
        return GenerateOptions(str(file), **{**defaults, **changes})

    return options


@pytest.fixture
def loads(monkeypatch) -> list:
    """Grows with every loading of weights."""
    count, load = [], generating.load_pipeline
    monkeypatch.setattr(generating, "load_pipeline", lambda *given: count.append(1) or load(*given))
    return count


def lines_of(options: GenerateOptions, planner=plan) -> list[str]:
    with pytest.raises(MistakesError) as caught:
        planner(options)
    return caught.value.lines


# --- lines are options ----------------------------------------------------------------------------------------------------


def test_options_are_defaults_for_the_lines(batch):
    lines = [{"prompt": " a circle "}, "", {"prompt": "a square", "seed": 3, "guidance_scale": 2, "size": None, "num_videos": 2}]
    items = read_items(batch(lines, seed=1, guidance_scale=5.0))
    assert [item.title for item in items] == ["line 1", "line 3"]
    first, second = (item.options for item in items)
    assert (first.prompt, first.seed, first.guidance_scale, first.size, first.steps) == (" a circle ", 1, 5.0, "32x48", 1)
    assert (second.seed, second.guidance_scale, second.size, second.num_videos) == (3, 2, None, 2)


def test_names_of_the_videos(batch, tmp_path):
    lines = [CIRCLE, {"prompt": "a square", "num_videos": 2}, {"prompt": "b", "output": str(tmp_path / "mine.mp4")}]
    outputs = [job.output.name for job in plan(batch(lines))]
    assert outputs == ["001-a-red-circle-0.mp4", "002-a-square-0.mp4", "002-a-square-1.mp4", "mine.mp4"]


def test_a_prompt_is_one_item_without_a_title():
    options = GenerateOptions("a red circle")
    (item,) = read_items(options)
    assert (item.title, item.options) == ("", options)


def test_lines_of_text_are_prompts_whatever_they_look_like(tmp_path):
    (tmp_path / "prompts.txt").write_text("a.json\n{}\n")
    assert [item.options.prompt for item in read_items(GenerateOptions(str(tmp_path / "prompts.txt")))] == ["a.json", "{}"]


# --- mistakes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list, not a JSON object"),
        ({"seed": 1}, 'the key "prompt" is missing'),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": 3}, "prompt 3 is not possible: expected a text"),
        (CIRCLE | {"sead": 1}, "'sead' is unknown: known are .*seed"),
        (CIRCLE | {"num-videos": 1}, "'num-videos' is unknown: known are .*num_videos"),
        (CIRCLE | {"model": "demo"}, "'model' holds for all lines: give it as --model"),
        (CIRCLE | {"checkpoint_every": 2}, "'checkpoint_every' holds for all lines: give it as --checkpoint-every"),
        (CIRCLE | {"seed": "1"}, "seed '1' is not possible: expected a whole number"),
        (CIRCLE | {"seed": True}, "seed True is not possible"),
        (CIRCLE | {"steps": 2.5}, "steps 2.5 is not possible: expected a whole number or null"),
        (CIRCLE | {"sampler": "euler"}, "sampler 'euler' is not possible: expected one of ddim, dpm or null"),
        (CIRCLE | {"steps": 0}, "--steps 0 is not possible: it must be at least 1"),
        (CIRCLE | {"size": "8x8"}, "each must be between 16 and"),
        (CIRCLE | {"frames": 10**6}, "num_frames=1000000 is not possible"),
        (CIRCLE | {"image": "nowhere.png"}, "there is no file nowhere.png"),
        (CIRCLE | {"strength": 0.5}, "--strength 0.5 has an effect only with --video"),
    ],
)
def test_a_line_that_is_wrong(line, message, batch):
    title, *mistakes = lines_of(batch([CIRCLE, line]))
    assert title.endswith("batch.jsonl has 1 mistake, and nothing was made:")
    (mistake,) = mistakes
    assert mistake.startswith("line 2: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(mistake)


def test_all_mistakes_are_named_at_once(batch, capsys, monkeypatch):
    monkeypatch.setattr(generating, "load_pipeline", lambda *_: pytest.fail("the weights were loaded"))
    options = batch([CIRCLE, "{", {"prompt": "b", "a": 1, "seed": "x"}, {"prompt": ""}])
    assert cli.main(["generate", options.prompt, "--model", options.model, "--output", options.output]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.strip().partition(":")[0] for line in lines] == ["cogvideox generate", "line 2", "line 3", "line 4"]
    assert lines[0].endswith("batch.jsonl has 3 mistakes, and nothing was made:")
    assert "'a' is unknown" in lines[2] and "seed 'x'" in lines[2]
    assert not Path(options.output).exists()


def test_an_empty_file(batch):
    with pytest.raises(ValueError, match="is empty: write one JSON object per line"):
        plan(batch(["", " "]))


def test_two_lines_with_one_output(batch, tmp_path):
    output = {"output": str(tmp_path / "same.mp4")}
    with pytest.raises(ValueError, match=r"line 1 and line 3 both write .*same\.mp4"):
        plan(batch([CIRCLE | output, CIRCLE, {"prompt": "b"} | output]))


# --- runs -------------------------------------------------------------------------------------------------------------------


def test_a_second_run_makes_what_is_missing(batch, loads, caplog):
    first = generate(batch([CIRCLE]))
    before = first[0].stat().st_mtime_ns
    caplog.set_level("INFO")
    both = generate(batch([CIRCLE, {"prompt": "a blue square", "sampler": "dpm"}]))
    assert len(loads) == 2
    assert first[0].stat().st_mtime_ns == before
    assert [path.is_file() for path in both] == [True, True]
    assert f"{first[0]} is there already" in caplog.text
    assert generate(batch([CIRCLE, {"prompt": "a blue square", "sampler": "dpm"}])) == both
    assert len(loads) == 2, "nothing was left to make"


def test_another_recipe_does_not_count_as_finished(batch):
    (path,) = generate(batch([CIRCLE]))
    (mistake,) = lines_of(batch([CIRCLE | {"guidance_scale": 2.0}]))[1:]
    assert mistake.startswith(f"line 1: {path}") and "exists already" in mistake
    path.with_suffix(".json").write_text("{}")
    assert "exists already" in lines_of(batch([CIRCLE]))[1]
    generate(batch([CIRCLE], overwrite=True))
    assert json.loads(path.with_suffix(".json").read_text())["prompt"] == "a red circle"


def test_a_video_without_its_companions_is_not_finished(batch):
    (path,) = generate(batch([CIRCLE]))
    path.with_suffix(".png").unlink()
    assert "exists already" in lines_of(batch([CIRCLE]))[1]


@pytest.mark.parametrize("error", [ValueError, MemoryError])
def test_one_failure_stops_nothing(error, batch, loads, monkeypatch, capsys):
    make = generating.stream_videos

    def fail(pipe, prompts, *rest, **options):
        if prompts == ["fail"]:
            raise error("for a reason")
        return make(pipe, prompts, *rest, **options)

    monkeypatch.setattr(generating, "stream_videos", fail)
    lines = [CIRCLE, {"prompt": "fail"}, {"prompt": "a blue square"}]
    options = batch(lines)
    flags = ["--model", options.model, "--output", options.output, "--steps", "1", "--size", "32x48", "--device", "cpu"]
    assert cli.main(["generate", options.prompt, *flags]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    summary = shown.err.rpartition("error: ")[2].splitlines()
    assert summary[0] == "1 of 3 videos failed, the others are made:"
    assert summary[1].strip() == f"line 2, {options.output}/002-fail-0.mp4: {error.__name__}: for a reason"
    assert sorted(path.name for path in Path(options.output).glob("*.mp4")) == ["001-a-red-circle-0.mp4", "003-a-blue-square-0.mp4"]
    monkeypatch.setattr(generating, "stream_videos", make)
    generate(options)
    assert len(loads) == 2
    assert len(list(Path(options.output).glob("*.mp4"))) == 3


def test_ctrl_c_keeps_what_is_made(batch, monkeypatch, caplog):
    make = generating.stream_videos

    def stop(pipe, prompts, *rest, **options):
        if prompts == ["stop"]:
            raise KeyboardInterrupt
        return make(pipe, prompts, *rest, **options)

    monkeypatch.setattr(generating, "stream_videos", stop)
    caplog.set_level("INFO")
    options = batch([CIRCLE, {"prompt": "stop"}, {"prompt": "b"}])
    with pytest.raises(KeyboardInterrupt):
        generate(options)
    assert "1 of 3 videos are made; the same command makes the rest" in caplog.text
    assert [path.name for path in Path(options.output).glob("*.mp4")] == ["001-a-red-circle-0.mp4"]
