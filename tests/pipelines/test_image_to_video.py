"""Image to video: the same video as diffusers, for every number of prompts, images and videos, and what the options do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from diffusers_cogvideox import CogVideoXImageToVideoPipeline, CogVideoXPipeline, CogVideoXVideoToVideoPipeline
from diffusers_cogvideox.pipelines.inputs import load_image
from diffusers_cogvideox.video_io import read_video
from parity import StockImageToVideoPipeline, narrow
from pictures import picture
from tiny_pipeline import call

STEPS = 4  # divides 1000: on other grids diffusers' own schedulers miss the timesteps
NATIVE = {"height": 64, "width": 96, "num_inference_steps": STEPS}  # the only size that diffusers can make with a learned table
VARIANTS = ["5b-i2v", "1.5-5b-i2v"]


@pytest.fixture
def make(loaded) -> Callable[..., Any]:
    """make(class, variant, sampler): a new pipeline over shared models, with the VAE config of the released variant."""

    def pipeline(cls: type, variant: str = "5b-i2v", sampler: str = "ddim") -> Any:
        parts = loaded(cls, variant, sampler).components
        vae = type(parts["vae"]).from_config(parts["vae"].config, invert_scale_latents=variant.startswith("1.5"))
        vae.load_state_dict(parts["vae"].state_dict())
        return cls(**{**parts, "vae": vae})

    return pipeline


@pytest.fixture
def pipe(make) -> CogVideoXImageToVideoPipeline:
    return make(CogVideoXImageToVideoPipeline)


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def latents(pipe: Any, **options: Any) -> torch.Tensor:
    return call(pipe, **{"output_type": "latent", "image": picture(32, 48), "num_inference_steps": 2, **options})


@contextmanager
def inputs_of(pipe: Any) -> Iterator[list[dict[str, Any]]]:
    """A list that grows by the transformer's arguments at every call."""
    seen: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def extra_channels(pipe: Any, **options: Any) -> torch.Tensor:
    """What the transformer sees beside the latents, (B, F, C, H, W), in a call without guidance."""
    with inputs_of(pipe) as seen:
        latents(pipe, guidance_scale=1, **options)
    torch.testing.assert_close(seen[0]["hidden_states"][:, :, 4:], seen[-1]["hidden_states"][:, :, 4:])
    return seen[0]["hidden_states"][:, :, 4:]


# --- as diffusers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_video_from_the_same_seed(make, variant: str, sampler: str):
    ours, stock = make(CogVideoXImageToVideoPipeline, variant, sampler), make(StockImageToVideoPipeline, variant, sampler)
    for options in (
        {"image": picture(70, 90)},
        {
            "image": [picture(64, 96, seed) for seed in (1, 2)],
            "prompt": ["a red circle", "blue"],
            "generator": (1, 2),
            "guidance_scale": 1.0,
        },
    ):
        numbers = options.pop("generator", None)
        runs = [call(p, **NATIVE, **options, **({"generator": seeds(*numbers)} if numbers else {})) for p in (ours, stock)]
        assert runs[1].std() > 0.1
        torch.testing.assert_close(*runs, atol=1e-3, rtol=0)


