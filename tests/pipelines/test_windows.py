"""Context windows: where they lie, that their weights add up to one, what the transformer sees of them, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import FirstBlockCacheConfig

from diffusers_cogvideox import (
    CogVideoXContinuationPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
    ContextWindows,
    Geometry,
)
from diffusers_cogvideox.pipelines.windows import Window, Windows, faded, radical_inverse
from tiny_pipeline import call as call_for_frames

V1, V15 = Geometry(), Geometry(patch_size_t=2)

PLANS = [
    Windows(total=41, length=13, overlap=4),
    Windows(total=41, length=13, overlap=4, schedule="static"),
    Windows(total=14, length=13, overlap=4),
    Windows(total=40, length=13, overlap=0),
    Windows(total=33, length=5, overlap=4, anchors=1),
    Windows(total=60, length=12, overlap=4, unit=2, anchors=2),
    Windows(total=44, length=22, overlap=6, unit=2, schedule="static"),
    Windows(total=47, length=9, overlap=2, anchors=2),
]
STEPS = range(9)
WINDOWS = ContextWindows(frames=17)


def call(pipe: CogVideoXPipeline, **options) -> torch.Tensor:
    return call_for_frames(pipe, **{"output_type": "latent", "num_inference_steps": 2, **options})


def own_frames(window: Window) -> list[int]:
    """The frames whose prediction is used."""
    return [frame for frame, weight in zip(window.frames.tolist(), window.weights.tolist(), strict=True) if weight]


# --- places and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_windows_reach_from_the_first_frame_to_the_last(plan):
    for step in STEPS:
        starts = plan.starts(step)
        assert (starts[0], starts[-1]) == (0, plan.total - plan.length)
        assert all(0 < after - before <= plan.length - plan.overlap for before, after in pairwise(starts))
        assert all(start % plan.unit == 0 for start in starts)


@pytest.mark.parametrize("plan", PLANS)
def test_weights_add_up_to_one_in_every_frame(plan):
    for step in STEPS:
        total = torch.zeros(plan.total)
        for frames, weights, _ in plan.at(step):
            assert len(frames) == len(weights) == plan.length
            assert (weights >= 0).all()
            total[frames] += weights
        torch.testing.assert_close(total, torch.ones(plan.total))


def test_static_windows_fade_linearly():
    """Over an overlap of o frames the earlier window's weight falls as o/(o+1), ..., 1/(o+1)."""
    first, second, _ = Windows(total=31, length=13, overlap=4, schedule="static").at(5)
    assert second.frames.tolist() == list(range(9, 22))
    torch.testing.assert_close(first.weights, torch.tensor([1.0] * 9 + [0.8, 0.6, 0.4, 0.2]))
    torch.testing.assert_close(second.weights, torch.tensor([0.2, 0.4, 0.6, 0.8] + [1.0] * 5 + [0.8, 0.6, 0.4, 0.2]))


def test_uniform_windows_move_and_static_ones_do_not():
    plan = Windows(total=61, length=13, overlap=5)
    places = [plan.starts(step)[1] for step in range(8)]
    assert sorted(places) == [1, 2, 3, 4, 5, 6, 7, 8]  # every place between two static windows, once
    assert places[:4] == [8, 4, 2, 6]
    still = replace(plan, schedule="static")
    assert {tuple(still.starts(step)) for step in range(8)} == {tuple(range(0, 49, 8))}


def test_radical_inverse_is_the_van_der_corput_sequence():
    assert [radical_inverse(n) for n in range(9)] == [0, 1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8, 1 / 16]


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan.anchors])
def test_every_window_keeps_the_image(plan):
    for step in STEPS:
        first, *later = plan.at(step)
        assert own_frames(first) == list(range(plan.length))
        for window in later:
            assert window.frames[: plan.anchors].tolist() == list(range(plan.anchors))
            assert window.frames.diff().gt(0).all()
            assert min(own_frames(window)) > plan.anchors


@pytest.mark.parametrize(
    ("geometry", "frames", "overlap", "expected"),
    [
        (V1, 49, 16, (13, 4, 1)),
        (V1, 49, None, (13, 4, 1)),
        (V1, 17, None, (5, 2, 1)),
        (V15, 81, 24, (22, 6, 2)),
        (V15, 81, None, (22, 6, 2)),
    ],
)
def test_frames_become_latent_frames(geometry, frames, overlap, expected):
    plan = ContextWindows(frames=frames, overlap=overlap).over(400, geometry)
    assert (plan.length, plan.overlap, plan.unit) == expected


