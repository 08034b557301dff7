"""A call that was interrupted goes on to the very video that it would have made: tested to the bit, for everything that has a state."""

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from safetensors.torch import load_file, save_file

from diffusers_cogvideox import (
    CogVideoXContinuationPipeline,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXScheduler,
    CogVideoXVideoToVideoPipeline,
)
from diffusers_cogvideox.pipelines.journal import Journal
from parity import StockDPMScheduler
from tiny_pipeline import call

STEPS = 5


class Stop(BaseException):
    """What Ctrl-C is to Python: no Exception."""


def stop_after(steps: int):
    """A callback that ends the call after so many of its steps, in all loops together."""
    made = []

    def callback(*_):
        made.append(1)
        if len(made) == steps:
            raise Stop
        return {}

    return callback


def counted(pipe, **options) -> tuple[torch.Tensor, int]:
    """The frames of a call and how often its transformer ran."""
    runs = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: runs.append(1))
    try:
        return call(pipe, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3), **options), len(runs)
    finally:
        handle.remove()


def interrupted(pipe, path, steps: int, every: int | None = 1, **options) -> None:
    with pytest.raises(Stop):
        counted(pipe, journal=Journal(path, every), callback_on_step_end=stop_after(steps), **options)


CASES = {
    "ddim": (CogVideoXDDIMScheduler, {}),
    "ddim that draws": (CogVideoXDDIMScheduler, {"eta": 0.7}),
    "dpm": (CogVideoXDPMScheduler, {}),
    "dynamic guidance": (CogVideoXDPMScheduler, {"use_dynamic_cfg": "progress", "guidance_scale": 5.0}),
    "several videos": (CogVideoXDPMScheduler, {"num_videos_per_prompt": 2}),
}


