"""docs/differences.md, row by row: diffusers does what the page says of it, and we do not."""

import inspect
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LayerSkipConfig, TaylorSeerCacheConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from diffusers_cogvideox import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.presets import PRESETS
from parity import TINY_VAE, StockDDIMScheduler, StockDPMScheduler, StockPipeline, StockTransformer, StockVAE, twins
from tiny_pipeline import call, save_stock_folder
from transformer_cases import inputs, tiny_twins

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "differences.md").read_text(encoding="utf-8")
# Rows whose comparison stands with the other tests of its subject.
ELSEWHERE = {
    "Overlap of 0": "models/test_tiling.py::test_an_overlap_of_zero_is_honoured",
    "Last tile inside the one before": "models/test_tiling.py::test_no_tile_is_decoded_twice",
    "`use_quant_conv`, `use_post_quant_conv`": "models/test_autoencoder.py::test_quant_convolutions_work",
    "Numbers of steps that do not divide 1000 (7, 28, 30, 33, ...)": "schedulers/test_scheduler.py::test_stock_is_wrong_there",
    "`eta`": "schedulers/test_scheduler.py::test_eta_changes_the_video_here_and_not_in_stock",
    "Half precision": "schedulers/test_scheduler.py::test_half_precision_is_not_worse_than_stock",
    "History of DPM-Solver++": "schedulers/test_scheduler.py::test_dpm_equals_stock_at_every_step_from_the_same_seed",
    "Dynamic guidance": "pipelines/test_parity.py::test_same_video_from_the_same_seed",
    "Unconditional half": "pipelines/test_parity.py::test_same_video_from_the_same_seed",
    "Saved folders": "pipelines/test_folders.py::test_what_we_save_diffusers_loads",
}
HERE: set[str] = set()


def row(subject: str) -> Callable[[Callable], Callable]:
    """Marks the test of one row of the page."""
    HERE.add(subject)
    return lambda test: test