@pytest.mark.parametrize(("anchors", "expected"), [(0, 0), (1, 2), (2, 2)])
def test_anchors_fill_patches(anchors, expected):
    assert ContextWindows(frames=49, overlap=16).over(60, V15, anchors).anchors == expected


def test_a_video_within_one_window_needs_none():
    assert ContextWindows(frames=49).over(13, V1) is None
    assert ContextWindows(frames=49).over(14, V1) is not None


# --- fading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_a_constant_prediction_stays_constant_and_the_identity_the_identity(plan):
    x = torch.randn(2, plan.total, 3, 2, 2)
    for step in (0, 3):
        windows = plan.at(step)
        torch.testing.assert_close(faded(windows, x, lambda part, _: torch.full_like(part, 7.0)), torch.full_like(x, 7.0))
        torch.testing.assert_close(faded(windows, x, lambda part, _: part), x)
        assert faded(windows, x, lambda part, _: part[:, :, :1]).shape == (2, plan.total, 1, 2, 2)


def test_predictions_are_averaged_by_weight():
    """Window k predicts k: what comes out is sum_k weight_k k, by hand."""
    windows, counter = Windows(total=31, length=13, overlap=4, schedule="static").at(0), iter((0.0, 1.0, 2.0))
    result = faded(windows, torch.zeros(1, 31, 1, 1, 1), lambda part, _: torch.full_like(part, next(counter)))
    ramp = [0.2, 0.4, 0.6, 0.8]
    expected = [0.0] * 9 + ramp + [1.0] * 5 + [1 + r for r in ramp] + [2.0] * 9
    torch.testing.assert_close(result.flatten(), torch.tensor(expected))


# --- noise ------------------------------------------------------------------------------------------------------------


def test_static_windows_share_their_noise():
    plan = Windows(total=13 + 4 * 8, length=13, overlap=5, schedule="static")
    noise = torch.arange(plan.total).view(1, -1, 1, 1, 1).float()
    reused = plan.reuse_noise(noise, torch.Generator().manual_seed(0)).flatten()
    torch.testing.assert_close(reused[:13], torch.arange(13.0))
    for start in plan.starts(0):
        assert sorted(reused[start : start + 13].tolist()) == list(range(13))
    assert (reused[13:26] != reused[:13]).any()  # in another order


def test_each_video_shuffles_with_its_own_generator():
    plan, noise = Windows(total=40, length=13, overlap=4), torch.randn(2, 40, 1, 1, 1)
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    together = plan.reuse_noise(noise, seeds)
    for number in range(2):
        alone = plan.reuse_noise(noise[number : number + 1], torch.Generator().manual_seed(1 + number))
        torch.testing.assert_close(together[number : number + 1], alone, atol=0, rtol=0)


def test_shuffled_noise_reaches_the_loop(pipe):
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given["hidden_states"][0]), with_kwargs=True)
    call(pipe, num_frames=33, context=ContextWindows(frames=17, schedule="static", shuffle_noise=True), num_inference_steps=1)
    handle.remove()
    sums = [sorted(part.sum(dim=(1, 2, 3)).tolist()) for part in seen]
    assert len(sums) == 3
    assert sums[0] == sums[1]


# --- in a pipeline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["5b", "1.5-5b"])
def test_one_window_is_no_window(loaded, variant):
    pipe = CogVideoXPipeline(**loaded(CogVideoXPipeline, variant).components)
    plain = call(pipe, num_frames=17)
    torch.testing.assert_close(call(pipe, num_frames=17, context=ContextWindows(frames=17)), plain, atol=0, rtol=0)
    torch.testing.assert_close(call(pipe, num_frames=17, context=ContextWindows(frames=33)), plain, atol=0, rtol=0)


@pytest.mark.parametrize(("variant", "frames", "length"), [("5b", 9, 5), ("2b", 9, 5), ("1.5-5b", 10, 6)])
def test_the_transformer_sees_one_window_at_a_time(loaded, variant, frames, length):
    pipe = CogVideoXPipeline(**loaded(CogVideoXPipeline, variant).components)
    shapes = []
    watch = pipe.transformer.register_forward_pre_hook
    handle = watch(lambda _, __, given: shapes.append(given["hidden_states"].shape[:2]), with_kwargs=True)
    latents = call(pipe, num_frames=33, context=ContextWindows(frames=17, overlap=8, schedule="static"))
    handle.remove()
    assert latents.shape[1] == 9
    assert latents.isfinite().all()
    places = len(Windows(total=frames, length=length, overlap=2, unit=1).starts(0))
    assert shapes == [(2, length)] * (2 * places)


