"""Which transformer is for which pipeline."""

import pytest

from diffusers_cogvideox.presets import PRESETS
from diffusers_cogvideox.tasks import check_task, tasks_of
from parity import TINY_TRANSFORMERS

TASK_OF = {
    "CogVideoXPipeline": "text",
    "CogVideoXImageToVideoPipeline": "image",
    "CogVideoXFunControlPipeline": "control",
    "CogVideoXFunInpaintPipeline": "inpaint",
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_release_is_for_the_pipeline_it_names(name: str):
    preset = PRESETS[name]
    assert tasks_of(preset.transformer) == {TASK_OF[preset.pipeline]}
    for task in TASK_OF.values():
        if task == TASK_OF[preset.pipeline]:
            check_task(preset.transformer, task)
        else:
            with pytest.raises(ValueError, match=f"Use .*{preset.pipeline}"):
                check_task(preset.transformer, task)


@pytest.mark.parametrize(
    ("config", "tasks"),
    [
        (TINY_TRANSFORMERS["2b"], {"text"}),
        (TINY_TRANSFORMERS["5b-i2v"], {"image"}),
        (TINY_TRANSFORMERS["1.5-5b-i2v"], {"image"}),
        (TINY_TRANSFORMERS["fun-control"], {"image", "control"}),
        (TINY_TRANSFORMERS["fun-inp"], {"inpaint"}),
        ({"in_channels": 16, "out_channels": None}, {"text"}),
        ({"in_channels": 48, "out_channels": 16}, set()),
    ],
)
def test_models_that_were_not_released(config, tasks):
    assert tasks_of(config) == tasks


def test_a_model_of_no_known_task():
    with pytest.raises(ValueError, match=r"reads 48 channels, 32 more .* not a text-to-video model. Use the pipeline of its task"):
        check_task({"in_channels": 48, "out_channels": 16}, "text")


def test_a_model_of_either_task_names_both_pipelines():
    with pytest.raises(ValueError, match=r"an inpainting model. Use CogVideoXFunControlPipeline or CogVideoXImageToVideoPipeline"):
        check_task(TINY_TRANSFORMERS["fun-control"], "inpaint")