def forward(model, kwargs):
    with torch.no_grad():
        return model(**kwargs)[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    return cache(lambda variant: save_stock_folder(tmp_path_factory.mktemp("stock"), variant))


@pytest.fixture
def pipes(folders) -> Callable[..., tuple]:
    """pipes(variant="5b"): our pipeline and stock's over one folder."""
    return lambda variant="5b": tuple(cls.from_pretrained(folders(variant)) for cls in (CogVideoXPipeline, StockPipeline))


def test_every_row_has_a_test():
    subjects = re.findall(r"^\| (?!subject|---)(.+?) \|", PAGE, re.MULTILINE)
    assert sorted(subjects) == sorted(HERE | ELSEWHERE.keys())
    for place in ELSEWHERE.values():
        file, test = place.split("::")
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8")


# --- VAE --------------------------------------------------------------------------------------------------------------


class Resize(torch.nn.Module):
    """Stands in for stock's decoder, at full size in no time."""

    def forward(self, z, *_, **__):
        return torch.nn.functional.interpolate(z[:, :3, 0], scale_factor=8).unsqueeze(2), None


@row("Tile sizes of `enable_tiling`")
@pytest.mark.parametrize(("tile", "size"), [((240, 360), (480, 720)), ((240, 240), (480, 720)), ((256, 256), (492, 735))])
def test_tile_sizes(tile, size):
    stock = StockVAE(**TINY_VAE)
    stock.decoder = Resize()
    stock.enable_tiling(*tile)
    assert stock.decode(torch.zeros(1, 4, 1, 60, 90)).sample.shape[-2:] == size


def test_tiles_that_stock_cannot_encode():
    ours, stock = AutoencoderKLCogVideoX(**TINY_VAE), StockVAE(**TINY_VAE)
    for vae in (ours, stock):
        vae.enable_tiling(64, 64)
    video = torch.zeros(1, 3, 1, 56, 72)
    assert ours.encode(video).latent_dist.mean.shape[-2:] == (7, 9)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        stock.encode(video)


@row("Block types in the config")
def test_block_types():
    three = TINY_VAE | {"down_block_types": ("CogVideoXDownBlock3D",) * 3}
    assert len(StockVAE(**three).encoder.down_blocks) == 3
    with pytest.raises(ValueError, match="once for each"):
        AutoencoderKLCogVideoX(**three)


@row("`shift_factor`, `latents_mean`, `latents_std`")
def test_options_of_the_latents():
    options = {"shift_factor": 0.5, "latents_mean": (1.0,) * 4, "latents_std": (2.0,) * 4}
    _, stock = twins(AutoencoderKLCogVideoX, StockVAE, TINY_VAE)
    told = StockVAE(**TINY_VAE | options).eval()
    told.load_state_dict(stock.state_dict())
    video = torch.randn(1, 3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(told.encode(video).latent_dist.mean, stock.encode(video).latent_dist.mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"shift_factor=0\.5 would have no effect"):
        AutoencoderKLCogVideoX(**TINY_VAE | options)


@row("Height or width not a multiple of 8")
def test_sizes_that_do_not_fit():
    video = torch.zeros(1, 3, 1, 16, 20)
    assert StockVAE(**TINY_VAE).encode(video).latent_dist.mean.shape[-2:] == (2, 2)
    with pytest.raises(ValueError, match="multiples of 8, got 16x20"):
        AutoencoderKLCogVideoX(**TINY_VAE).encode(video)


@row("Large single images")
def test_large_images():
    """On the meta device: shapes are computed, values are not."""
    with torch.device("meta"):
        ours, stock = (cls(**PRESETS["2b"].vae) for cls in (AutoencoderKLCogVideoX, StockVAE))
        small, large = torch.zeros(1, 3, 1, 1664, 1664), torch.zeros(1, 3, 1, 1680, 1680)
        assert stock.encode(small).latent_dist.mean.shape[-2:] == (208, 208)
        assert ours.encode(large).latent_dist.mean.shape[-2:] == (210, 210)
        with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
            stock.encode(large)


@row("Chunk sizes")
def test_chunk_sizes():
    ours, stock = twins(AutoencoderKLCogVideoX, StockVAE, TINY_VAE)
    x, z = torch.randn(1, 3, 17, 16, 16), torch.randn(1, 4, 7, 2, 2)
    with torch.no_grad():
        usual = ours.encode(x).latent_dist.mean, ours.decode(z).sample
        for vae in (ours, stock):
            vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = 4, 4
        mine, theirs = ((vae.encode(x).latent_dist.mean, vae.decode(z).sample) for vae in (ours, stock))
        for other, expected, before in zip(mine, theirs, usual, strict=True):
            torch.testing.assert_close(other, expected, rtol=0, atol=2e-5)
            assert (other - before).abs().max() > 1e-2
        for vae in (ours, stock):
            vae.num_sample_frames_batch_size, vae.num_latent_frames_batch_size = 6, 1
        assert stock.decode(z).sample.shape[2] == 7  # not 25
        with pytest.raises(ValueError, match=r"num_latent_frames_batch_size=1 .* multiple of 2"):
            ours.decode(z)
        with pytest.raises(ValueError, match=r"num_sample_frames_batch_size=6 .* multiple of 4"):
            ours.encode(x)


# --- transformer ------------------------------------------------------------------------------------------------------


@row("`set_attention_backend`")
def test_attention_backends(monkeypatch):
    calls = []
    native = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.NATIVE)
    monkeypatch.setitem(
        _AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, lambda *a, **k: calls.append(1) or native(*a, **k)
    )
    ours, stock = tiny_twins("5b")
    stock.set_attention_backend("_native_math")
    assert _AttentionBackendRegistry._active_backend is AttentionBackendName._NATIVE_MATH
    forward(stock, inputs(stock))
    assert not calls
    ours.set_attention_backend("_native_math")
    forward(ours, inputs(ours))
    assert len(calls) == 2


@row("`compile_repeated_blocks`")
def test_repeated_blocks():
    ours, stock = tiny_twins("5b")
    with pytest.raises(ValueError, match="_repeated_blocks"):
        stock.compile_repeated_blocks(backend="eager")
    ours.compile_repeated_blocks(backend="eager")


@row("`fuse_qkv_projections`")
def test_fused_projections():
    ours, stock = tiny_twins("5b")
    separate = stock.num_parameters()
    for model in (ours, stock):
        model.fuse_qkv_projections()
    assert ours.num_parameters() == separate < stock.num_parameters()
    kwargs = inputs(stock)
    torch.testing.assert_close(forward(ours, kwargs), forward(stock, kwargs), rtol=0, atol=2e-5)


@row("Skipping attention with `LayerSkipConfig`")
def test_skipped_attention():
    config = LayerSkipConfig([0], fqn="transformer_blocks", skip_attention=True, skip_ff=False)
    ours, stock = tiny_twins("5b")
    with pytest.raises(ValueError, match="not registered"):
        apply_layer_skip(stock, config)
        forward(stock, inputs(stock))
    apply_layer_skip(ours, config)
    assert forward(ours, inputs(ours)).isfinite().all()


@row("Feature caches that match no layer")
def test_caches_that_match_nothing():
    ours, stock = tiny_twins("5b")
    kwargs, calls = inputs(stock), []
    for layer in stock.transformer_blocks.modules():
        layer.register_forward_hook(lambda *_: calls.append(1))
    stock.enable_cache(TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1))
    counts = []
    for _ in range(5):
        calls.clear()
        with stock.cache_context("cond_uncond"):
            forward(stock, kwargs)
        counts.append(len(calls))
    assert len(set(counts)) == 1
    with pytest.raises(ValueError, match="reaches no layer"):
        ours.enable_cache(TaylorSeerCacheConfig())


