"""Pictures and videos in every form give the pixels that diffusers' video processor gives, or a clear error."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.video_processor import VideoProcessor

from diffusers_cogvideox.pipelines.inputs import load_image, load_video
from diffusers_cogvideox.video_io import read_video, write_video
from pictures import clip, images, picture

SIZE = 32, 48
PROCESSOR = VideoProcessor(vae_scale_factor=8, vae_latent_channels=0)
FRAME, OTHER = clip(1, 40, 56)[0], clip(1, 40, 56, seed=1)[0]
CLIP, OTHER_CLIP = clip(3, 40, 56), clip(3, 40, 56, seed=1)


def array(tensor: torch.Tensor) -> np.ndarray:
    """Channels last, as diffusers wants arrays."""
    return tensor.movedim(-3, -1).numpy()


@pytest.mark.parametrize("size", [SIZE, (40, 56)], ids=["resized", "as it is"])
@pytest.mark.parametrize(
    "source",
    [
        images(FRAME[None])[0],
        images(torch.stack([FRAME, OTHER])),
        array(FRAME),
        array(torch.stack([FRAME, OTHER])),
        [array(FRAME), array(OTHER)],
        FRAME,
        torch.stack([FRAME, OTHER]),
        [FRAME, OTHER],
    ],
    ids=["PIL", "PILs", "array", "arrays", "list of arrays", "tensor", "tensors", "list of tensors"],
)
def test_images_are_those_of_diffusers(source, size):
    expected = PROCESSOR.preprocess(source, *size)
    found = load_image(source, *size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "source",
    [
        images(CLIP),
        [images(CLIP), images(OTHER_CLIP)],
        array(CLIP),
        array(torch.stack([CLIP, OTHER_CLIP])),
        [array(CLIP), array(OTHER_CLIP)],
        list(array(CLIP)),
        CLIP,
        torch.stack([CLIP, OTHER_CLIP]),
        [CLIP, OTHER_CLIP],
        list(CLIP),
    ],
    ids=["PILs", "lists of PILs", "array", "5D array", "arrays", "list of frames", "tensor", "5D tensor", "tensors", "tensor frames"],
)
def test_videos_are_those_of_diffusers(source):
    found = load_video(source, *SIZE)
    assert found.shape[1:] == (3, 3, *SIZE)
    torch.testing.assert_close(found, PROCESSOR.preprocess_video(source, *SIZE), atol=1e-6, rtol=0)


def test_bytes_are_pictures_too():
    """Diffusers takes bytes in arrays for values up to 255."""
    expected = load_image(images(FRAME[None])[0], *SIZE)
    data = (FRAME * 255).round().byte()
    for source in (data, array(data), torch.stack([data])):
        torch.testing.assert_close(load_image(source, *SIZE), expected)
    torch.testing.assert_close(load_video(array((CLIP * 255).round().byte()), *SIZE), load_video(images(CLIP), *SIZE))


def test_half_precision_and_gradients_do_not_matter():
    found = load_image(FRAME.bfloat16().requires_grad_(), 40, 56)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found[0], 2 * FRAME - 1, atol=0.01, rtol=0)


# --- files ------------------------------------------------------------------------------------------------------------


def test_an_image_file_is_turned_upright(tmp_path: Path):
    image = picture(40, 56)
    image.save(tmp_path / "plain.png")
    torch.testing.assert_close(load_image(tmp_path / "plain.png", 40, 56), load_image(image, 40, 56))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    image.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    torch.testing.assert_close(load_image([str(tmp_path / "turned.png")], 40, 56), load_image(image, 40, 56))


def test_grey_and_transparent_images():
    grey = load_image(picture(40, 56).convert("L"), 40, 56)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    image = picture(40, 56).convert("RGBA")
    torch.testing.assert_close(load_image(image, 40, 56), load_image(picture(40, 56), 40, 56))
    image.putalpha(PIL.Image.fromarray(np.repeat([[0] * 28 + [255] * 28], 40, axis=0).astype(np.uint8)))
    found = load_image(image, 40, 56)
    assert (found[..., :28] == -1).all()
    torch.testing.assert_close(found[..., 28:], load_image(picture(40, 56), 40, 56)[..., 28:])


def test_video_files(tmp_path: Path):
    paths = [write_video(tmp_path / f"{name}.mp4", array((video * 255).byte()), 8) for name, video in (("a", CLIP), ("b", OTHER_CLIP))]
    frames = torch.from_numpy(read_video(paths[0])[0])
    expected = 2 * frames.movedim(-1, 0)[None].float() / 255 - 1
    torch.testing.assert_close(load_video(paths[0], 40, 56), expected)
    both = load_video([str(path) for path in paths], 40, 56)
    torch.testing.assert_close(both[:1], expected)
    torch.testing.assert_close(both[1:], load_video(paths[1], 40, 56))


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda x: x, lambda x: images(x[None])[0]], ids=["tensor", "PIL"])
def test_cover_cuts_the_middle_and_contain_pads_with_black(form):
    wide = clip(1, 20, 60)[0]
    torch.testing.assert_close(load_image(form(wide), 20, 20, "cover"), 2 * wide[None, :, :, 20:40] - 1, atol=1e-6, rtol=0)
    torch.testing.assert_close(load_image(form(wide), 20, 59, "cover"), 2 * wide[None, :, :, 1:60] - 1, atol=1e-6, rtol=0)
    contained = load_image(form(wide), 60, 60, "contain")
    torch.testing.assert_close(contained[:, :, 20:40], 2 * wide[None] - 1, atol=1e-6, rtol=0)
    assert (contained[:, :, :20] == -1).all()
    assert (contained[:, :, 40:] == -1).all()


@pytest.mark.parametrize("fit", ["cover", "contain"])
@pytest.mark.parametrize("size", [(90, 160), (160, 90), (33, 200), (7, 7)])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: images(x[None])[0]], ids=["tensor", "PIL"])
def test_the_aspect_ratio_is_kept(fit, size, form):
    """On a picture of coordinates the steps from pixel to pixel are those of one scale in both directions."""
    height, width = size
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    found = (load_image(form(torch.stack([rows, columns, torch.ones(size)])), 96, 128, fit)[0] + 1) / 2
    beyond = max if fit == "cover" else min
    scale = beyond(96 / height, 128 / width)
    half = [min(8, int(scale * n / 4)) for n in size]
    inside = found[:, 48 - half[0] : 48 + half[0], 64 - half[1] : 64 + half[1]]
    steps = inside[0].diff(dim=0).mean() * (height - 1), inside[1].diff(dim=1).mean() * (width - 1)
    tolerance = 0.1 / scale  # bytes are coarse, and the scaled size is rounded to whole pixels
    assert abs(steps[0] - 1 / scale) < tolerance
    assert abs(steps[1] - 1 / scale) < tolerance
    filled = (found[2] > 0.5).float()
    wanted = 1.0 if fit == "cover" else scale**2 * height * width / (96 * 128)
    assert abs(filled.mean().item() - wanted) < 0.02


def test_what_happens_to_a_picture_is_said_once(reported):
    load_video(images(CLIP), *SIZE)
    load_image([picture(60, 60)] * 2, *SIZE, "cover")
    load_image(picture(60, 60), *SIZE, "contain")
    load_image(picture(*SIZE), *SIZE)
    assert [record.levelname for record in reported.records] == ["WARNING", "INFO", "INFO"]
    stretched, cropped, padded = (record.getMessage() for record in reported.records)
    assert "40x56 (height x width) is scaled to 32x48: its content is distorted. Pass fit='cover'" in stretched
    assert "60x60 (height x width) is scaled to 48x48 and cropped to 32x48." in cropped
    assert "60x60 (height x width) is scaled to 32x32 and padded with black to 32x48." in padded


def test_a_small_change_of_shape_is_no_distortion(reported):
    load_image(picture(64, 97), *SIZE)
    assert [record.levelname for record in reported.records] == ["INFO"]


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.png", FileNotFoundError, "no image file nowhere.png"),
        (__file__, ValueError, "test_inputs.py is not an image"),
        ([], ValueError, "nothing to start from"),
        (torch.zeros(0, 3, 8, 8), ValueError, "nothing to start from"),
        (None, TypeError, "not NoneType"),
        (7, TypeError, "not int"),
        (torch.full((3, 8, 8), torch.nan), ValueError, "NaN"),
        (2 * FRAME - 1, ValueError, r"values from -.* must lie in \[0, 1\].*\(x \+ 1\) / 2"),
        (FRAME * 255, ValueError, "Divide bytes by 255"),
        ((FRAME * 255).long(), ValueError, "torch.int64"),
        (FRAME[0], ValueError, r"\(40, 56\).*\(3, height, width\)"),
        (FRAME.movedim(0, -1), ValueError, r"\(40, 56, 3\).*\(3, height, width\)"),
        (FRAME.numpy(), ValueError, r"\(3, 40, 56\).*\(height, width, 3\)"),
        (torch.zeros(1, 1, 3, 8, 8), ValueError, "shape"),
        ([torch.zeros(1, 3, 8, 8)], ValueError, "shape"),
        (PIL.Image.new("I;16", (8, 8)), ValueError, "more than 8 bits"),
    ],
)
def test_what_is_no_image(source, error, message):
    with pytest.raises(error, match=message):
        load_image(source, *SIZE)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere.mp4", FileNotFoundError, "no video file nowhere.mp4"),
        (__file__, ValueError, "test_inputs.py is not a video"),
        ([], ValueError, "nothing to start from"),
        ([[]], ValueError, "nothing to start from"),
        (None, TypeError, "A video must be a path.*not NoneType"),
        (picture(8, 8), TypeError, "A video must be a path"),
        (FRAME, ValueError, r"\(3, 40, 56\).*\(frames, 3, height, width\)"),
        ([CLIP, CLIP[:2]], ValueError, r"\[3, 2\] frames"),
        ([CLIP[None]], ValueError, "shape"),
        ([FRAME, None], TypeError, "not NoneType"),
    ],
)
def test_what_is_no_video(source, error, message):
    with pytest.raises(error, match=message):
        load_video(source, *SIZE)


def test_a_damaged_image_file(tmp_path: Path):
    picture(64, 64).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half.png is not an image, or is damaged"):
        load_image(tmp_path / "half.png", *SIZE)


def test_an_unknown_fit():
    with pytest.raises(ValueError, match="fit='crop' is unknown: use one of cover, contain, stretch"):
        load_image(FRAME, *SIZE, "crop")
