"""Known pictures and masks reach the transformer as VideoX-Fun's sampling and training code show them to it."""

from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_cogvideox import CogVideoXFunInpaintPipeline, ContextWindows
from diffusers_cogvideox.models.layout import kept_latents
from diffusers_cogvideox.pipelines.fun_mask import load_mask
from parity import StockVAE
from pictures import clip, images, picture
from tiny_pipeline import call

SCALE = 0.7  # of the tiny VAE
HEIGHT, WIDTH = 32, 48
FIRST, LAST = picture(HEIGHT, WIDTH), picture(HEIGHT, WIDTH, seed=1)
VIDEO = clip(9, HEIGHT, WIDTH)
EVERYTHING, NOTHING = PIL.Image.new("L", (WIDTH, HEIGHT), "white"), PIL.Image.new("L", (WIDTH, HEIGHT), "black")
MASK = torch.zeros(9, HEIGHT, WIDTH, dtype=torch.bool)
MASK[2:, 8:24, 16:] = True


@pytest.fixture(params=["fun-inp", "fun-1.5-inp"])
def pipe(loaded, request) -> CogVideoXFunInpaintPipeline:
    return CogVideoXFunInpaintPipeline(**loaded(CogVideoXFunInpaintPipeline, request.param).components)


@pytest.fixture
def known(loaded) -> CogVideoXFunInpaintPipeline:
    """The pipeline of a model of the first generation."""
    return CogVideoXFunInpaintPipeline(**loaded(CogVideoXFunInpaintPipeline, "fun-inp").components)


def inpainted(pipe, **options) -> torch.Tensor:
    """Frames of a short call."""
    return call(pipe, **{"num_inference_steps": 1} | options)