def test_same_video_at_other_lengths_and_sizes(make):
    """Only for 1.5, which has no learned table."""
    ours, stock = (make(cls, "1.5-5b-i2v") for cls in (CogVideoXImageToVideoPipeline, StockImageToVideoPipeline))
    for size in ({"num_frames": 17, "height": 48, "width": 32}, {"num_frames": 1, "height": 32, "width": 48}):
        runs = [call(p, image=picture(50, 40), num_inference_steps=STEPS, **size) for p in (ours, stock)]
        torch.testing.assert_close(*runs, atol=1e-3, rtol=0)


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_video_of_a_batch_is_what_it_would_be_alone(make, variant: str):
    pipe, prompts, pictures = (
        make(CogVideoXImageToVideoPipeline, variant),
        ["a red circle", "a green square"],
        [picture(32, 48), picture(32, 48, 1)],
    )
    for images in (pictures, pictures[0]):
        together = latents(pipe, prompt=prompts, image=images, num_videos_per_prompt=2, generator=seeds(1, 2, 3, 4))
        assert len(together) == 4
        for position in range(4):
            image = images[position // 2] if isinstance(images, list) else images
            alone = latents(pipe, prompt=prompts[position // 2], image=image, generator=seeds(position + 1))
            torch.testing.assert_close(together[position], alone[0], atol=1e-4, rtol=0)


def test_one_generator_and_one_image_for_several_prompts(pipe):
    extra = extra_channels(pipe, prompt=["a red circle", "blue"], num_videos_per_prompt=2)
    assert extra.shape == (4, 3, 4, 4, 6)
    torch.testing.assert_close(extra, extra[:1].expand_as(extra))


def test_videos_of_one_prompt_share_its_image(pipe):
    extra = extra_channels(pipe, prompt=["a red circle", "blue"], image=[picture(32, 48), picture(32, 48, 1)], num_videos_per_prompt=2)
    torch.testing.assert_close(extra[0], extra[1])
    torch.testing.assert_close(extra[2], extra[3])
    assert not torch.allclose(extra[0], extra[2], atol=0.1)


# --- the condition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scaling", "factor"), [("stock", None), ("scaled", 0.7), ("raw", 1.0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_three_conventions_for_the_scale_of_the_image(make, variant: str, scaling: str, factor: float | None):
    pipe, seed = make(CogVideoXImageToVideoPipeline, variant), 3
    extra = extra_channels(pipe, image=picture(32, 48), image_latent_scaling=scaling, generator=seeds(seed)[0])
    with torch.no_grad():
        posterior = pipe.vae.encode(load_image(picture(32, 48), 32, 48).unsqueeze(2)).latent_dist
    first = posterior.sample(seeds(seed)[0])[:, :, 0]
    if factor is None:
        factor = 1 / 0.7 if variant.startswith("1.5") else 0.7
    torch.testing.assert_close(extra[:, 0], factor * first)
    assert (extra[:, 1:] == 0).all()
    assert extra.shape[1] == (4 if variant.startswith("1.5") else 3)  # with the padding frame of 1.5, where the image stands


def test_ofs_goes_to_models_that_have_it(make):
    for variant, expected in (("1.5-5b-i2v", 2.0), ("5b-i2v", None)):
        pipe = make(CogVideoXImageToVideoPipeline, variant)
        with inputs_of(pipe) as seen:
            latents(pipe)
        found = seen[0].get("ofs")
        assert (None if found is None else found.item()) == expected


def test_noise_on_the_image(pipe):
    """The noise is drawn before the posterior's, and added to the pixels."""
    noisy = extra_channels(pipe, image_noise=0.5, generator=seeds(3)[0])
    generator, pixels = seeds(3)[0], load_image(picture(32, 48), 32, 48).unsqueeze(2)
    pixels = pixels + 0.5 * torch.randn(pixels.shape, generator=generator)
    with torch.no_grad():
        expected = 0.7 * pipe.vae.encode(pixels).latent_dist.sample(generator)[:, :, 0]
    torch.testing.assert_close(noisy[:, 0], expected)
    torch.testing.assert_close(extra_channels(pipe, image_noise=0.0), extra_channels(pipe))


def test_fit_reaches_the_image(pipe):
    narrow = picture(32, 96)
    middle = narrow.crop((24, 0, 72, 32))
    torch.testing.assert_close(extra_channels(pipe, image=narrow, fit="cover"), extra_channels(pipe, image=middle))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(5, 32, 48), (6, 40, 50), (17, 96, 64)])
def test_any_length_and_size_comes_out_exactly(make, variant: str, size: tuple[int, int, int]):
    frames, height, width = size
    video = call(make(CogVideoXImageToVideoPipeline, variant), image=picture(height, width), num_frames=frames, height=height, width=width)
    assert video.shape == (1, frames, 3, height, width)
    assert video.isfinite().all()


# --- with the other pipelines -----------------------------------------------------------------------------------------


def test_components_move_between_the_pipelines(pipe):
    plain = CogVideoXPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match=r"not a text-to-video model. Use CogVideoXImageToVideoPipeline"):
        call(plain)
    with pytest.raises(ValueError, match="not a text-to-video model"):
        CogVideoXVideoToVideoPipeline.from_pipe(pipe)(video=[picture(32, 48)] * 9, prompt="a")
    torch.testing.assert_close(latents(CogVideoXImageToVideoPipeline.from_pipe(plain)), latents(pipe))


def test_a_saved_pipeline_is_loaded_by_diffusers(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    options = {**NATIVE, "image": picture(64, 96)}
    ours, theirs = (cls.from_pretrained(tmp_path) for cls in (CogVideoXImageToVideoPipeline, StockImageToVideoPipeline))
    torch.testing.assert_close(call(ours, **options), call(theirs, **options), atol=1e-3, rtol=0)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": [picture(32, 48)] * 2}, r"image: 2 were passed for 1 prompt\(s\).*repeat the prompt"),
        ({"image": [picture(32, 48)] * 3, "prompt": ["a", "b"]}, r"image: 3 were passed for 2 prompt\(s\)"),
        ({"image": []}, "nothing to start from"),
        ({"image_noise": -0.1}, "image_noise=-0.1 is not possible"),
        ({"image_noise": float("nan")}, "image_noise=nan is not possible"),
        ({"image_latent_scaling": "sat"}, "'sat' is unknown: use one of stock, scaled, raw"),
        ({"fit": "crop"}, "fit='crop' is unknown"),
        ({"height": 8}, "size 8x48"),
        ({"height": 10**6, "image": picture(32, 48)}, "size 1000000x48"),
    ],
)
def test_impossible_arguments(pipe, options, message: str):
    with inputs_of(pipe) as seen, pytest.raises(ValueError, match=message):
        latents(pipe, **options)
    assert not seen


def test_a_text_to_video_model_is_refused(loaded):
    pipe = CogVideoXImageToVideoPipeline.from_pipe(loaded(CogVideoXPipeline))
    with pytest.raises(ValueError, match=r"reads 4 channels, none more .* not an image-to-video model. Use CogVideoXPipeline or"):
        latents(pipe)


def test_an_image_needs_the_vae(pipe):
    with pytest.raises(ValueError, match=r"no vae: load it with one\."):
        latents(CogVideoXImageToVideoPipeline(**{**pipe.components, "vae": None}))


# --- real pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["horse", "kitten"])
def test_a_real_picture_at_full_size(pipe, reference, name: str):
    first = read_video(reference / "videos" / f"{name}.mp4")[0][0]
    pipe.vae = narrow(pipe.vae)
    found = latents(pipe, image=first, height=480, width=720, guidance_scale=1)  # decoding that size is tested with video to video
    assert found.shape == (1, 3, 4, 60, 90)
    assert found.isfinite().all()