@row("Text length of CogVideoX-2B")
def test_text_length():
    ours, stock = tiny_twins("2b")
    kwargs = inputs(stock, text=5)
    assert forward(ours, kwargs).isfinite().all()
    with pytest.raises(RuntimeError, match="must match the size"):
        forward(stock, kwargs)


@row("Learned positions (5B image-to-video) at another size")
def test_learned_positions():
    ours, stock = tiny_twins("5b-i2v")
    larger, shorter = inputs(stock, 3, 12, 8), inputs(stock, 2)
    assert forward(ours, larger).isfinite().all()
    with pytest.raises(ValueError, match="not possible to generate videos at a different resolution"):
        forward(stock, larger)
    before = [forward(model, shorter) for model in (ours, stock)]
    for model in (ours, stock):
        model.patch_embed.pos_embedding.data.normal_()
    changed = [bool((forward(model, shorter) != old).any()) for model, old in zip((ours, stock), before, strict=True)]
    assert changed == [True, False]


@row("Rotary positions of CogVideoX 1.5 above the config's size")
@pytest.mark.parametrize("size", [(24, 20), (20, 24)])
def test_rotary_positions(pipes, size):
    ours, stock = pipes("1.5-5b")
    options = {"height": 8 * size[0], "width": 8 * size[1], "num_inference_steps": 1, "output_type": "latent"}
    assert call(ours, **options).shape[-2:] == size
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        call(stock, **options)


@row("Inputs that do not fit")
def test_inputs_that_do_not_fit():
    ours, stock = tiny_twins("5b")
    kwargs = inputs(stock)
    torch.testing.assert_close(forward(stock, kwargs | {"ofs": torch.ones(1)}), forward(stock, kwargs))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        forward(stock, kwargs | {"encoder_hidden_states": kwargs["encoder_hidden_states"][:1]})
    for change in ({"ofs": torch.ones(1)}, {"encoder_hidden_states": kwargs["encoder_hidden_states"][:1]}):
        with pytest.raises(ValueError, match=r"\w+ .*"):
            forward(ours, kwargs | change)


# --- schedulers -------------------------------------------------------------------------------------------------------


@row("`clip_sample`")
def test_clipping():
    x, results = 9 * torch.randn(2, 3), []
    for clip in (False, True):
        stock = StockDDIMScheduler(**PRESETS["5b"].scheduler | {"clip_sample": clip})
        stock.set_timesteps(10)
        results.append(stock.step(x, 999, x).prev_sample)
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="clip_sample=True would have no effect"):
        CogVideoXDDIMScheduler(clip_sample=True)


@row("Custom `timesteps`")
def test_custom_timesteps(pipes):
    ours, stock = pipes()
    assert call(ours, timesteps=[999, 500], output_type="latent").isfinite().all()
    with pytest.raises(ValueError, match="does not support custom"):
        call(stock, timesteps=[999, 500])
    assert all("timesteps" not in inspect.signature(cls.set_timesteps).parameters for cls in (StockDDIMScheduler, StockDPMScheduler))


@row("Other schedulers for CogVideoX-2B")
def test_other_schedulers(pipes):
    ours, stock = pipes("2b")
    right = stock.scheduler.alphas_cumprod
    for pipe in (ours, stock):
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        assert (pipe.scheduler.alphas_cumprod - right).abs().max() > 0.1
    assert call(stock, output_type="latent").isfinite().all()
    with pytest.raises(ValueError, match=r"ignores snr_shift_scale=3\.0"):
        call(ours)


# --- pipeline ---------------------------------------------------------------------------------------------------------


@row("`num_videos_per_prompt`")
def test_videos_per_prompt(pipes):
    assert [len(call(pipe, num_videos_per_prompt=2, output_type="latent")) for pipe in pipes()] == [2, 1]


@row("`num_frames`")
def test_frames(pipes):
    ours, stock = pipes()
    for asked, returned in {10: 9, 12: 9, 13: 16, 5: 8}.items():
        assert call(stock, num_frames=asked, num_inference_steps=1).shape[1] == returned
        with pytest.raises(ValueError, match=f"num_frames={asked} cannot be decoded exactly"):
            call(ours, num_frames=asked)