@pytest.mark.parametrize(("scheduler", "options"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("steps", [3, 5])
def test_the_resumed_video_is_the_same_to_the_bit(scheduler, options, steps, pipe, tmp_path):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    whole, runs = counted(pipe, **options)
    # Saved after steps 2 and 4, so that the step between is lost once and made again.
    interrupted(pipe, tmp_path / "state", steps, every=2, **options)
    resumed, rest = counted(pipe, journal=Journal(tmp_path / "state", 2), **options)
    assert torch.equal(resumed, whole)
    assert (runs, rest) == (STEPS, STEPS - (steps - 1) // 2 * 2)


def test_one_generator_for_each_video(pipe, tmp_path):
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)

    def made(**options) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return call(pipe, num_inference_steps=STEPS, num_videos_per_prompt=2, generator=generators, **options)

    with pytest.raises(Stop):
        made(journal=Journal(tmp_path / "state", 1), callback_on_step_end=stop_after(3))
    assert torch.equal(made(journal=Journal(tmp_path / "state", 1)), made())


def test_video_to_video(pipe, tmp_path):
    """The loop starts late, and the condition draws from the generator before it."""
    pipe = CogVideoXVideoToVideoPipeline(**pipe.components)
    options = {"video": torch.rand(9, 3, 32, 48), "strength": 0.8}
    whole = without_frames(pipe, **options)
    with pytest.raises(Stop):
        without_frames(pipe, journal=Journal(tmp_path / "state", 1), callback_on_step_end=stop_after(2), **options)
    assert torch.equal(without_frames(pipe, journal=Journal(tmp_path / "state", 1), **options), whole)


def without_frames(pipe, **options) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 48, "max_sequence_length": 7, "num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(3)
    return pipe(prompt="a red circle", generator=generator, output_type="pt", return_dict=False, **size, **options)[0]


@pytest.mark.parametrize("steps", [3, STEPS, STEPS + 2])
def test_a_call_with_several_loops(steps, pipe, tmp_path):
    """A continuation of 12 frames takes two windows: the state of a loop that is finished counts too."""
    pipe = CogVideoXContinuationPipeline(**pipe.components)
    options = {"video": torch.rand(9, 3, 32, 48), "num_frames": 12, "overlap_frames": 1}
    whole, runs = counted(pipe, **options)
    assert runs == 2 * STEPS
    interrupted(pipe, tmp_path / "state", steps, **options)
    resumed, rest = counted(pipe, journal=Journal(tmp_path / "state", 1), **options)
    assert torch.equal(resumed, whole)
    assert rest == runs - (steps - 1)


def test_a_finished_call_only_decodes(pipe, tmp_path):
    whole, _ = counted(pipe, journal=Journal(tmp_path / "state", 1))
    again, runs = counted(pipe, journal=Journal(tmp_path / "state", 1))
    assert torch.equal(again, whole)
    assert runs == 0


def test_the_file_comes_and_goes(pipe, tmp_path):
    path = tmp_path / "state"
    interrupted(pipe, path, 3, every=None)
    assert not path.exists()
    journal = Journal(path, 2)
    journal.save()
    assert not path.exists(), "there was nothing to save"
    counted(pipe, journal=journal)
    assert [file.name for file in tmp_path.iterdir()] == ["state"]
    assert Journal(path).progress == "step 4 of 5"
    journal.save()
    assert Journal(path).progress == "step 5 of 5"
    journal.remove()
    assert not path.exists()
    assert journal.progress == "the start"


# --- what cannot be resumed ---------------------------------------------------------------------------------------------


def test_another_call_is_refused(pipe, tmp_path):
    path = tmp_path / "state"
    interrupted(pipe, path, 3)
    with pytest.raises(ValueError, match="was saved by another call: repeat that call, or delete the file"):
        Journal(path, identity="another")
    with pytest.raises(ValueError, match=r"another call, with latents \(1, 3, 4, 4, 6\) and 5 steps, not \(1, 3, 4, 4, 4\) and 5"):
        counted(pipe, journal=Journal(path), width=32)
    with pytest.raises(ValueError, match=r"and 5 steps, not .* and 3"):
        call(pipe, journal=Journal(path))


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "state").write_bytes(b"hello")
    with pytest.raises(OSError, match=r"state is not a saved state, or is damaged .*: delete it to start anew"):
        Journal(tmp_path / "state")


def test_intervals_are_checked(tmp_path):
    with pytest.raises(ValueError, match="every=0 is not possible"):
        Journal(tmp_path / "state", 0)


def test_what_has_a_state_of_its_own_is_refused(pipe, tmp_path):
    journal = Journal(tmp_path / "state")
    with pytest.raises(ValueError, match="needs generator="):
        call(pipe, journal=journal, generator=None)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ValueError, match="cannot use a feature cache"):
            call(pipe, journal=journal)
    finally:
        pipe.transformer.disable_cache()
    pipe.scheduler = StockDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="a scheduler whose history can be saved, which CogVideoXDPMScheduler is not"):
        call(pipe, journal=journal)


def test_the_history_of_a_scheduler():
    """Put into a new scheduler, it makes the same step; without it, a second-order step becomes one of first order."""
    first, second, bare = (CogVideoXScheduler(algorithm_type="dpmsolver++") for _ in range(3))
    for scheduler in (first, second, bare):
        scheduler.set_timesteps(6)
    assert first.history() == {}
    x = torch.randn(1, 2, 4, 3, 3)
    for timestep in first.timesteps[:3]:
        x = first.step(torch.randn_like(x), timestep, x, return_dict=False)[0]
    second.load_history(first.history())
    velocity, noise = torch.randn_like(x), torch.randn_like(x)

    def step(scheduler) -> torch.Tensor:
        return scheduler.step(velocity, first.timesteps[3], x, variance_noise=noise, return_dict=False)[0]

    expected = step(first)
    assert torch.equal(step(second), expected)
    assert not torch.equal(step(bare), expected)


def test_states_that_miss_a_tensor_are_damaged(pipe, tmp_path):
    path = tmp_path / "state"
    interrupted(pipe, path, 3)
    tensors = load_file(path)
    del tensors["0.latents"]
    save_file(tensors, path, {"identity": ""})
    with pytest.raises(OSError, match="is not a saved state, or is damaged"):
        Journal(path)