def channels(pipe, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """What the transformer sees of the mask (B, f, 1, h, w) and of the masked video (B, f, C, h, w)."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, __, k: seen.append(k["hidden_states"]), with_kwargs=True)
    inpainted(pipe, output_type="latent", **options)
    hook.remove()
    unconditional, conditional = seen[0].chunk(2)
    torch.testing.assert_close(unconditional, conditional)  # both halves of the guidance see the same
    return conditional[:, :, 4:5], conditional[:, :, 5:]


def stock_latents(pipe, video: torch.Tensor) -> torch.Tensor:
    """Latents (1, f, C, h, w) of a video (F, 3, H, W) in [-1, 1], from diffusers' VAE with the same weights; held to whole patches."""
    vae = StockVAE.from_config(dict(pipe.vae.config)).eval()
    vae.load_state_dict(pipe.vae.state_dict())
    if pipe.transformer.config.patch_size_t == 2:
        video = torch.cat([video, video[-1:].expand(4, -1, -1, -1)])
    with torch.no_grad():
        return SCALE * vae.encode(video.transpose(0, 1)[None]).latent_dist.mode().transpose(1, 2)


def pixels(image: PIL.Image.Image) -> torch.Tensor:
    """(3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0) / 127.5 - 1


# --- channels ---------------------------------------------------------------------------------------------------------


def test_nothing_known_is_shown_as_zeros(pipe):
    for options in ({}, {"video": VIDEO, "mask_video": EVERYTHING}):
        mask, latents = channels(pipe, **options)
        assert not mask.any()
        assert not latents.any()


def test_the_first_frame(pipe):
    mask, latents = channels(pipe, image=FIRST)
    black = torch.full((9, 3, HEIGHT, WIDTH), -1.0)
    black[0] = pixels(FIRST)
    torch.testing.assert_close(latents, stock_latents(pipe, black))
    assert (mask[:, 0] == SCALE).all()
    assert not mask[:, 1:].any()


def test_the_last_frame_is_held_through_the_padding(pipe):
    """Of the last 4 frames the middle two count for the mask, so that one known frame does not show there."""
    mask, latents = channels(pipe, last_image=LAST)
    black = torch.full((9, 3, HEIGHT, WIDTH), -1.0)
    black[-1] = pixels(LAST)
    torch.testing.assert_close(latents, stock_latents(pipe, black))
    assert not mask[:, :3].any()
    assert (mask[:, 3:] == SCALE).all()  # of 1.5, the latent frame that fills the patch


def test_both_ends(pipe):
    mask, latents = channels(pipe, image=FIRST, last_image=LAST)
    between = torch.full((9, 3, HEIGHT, WIDTH), -1.0)
    between[0], between[-1] = pixels(FIRST), pixels(LAST)
    torch.testing.assert_close(latents, stock_latents(pipe, between))
    assert (mask[:, 0] == SCALE).all()
    assert not mask[:, 1:3].any()


def test_a_last_frame_that_the_mask_does_not_show_is_not_ignored(known):
    """It shows in the latents of the masked video, and decides what is made; three last frames are marked too."""
    pictures = [{"last_image": LAST}, {"last_image": PIL.Image.new("RGB", (WIDTH, HEIGHT), "white")}]
    (mask, first), (same, second) = (channels(known, **given) for given in pictures)
    assert torch.equal(mask, same) and not mask.any()
    assert (first[:, -1] - second[:, -1]).abs().max() > 0.02
    held = torch.ones(9, HEIGHT, WIDTH, dtype=torch.bool)
    held[-3:] = False
    mask, _ = channels(known, video=VIDEO, mask_video=held)
    assert (mask[:, -1] == SCALE).all() and not mask[:, :-1].any()
    videos = [inpainted(known, num_inference_steps=2, **given) for given in (*pictures, {})]
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise([*videos, videos[0]]))


def test_everything_known(pipe):
    mask, latents = channels(pipe, video=VIDEO, mask_video=NOTHING)
    assert (mask == SCALE).all()
    torch.testing.assert_close(latents, stock_latents(pipe, 2 * VIDEO - 1))


def test_a_masked_video(pipe):
    mask, latents = channels(pipe, video=VIDEO, mask_video=MASK)
    torch.testing.assert_close(latents, stock_latents(pipe, torch.where(MASK[:, None], -1.0, 2 * VIDEO - 1)))
    kept = torch.ones(1, 3, 1, 4, 6)
    kept[:, 1:, :, 1:3, 2:] = 0  # rows 8 to 23, columns from 16, at an eighth of the size; of frames 1 to 4 the middle ones are 2 and 3
    torch.testing.assert_close(mask[:, :3], SCALE * kept)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 16, 24), (17, 24, 16)])
def test_the_mask_at_the_latent_grid_by_brute_force(frames, height, width):
    """A latent of 4 x 8 x 8 pixels takes its middle 2 x 2 x 2, the first frame its middle 2 x 2."""
    mask = (torch.rand(2, 1, frames, height, width) > 0.5).float()
    found = kept_latents(mask, (frames + 3) // 4, height // 8, width // 8)
    for f in range((frames + 3) // 4):
        times = slice(0, 1) if f == 0 else slice(4 * f - 2, 4 * f)
        for y in range(height // 8):
            for x in range(width // 8):
                middle = mask[:, 0, times, 8 * y + 3 : 8 * y + 5, 8 * x + 3 : 8 * x + 5]
                torch.testing.assert_close(found[:, f, 0, y, x], 1 - middle.mean(dim=(1, 2, 3)))


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_whole_masks_are_text_to_video(pipe):
    expected = inpainted(pipe)
    assert expected.std() > 0.1
    torch.testing.assert_close(inpainted(pipe, video=VIDEO, mask_video=EVERYTHING), expected)
    assert (inpainted(pipe, image=FIRST) - expected).abs().max() > 1e-3


def test_lengths_that_do_not_fit_hold_the_last_frame(pipe):
    """7 frames are the first of 9 (13 in 1.5) whose last three are as the seventh."""
    held = torch.cat([VIDEO[:7], VIDEO[6:7].expand(2, -1, -1, -1)])
    masks = torch.cat([MASK[:7], MASK[6:7].expand(2, -1, -1)])
    found = inpainted(pipe, video=VIDEO[:7], mask_video=MASK[:7], num_frames=None)
    torch.testing.assert_close(found, inpainted(pipe, video=held, mask_video=masks)[:, :7])
    torch.testing.assert_close(inpainted(pipe, video=VIDEO, mask_video=MASK, num_frames=7), found)  # a longer video is cut


def test_one_picture_for_several_prompts_and_one_for_each(known):
    prompts, noise = ["a red circle", "a green square"], torch.randn(2, 3, 4, 4, 6)
    alone = [inpainted(known, prompt=p, image=i, latents=n[None]) for p, i, n in zip(prompts, (FIRST, LAST), noise, strict=True)]
    together = inpainted(known, prompt=prompts, image=[FIRST, LAST], latents=noise)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    alone[1] = inpainted(known, prompt=prompts[1], image=FIRST, latents=noise[1:])
    shared = inpainted(known, prompt=prompts, image=FIRST, latents=noise)
    torch.testing.assert_close(shared, torch.cat(alone), atol=1e-4, rtol=0)


def test_a_mask_for_each_prompt(known):
    masks = torch.stack([MASK, torch.ones_like(MASK)])[:, :, None]
    mask, latents = channels(known, prompt=["a", "b"], video=VIDEO, mask_video=masks)
    alone = channels(known, video=VIDEO, mask_video=MASK)
    torch.testing.assert_close((mask[:1], latents[:1]), alone)
    assert not mask[1].any() and not latents[1].any()


# --- noise on what is known -------------------------------------------------------------------------------------------


def test_noise_is_on_what_is_known_alone(known, monkeypatch):
    seen = []
    encode = known.vae.encode
    monkeypatch.setattr(known.vae, "encode", lambda x: seen.append(x) or encode(x))
    level = 0.25
    for noise in (0, level):
        inpainted(known, video=VIDEO, mask_video=MASK, image_noise=noise, output_type="latent")
    clean, noisy = seen
    difference = (noisy - clean)[0].transpose(0, 1)
    assert not difference[MASK[:, None].expand_as(difference)].any()
    assert (difference[~MASK[:, None].expand_as(difference)].std() / level - 1).abs() < 0.02


def test_noise_comes_from_the_generators(known):
    def videos(*seeds, **options):
        return inpainted(known, image=FIRST, generator=[torch.Generator().manual_seed(s) for s in seeds], image_noise=0.1, **options)

    pair = videos(1, 2, num_videos_per_prompt=2)
    torch.testing.assert_close(pair, torch.cat([videos(1), videos(2)]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("trained", "level"), [(True, 0.0563), (False, 0), (None, 0)])
def test_noise_by_default_as_the_config_says(folders, tmp_path, trained, level):
    """VideoX-Fun's configs carry a key that diffusers keeps, and does not know."""
    pipe = CogVideoXFunInpaintPipeline.from_pretrained(folders("fun-inp"))
    if trained is not None:
        pipe.transformer.register_to_config(add_noise_in_inpaint_model=trained)
        pipe.save_pretrained(tmp_path)
        pipe = CogVideoXFunInpaintPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(channels(pipe, image=FIRST)[1], channels(pipe, image=FIRST, image_noise=level)[1])
    assert bool((channels(pipe, image=FIRST)[1] != channels(pipe, image=FIRST, image_noise=0)[1]).any()) == bool(level)


# --- context windows --------------------------------------------------------------------------------------------------

LONG = {"num_frames": 41, "context": ContextWindows(frames=17, schedule="static"), "num_inference_steps": 1}


def windows(pipe, **options) -> list[torch.Tensor]:
    """What the transformer sees beside the latents, for each window of a long video."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, __, k: seen.append(k["hidden_states"][:, :, 4:]), with_kwargs=True)
    assert inpainted(pipe, guidance_scale=1, **LONG | options).shape[1] == 41
    hook.remove()
    assert len(seen) > 2
    return seen


def test_every_window_starts_with_the_known_picture(pipe):
    whole = channels(pipe, image=FIRST, num_frames=41)
    for window in windows(pipe, image=FIRST):
        torch.testing.assert_close(window[:, 0], torch.cat(whole, dim=2)[:, 0])


def test_every_window_sees_its_part_of_a_masked_video(known):
    video, mask = clip(41, HEIGHT, WIDTH), MASK[5].expand(41, -1, -1)
    whole = torch.cat(channels(known, video=video, mask_video=mask, num_frames=None), dim=2)
    places = LONG["context"].over(11, known.geometry).at(0)
    seen = windows(known, video=video, mask_video=mask, num_frames=None)
    torch.testing.assert_close(seen, [whole[:, place.frames] for place in places])


def test_windows_in_which_nothing_is_known(pipe):
    assert not any(window.any() for window in windows(pipe))  # as text to video was trained
    mask = torch.ones(41, HEIGHT, WIDTH)
    mask[20:] = 0
    for options in ({"last_image": LAST}, {"video": clip(41, HEIGHT, WIDTH), "mask_video": mask, "num_frames": None}):
        with pytest.raises(ValueError, match=r"Context windows would see parts .* give the first frame too"):
            inpainted(pipe, **LONG | options)
    within = LONG | {"last_image": LAST, "num_frames": 17}  # one window holds all of it
    assert inpainted(pipe, **within).shape[1] == 17


# --- masks in every form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        MASK,
        MASK.float(),
        MASK[:, None],
        MASK.numpy(),
        MASK.numpy()[..., None].repeat(3, -1).astype(np.uint8) * 255,
        images(MASK[:, None].expand(-1, 3, -1, -1).float()),
    ],
    ids=["bools", "floats", "one channel", "array", "bytes in colour", "images"],
)
def test_masks_of_every_form(source):
    torch.testing.assert_close(load_mask(source, HEIGHT, WIDTH, 9), MASK[None, None].float())


def test_a_single_picture_masks_all_frames(tmp_path):
    still = PIL.Image.fromarray(MASK[5].numpy().astype(np.uint8) * 255)
    still.save(tmp_path / "mask.png")
    for source in (still, tmp_path / "mask.png", str(tmp_path / "mask.png"), MASK[5], MASK[5].numpy()):
        torch.testing.assert_close(load_mask(source, HEIGHT, WIDTH, 9), MASK[5].expand(1, 1, 9, -1, -1).float())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"video": VIDEO}, "video and mask_video belong together"),
        ({"mask_video": MASK}, "video and mask_video belong together"),
        ({"video": VIDEO, "mask_video": MASK, "image": FIRST}, "take the place of image and last_image"),
        ({"video": VIDEO, "mask_video": MASK[:5]}, "mask_video has 5 frames for a video of 9"),
        ({"video": VIDEO, "mask_video": MASK, "num_frames": 17}, "num_frames=17 is more than the 9 frames of the video"),
        ({"image": FIRST, "last_image": LAST, "num_frames": 1}, "num_frames=1 has no place for both"),
        ({"image": [FIRST, LAST], "prompt": ["a", "b", "c"]}, "2 were passed for 3 prompt"),
        ({"image": [FIRST, LAST, FIRST], "last_image": [FIRST, LAST]}, "3 and 2 were passed"),
        ({"image": FIRST, "image_noise": -0.1}, "image_noise=-0.1"),
        ({"image_noise": 0.1}, "image_noise=0.1 has no effect where nothing is kept"),
        ({"fit": "cover"}, "fit='cover' has no effect without a picture or a video"),
        ({"image": FIRST, "num_frames": -1}, "num_frames=-1"),
        ({"image": FIRST, "width": 0}, "32x0 .* is not possible"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_arguments(known, options, message):
    with pytest.raises(ValueError, match=message):
        inpainted(known, **{"num_frames": None} | options)


def test_only_what_is_known_needs_the_vae(known):
    without = CogVideoXFunInpaintPipeline(**known.components | {"vae": None})
    torch.testing.assert_close(inpainted(without, output_type="latent"), inpainted(known, output_type="latent"))
    with pytest.raises(ValueError, match="no vae: load it with one"):
        inpainted(without, image=FIRST, output_type="latent")


def test_models_of_other_tasks(loaded):
    other = CogVideoXFunInpaintPipeline(**loaded(CogVideoXFunInpaintPipeline, "5b").components)
    with pytest.raises(ValueError, match=r"not an inpainting model\. Use CogVideoXPipeline"):
        inpainted(other, image=FIRST)