@row("Height and width")
def test_height_and_width(pipes):
    ours, stock = pipes()
    with pytest.raises(ValueError, match="divisible by 8"):
        call(stock, height=36)
    with pytest.raises(RuntimeError, match="must match"):
        call(stock, height=40)
    with pytest.raises(ValueError, match="Nearest legal size: 32x48"):
        call(ours, height=40)


class Reached(Exception):  # noqa: N818 - no error: what there was to see has been seen
    """Ends a call of stock's pipeline with the size that it would make."""


class Watched(StockPipeline):
    def prepare_latents(self, *sizes):
        raise Reached(*sizes[2:5])  # frames, height, width


@row("Size and length when not given")
@pytest.mark.parametrize(("name", "size"), [("2b", (49, 480, 720)), ("1.5-5b", (85, 2400, 2400))])
def test_native_size(name, size, pipes):
    """Stock counts the frame of 1.5 that its patch size asks for as four frames: 85 for 81."""
    preset, parts = PRESETS[name], pipes()[1].components
    with torch.device("meta"):
        ours, stock = (cls(**preset.transformer) for cls in (CogVideoXTransformer3DModel, StockTransformer))
    with pytest.raises(Reached) as reached:
        Watched(**parts | {"transformer": stock})("a red circle")
    assert reached.value.args == size
    defaults = CogVideoXPipeline(**parts | {"transformer": ours}).call_defaults()
    assert [defaults[key] for key in ("num_frames", "height", "width")] == [preset.num_frames, preset.height, preset.width]


@row('`output_type="latent"` with CogVideoX 1.5')
def test_latents_of_the_padded_model(pipes):
    assert [call(pipe, output_type="latent").shape[1] for pipe in pipes("1.5-5b")] == [3, 4]


@row("`pipe.guidance_scale` under dynamic guidance")
def test_guidance_scale(pipes):
    scales = []
    for pipe in pipes():
        call(pipe, use_dynamic_cfg=True, output_type="latent")
        scales.append(pipe.guidance_scale)
    assert scales[0] == 6
    assert scales[1] != 6


@row("Guidance halves")
def test_guidance_halves(pipes):
    ours, stock = pipes()
    batches = []
    for pipe, options in ((ours, {}), (stock, {}), (ours, {"sequential_guidance": True})):
        hook = pipe.transformer.register_forward_pre_hook(lambda _, __, k: batches.append(len(k["hidden_states"])), with_kwargs=True)
        call(pipe, num_inference_steps=1, output_type="latent", **options)
        hook.remove()
    assert batches == [2, 2, 1, 1]


@row("Step information for caching hooks")
def test_step_information(pipes, monkeypatch):
    seen = []
    for pipe in pipes():
        original = pipe.transformer.cache_context
        monkeypatch.setattr(pipe.transformer, "cache_context", lambda *a, o=original, **k: seen.append((a, k)) or o(*a, **k))
        call(pipe, num_inference_steps=2, output_type="latent")
    ours = [(("cond_uncond",), {"step_index": i, "num_inference_steps": 2}) for i in range(2)]
    assert seen == [*ours, *[(("cond_uncond",), {})] * 2]


@row("Callbacks")
def test_callbacks(pipes):
    ours, stock = pipes()
    other = ours.encode_prompt("blue", do_classifier_free_guidance=False, max_sequence_length=7)[0]
    swap = {
        "callback_on_step_end": lambda *_: {"negative_prompt_embeds": other},
        "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"],
    }
    changed = [bool((call(p, output_type="latent", **swap) != call(p, output_type="latent")).any()) for p in (ours, stock)]
    assert changed == [True, False]
    call(stock, callback_on_step_end=lambda *_: {"noise": 0}, output_type="latent")
    with pytest.raises(ValueError, match=r"returned \['noise'\]"):
        call(ours, callback_on_step_end=lambda *_: {"noise": 0})


@row("Pipeline folders with missing tensors")
def test_missing_tensors(folders, tmp_path):
    folder = Path(shutil.copytree(folders("5b"), tmp_path / "model"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("proj_out.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        assert type(StockPipeline.from_pretrained(folder).transformer) is StockTransformer
    finally:
        logging.set_verbosity(verbosity)
    with pytest.raises(OSError, match=r"transformer lack 1 of the model's tensors, among them 'proj_out.weight'"):
        CogVideoXPipeline.from_pretrained(folder)
