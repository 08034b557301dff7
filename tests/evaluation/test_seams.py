"""The seam metric: 1 on smooth clips, large where clips are cut together, whatever the range of values."""

import numpy as np
import pytest

from diffusers_cogvideox.data.moving_shapes import Scene, all_scenes, render
from diffusers_cogvideox.evaluation.seams import frame_changes, seam_ratio, seam_ratios, worst_ratio

MOVING = next(scene for scene in all_scenes(1) if scene.shapes[0].motion == "moves right")


def drifting(frames: int = 20, step: float = 1.0) -> np.ndarray:
    """A gradient that gets brighter by `step` in every frame."""
    rows = np.linspace(0, 1, 6)[None, :, None, None]
    return np.broadcast_to(rows + step * np.arange(frames)[:, None, None, None], (frames, 6, 5, 3)).astype(np.float32)


def clip(seed: int, scene: Scene = MOVING) -> np.ndarray:
    return render(scene, np.random.default_rng(seed))


def test_changes_are_root_mean_squares():
    video = np.zeros((3, 2, 2, 3))
    video[1, 0, 0, 0] = 6
    np.testing.assert_allclose(frame_changes(video), [3**0.5, 3**0.5])  # sqrt(36 / 12)
    np.testing.assert_allclose(frame_changes(drifting(step=0.25)), 0.25, rtol=1e-6)


@pytest.mark.parametrize("seam", [1, 7, 19])
def test_even_motion_has_no_seam_anywhere(seam):
    assert seam_ratio(drifting(), seam) == pytest.approx(1)
    assert worst_ratio(drifting()) == pytest.approx(1)


def test_a_jump_is_measured_in_usual_changes():
    video = drifting()
    video[8:] += 4  # the change into frame 8 is now 5
    assert seam_ratios(video, [8]) == pytest.approx([5])
    assert seam_ratios(video, [5, 12]) == pytest.approx([1, 1])  # the median does not see the jump nearby
    assert worst_ratio(video) == pytest.approx(5)


def test_neighbouring_seams_do_not_hide_each_other():
    video = drifting()
    for seam in (6, 7, 8, 9):
        video[seam:] += 4
    assert seam_ratios(video, [6, 7, 8, 9], reach=3) == pytest.approx([5] * 4)


def test_bytes_and_floats_agree():
    video = (drifting(step=8) * 4).astype(np.uint8)
    video[10:] = 255 - video[10:]
    assert seam_ratio(video, 10) == pytest.approx(seam_ratio(video / 255, 10))


def test_stills():
    still = np.zeros((9, 4, 4, 3))
    assert seam_ratio(still, 4) == 1
    still[4:] = 1
    assert seam_ratio(still, 4) == float("inf")


def test_moving_shapes_have_no_seam_and_cut_ones_do():
    whole, other = clip(1), clip(2, next(scene for scene in all_scenes(1) if scene.background != MOVING.background))
    assert worst_ratio(whole) < 1.5
    cut = np.concatenate([whole, other])
    assert seam_ratio(cut, len(whole)) > 5


@pytest.mark.parametrize("seam", [0, 20, -1])
def test_a_seam_lies_inside(seam):
    with pytest.raises(ValueError, match=rf"seams \[{seam}\] are not in a video of 20 frames"):
        seam_ratios(drifting(), [3, seam])


def test_something_must_be_around():
    with pytest.raises(ValueError, match="no change around frame 1"):
        seam_ratio(drifting(2), 1)