def test_sequential_guidance_in_windows(pipe):
    options = {"num_frames": 33, "context": WINDOWS}
    torch.testing.assert_close(call(pipe, **options), call(pipe, sequential_guidance=True, **options), atol=1e-4, rtol=0)


def test_a_prediction_is_that_of_each_window_alone_faded(pipe):
    """One DDIM step from pure noise gives -v: windows by hand, from calls that know nothing of windows."""
    noise = torch.randn(1, 9, 4, 4, 6)
    options = {"num_inference_steps": 1, "context": ContextWindows(frames=17, overlap=8, schedule="static")}
    whole = call(pipe, num_frames=33, latents=noise, **options)
    parts = [call(pipe, num_frames=17, latents=noise[:, start : start + 5], num_inference_steps=1) for start in (0, 3, 4)]
    plan = Windows(total=9, length=5, overlap=2, schedule="static")
    expected = torch.zeros_like(noise)
    for part, (frames, weights, _) in zip(parts, plan.at(0), strict=True):
        expected[:, frames] += weights[:, None, None, None] * part
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-5b-i2v"])
def test_every_window_of_image_to_video_sees_the_image_where_it_belongs(loaded, variant):
    pipe = CogVideoXImageToVideoPipeline(**loaded(CogVideoXPipeline, variant).components)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given["hidden_states"][0]), with_kwargs=True)
    call(pipe, image=torch.rand(3, 32, 48), num_frames=33, context=WINDOWS, num_inference_steps=1, guidance_scale=1)
    handle.remove()
    assert len(seen) > 1
    for part in seen:
        torch.testing.assert_close(part[0], seen[0][0], atol=0, rtol=0)  # noise and image of frame 0
        assert part[0, 4:].abs().max() > 0
        assert part[1:, 4:].abs().max() == 0
    assert (seen[1][2:, :4] != seen[0][2:, :4]).any()


def test_video_to_video_runs_in_windows(pipe):
    remake = CogVideoXVideoToVideoPipeline(**pipe.components)
    remake.set_progress_bar_config(disable=True)
    options = {"prompt": "a red circle", "video": torch.rand(33, 3, 32, 48), "strength": 0.5, "height": 32, "width": 48}
    options |= {"num_inference_steps": 4, "max_sequence_length": 7, "output_type": "latent"}
    assert remake(**options, context=WINDOWS).frames.shape[1] == 9
    with pytest.raises(ValueError, match="shuffle_noise=True would shuffle the video"):
        remake(**options, context=ContextWindows(frames=17, shuffle_noise=True))


def test_riflex_reaches_the_transformer(pipe):
    assert (call(pipe, num_frames=33, riflex=True) - call(pipe, num_frames=33)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="riflex=True has no effect on 5 token frames"):
        call(pipe, num_frames=33, context=WINDOWS, riflex=True)


# --- several prompts --------------------------------------------------------------------------------------------------

STORY = {0: "a red circle moves right", 17: "a green square"}
STILL = ContextWindows(frames=17, overlap=8, schedule="static")


def test_a_window_has_the_prompt_of_most_of_what_it_shows():
    """Windows from 0, 9 and 18 show frames 0 to 8, 13 to 17 and 22 to 30 alone, and fade over the 4 between."""
    parts = [window.part for window in Windows(total=31, length=13, overlap=4, schedule="static", changes=(12, 20)).at(0)]
    assert parts == [0, 1, 2]
    assert [window.part for window in Windows(total=31, length=13, overlap=4, schedule="static", changes=(30,)).at(0)] == [0, 0, 0]
    moving = Windows(total=61, length=13, overlap=5, changes=(30,))
    changes = {min(window.frames.tolist()[0] for window in moving.at(step) if window.part) for step in range(8)}
    assert changes == set(range(24, 32))  # the place of the change moves with the windows, whose middle is at 6


