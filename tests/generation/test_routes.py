"""Files and model decide on the pipeline: every combination leads somewhere or is refused with what it needs."""

import re
from pathlib import Path
from typing import get_args

import pytest

from diffusers_cogvideox import options
from diffusers_cogvideox.generation.routes import ROUTES, choose_pipeline, takes_frames
from diffusers_cogvideox.pipelines import inputs
from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.tasks import tasks_of
from parity import TINY_TRANSFORMERS


def test_every_combination_has_a_row():
    assert set(ROUTES) == set(options.COMBINATIONS)


def test_the_command_knows_every_way_to_fit():
    assert set(get_args(options.Fit)) == set(get_args(inputs.Fit))


# What each released pipeline is for, by the name that its repository states.
PURPOSE = {
    "CogVideoXPipeline": (),
    "CogVideoXImageToVideoPipeline": ("image",),
    "CogVideoXFunControlPipeline": ("control",),
    "CogVideoXFunInpaintPipeline": ("image", "last_image"),
}


def test_the_page_of_tasks_says_what_the_table_says():
    """docs/tasks.md: a row for each combination of files, a "yes" for each release that takes it, and the classes that then run."""
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8").split("\n\n")
    head, _, *rows = next(block for block in page if block.startswith("| task |")).splitlines()
    columns = [[name.strip() for name in cell.split(",")] for cell in cells(head)[3:]]
    assert sorted(name for column in columns for name in column) == sorted(PRESETS)
    found = {}
    for row in rows:
        _, flags, classes, *marks = cells(row)
        files = tuple(name.replace("-", "_") for name in re.findall(r"--([\w-]+)", flags))
        found[files] = {name for column, mark in zip(columns, marks, strict=True) if mark == "yes" for name in column}
        assert set(re.findall(r"`(\w+)`", classes)) == {pipeline.__name__ for pipeline in ROUTES[files].values()}
    taken = {files: {p.name for p in PRESETS.values() if tasks_of(p.transformer) & set(ROUTES[files])} for files in ROUTES}
    assert found == taken


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_released_models_do_what_they_were_made_for(preset):
    assert choose_pipeline(preset.transformer, preset.name, PURPOSE[preset.pipeline]).__name__ == preset.pipeline


@pytest.mark.parametrize(
    ("variant", "files", "pipeline"),
    [
        ("5b", ("video",), "CogVideoXVideoToVideoPipeline"),
        ("5b", ("extend",), "CogVideoXContinuationPipeline"),
        ("5b-i2v", ("extend",), "CogVideoXContinuationPipeline"),
        ("fun-inp", (), "CogVideoXFunInpaintPipeline"),
        ("fun-inp", ("image",), "CogVideoXFunInpaintPipeline"),
        ("fun-inp", ("last_image",), "CogVideoXFunInpaintPipeline"),
        ("fun-inp", ("video", "mask"), "CogVideoXFunInpaintPipeline"),
        ("fun-control", ("control",), "CogVideoXFunControlPipeline"),  # this config may be that of an image model, too
        ("fun-control", ("image",), "CogVideoXImageToVideoPipeline"),
    ],
)
def test_the_other_tasks(variant, files, pipeline):
    assert choose_pipeline(TINY_TRANSFORMERS[variant], variant, files).__name__ == pipeline


@pytest.mark.parametrize(
    ("named", "taken", "refused"),
    [("CogVideoXImageToVideoPipeline", "image", "control"), ("CogVideoXFunControlPipeline", "control", "image")],
)
def test_the_folder_says_which_of_two_tasks_a_model_has(named, taken, refused):
    """Image and control models of one size have one config."""
    config = TINY_TRANSFORMERS["fun-control"]
    assert choose_pipeline(config, "X", (taken,), named).__name__ == named
    with pytest.raises(ValueError, match=f"--{refused} needs .*; X is an? [^,]* model, which takes --{taken}"):
        choose_pipeline(config, "X", (refused,), named)
    assert {choose_pipeline(config, "X", (file,), "CogVideoXPipeline").__name__ for file in (taken, refused)} > {named}


@pytest.mark.parametrize(
    ("variant", "files", "message"),
    [
        ("5b", ("image",), r"--image needs an image-to-video model .*CogVideoX-5b-I2V\) or a Fun InP model .*; X is a text"),
        ("5b", ("image", "last_image"), r"--image with --last-image needs a Fun InP model .*; X is a text-to-video model, which"),
        ("5b", ("video", "mask"), "--video with --mask needs a Fun InP model"),
        ("5b", ("control",), "--control needs a Fun Control model"),
        ("5b-i2v", (), r"A prompt alone needs a text-to-video model .* X is an image-to-video model, which takes --image, --extend"),
        ("5b-i2v", ("video",), "--video needs a text-to-video model"),
        ("fun-inp", ("control",), "--control needs a Fun Control model"),
    ],
)
def test_what_a_model_cannot_do(variant, files, message):
    with pytest.raises(ValueError, match=message):
        choose_pipeline(TINY_TRANSFORMERS[variant], "X", files)


def test_a_model_of_no_known_task():
    with pytest.raises(ValueError, match=r"X is a model of an unknown task\.$"):
        choose_pipeline({"in_channels": 20, "out_channels": 16}, "X")


def test_only_a_remade_video_keeps_its_length():
    lengths = {pipeline.__name__: takes_frames(pipeline) for row in ROUTES.values() for pipeline in row.values()}
    assert [name for name, takes in lengths.items() if not takes] == ["CogVideoXVideoToVideoPipeline"]