@pytest.mark.parametrize("plan", PLANS)
def test_prompts_follow_each_other_in_every_step(plan):
    """In windows of every kind, with an image too: later windows never have an earlier prompt, and each of two halves is heard."""
    for step in STEPS:
        parts = [window.part for window in replace(plan, changes=(plan.total // 2,)).at(step)]
        assert parts == sorted(parts)
        assert plan.total < 2 * plan.length - plan.overlap or set(parts) == {0, 1}


@pytest.mark.parametrize(("variant", "sequential", "parts"), [("5b", False, [0, 1, 1]), ("1.5-5b", True, [0, 1])])
def test_each_window_is_predicted_with_its_prompt_alone(loaded, variant, sequential, parts):
    """The transformer gets the embeddings that a call with that prompt alone gives it, and the negative prompt in every window."""
    pipe = CogVideoXPipeline(**loaded(CogVideoXPipeline, variant).components)
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given["encoder_hidden_states"]), with_kwargs=True)
    options = {"num_frames": 33, "num_inference_steps": 1, "sequential_guidance": sequential, "negative_prompt": "blue"}
    call(pipe, prompt=STORY, context=STILL, **options)
    story, halves = list(seen), 2 if sequential else 1
    for text in STORY.values():
        call(pipe, prompt=text, **options | {"num_frames": 1})
    handle.remove()
    alone = [seen[len(story) + halves * number :][:halves] for number in range(2)]
    assert len(story) == len(parts) * halves
    for number, part in enumerate(parts):
        torch.testing.assert_close(story[halves * number :][:halves], alone[part], atol=1e-5, rtol=0)


def test_a_story_of_one_prompt_is_that_prompt(pipe):
    plain = call(pipe, num_frames=33, context=STILL, num_videos_per_prompt=2)
    same = dict.fromkeys(STORY, STORY[0])
    torch.testing.assert_close(call(pipe, prompt=same, num_frames=33, context=STILL, num_videos_per_prompt=2), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(call(pipe, prompt={0: STORY[0]}, num_frames=9), call(pipe, num_frames=9), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("prompt", "changes", "error", "message"),
    [
        (STORY, {"context": None}, ValueError, "2 prompts needs context windows, each"),
        (STORY, {"num_frames": 25, "context": ContextWindows(frames=25)}, ValueError, "shorter than its 25 frames .they have 25"),
        ({0: "a", 33: "b"}, {}, ValueError, "from frame 33 on begins after the end: the video has 33 frames, 0 to 32"),
        ({8: "a"}, {}, ValueError, "must begin with frame 0, and the first is that of 8"),
        ({}, {}, ValueError, "must begin with frame 0, and the first is that of none"),
        ({0: "a", -8: "b"}, {}, ValueError, "the first is that of -8"),
        ({0: "a", 0.5: "b"}, {}, TypeError, "prompts by frame are texts by whole numbers"),
        ({0: "a", 16: ["b"]}, {}, TypeError, "prompts by frame are texts by whole numbers"),
        ([STORY, STORY], {}, TypeError, "those of one call are of one video: make a call for each"),
        ({0: "a", 15: "b", 16: "c"}, {}, ValueError, "the prompt from frame 15 on holds too briefly"),
    ],
)
def test_impossible_stories(pipe, prompt, changes, error, message):
    with pytest.raises(error, match=message):
        call(pipe, prompt=prompt, **{"num_frames": 33, "context": STILL, **changes})


def test_a_story_is_not_encoded_apart_from_its_windows(pipe):
    with pytest.raises(TypeError, match="encode its texts as a list"):
        pipe.encode_prompt(STORY)


def test_a_continuation_takes_no_story(pipe):
    with pytest.raises(ValueError, match="go on from one prompt after the other"):
        CogVideoXContinuationPipeline(**pipe.components)(torch.rand(9, 3, 32, 48), STORY, context=WINDOWS)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (ContextWindows(frames=10), r"frames=10 are not possible: .*8k\+1 .* 9 or 17"),
        (ContextWindows(frames=17, overlap=6), r"overlap=6 of context windows is not possible: .*multiple of 8.* 0 or 8"),
        (ContextWindows(frames=17, overlap=-8), "overlap=-8 of context windows is not possible"),
        (ContextWindows(frames=17, overlap=24), "overlap=24 leaves nothing new in context windows of 17 frames"),
        (ContextWindows(frames=1), "overlap=8 leaves nothing new"),
    ],
)
def test_impossible_windows(pipe, context, message):
    with pytest.raises(ValueError, match=message):
        call(pipe, num_frames=33, context=context)


def test_unknown_schedules():
    with pytest.raises(ValueError, match="schedule='looped' is unknown: use one of uniform, static"):
        ContextWindows(frames=17, schedule="looped")


def test_an_image_needs_an_overlap():
    with pytest.raises(ValueError, match="Windows of 5 latent frames that share 0 cannot carry a video on from 1 frame"):
        ContextWindows(frames=17, overlap=0).over(33, V1, 1)


@pytest.mark.parametrize("frames", [9, 17, 25, 33, 49, 81, 161])
def test_the_default_overlap_is_legal(frames):
    shared = ContextWindows(frames=frames).shared_frames(V1)
    assert ContextWindows(frames=frames, overlap=shared).shared_frames(V1) == shared < frames


def test_feature_caches_are_refused(folders):
    pipe = CogVideoXPipeline.from_pretrained(folders())
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="would mix up the context windows"):
        call(pipe, num_frames=33, context=WINDOWS)
