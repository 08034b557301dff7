"""Every feature cache in our pipelines: it spares what its rule says, for each half of the guidance, call after call."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.utils import logging

from diffusers_cogvideox import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers_cogvideox.models.tea_cache import TeaCacheConfig
from diffusers_cogvideox.runtime.effects import NoEffectError
from parity import TINY_TRANSFORMERS, randomize
from tiny_pipeline import call
from transformer_cases import inputs, tiny_twins

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # FasterCache calls it in the old way

STEPS = 8
BOTH = [r"transformer_blocks\.\d+\.(attn1|ff)"]
PAB = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (0, 1000)}
FASTER = {
    "spatial_attention_timestep_skip_range": (-1, 1000),
    "unconditional_batch_timestep_skip_range": (-1, 1000),
    "unconditional_batch_skip_range": 4,
}

# How often one attention layer and one feed-forward network of the last of 3 blocks compute in 8 steps, by the rule of each cache.
CACHES = {
    "first block": (FirstBlockCacheConfig(threshold=100.0), 1, 1),
    "mag": (MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS), 3, 3),  # a fifth, then one after three left out
    "broadcast": (PyramidAttentionBroadcastConfig(**PAB), 4, 8),
    "taylor": (TaylorSeerCacheConfig(taylor_factors_dtype=torch.float32), 4, 8),  # steps 0, 1, 2 and 4
    "taylor, two layers": (TaylorSeerCacheConfig(cache_identifiers=BOTH, taylor_factors_dtype=torch.float32), 4, 4),
    "sea": (SeaCacheConfig(threshold=100.0), 4, 4),  # 0, then one after two left out, and the last: 0, 3, 6, 7
    "tea": (TeaCacheConfig(threshold=100.0), 2, 2),  # the first and the last
    "skip": (LayerSkipConfig([2]), 0, 0),
}


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    from tiny_pipeline import save_stock_folder

    return CogVideoXPipeline.from_pretrained(save_stock_folder(tmp_path_factory.mktemp("caches"))).components


@pytest.fixture
def pipe(components):
    """A pipeline with a transformer of its own, of 3 blocks, and counters on the last one's attention and feed-forward network."""
    transformer = randomize(CogVideoXTransformer3DModel(**TINY_TRANSFORMERS["5b"] | {"num_layers": 3})).eval()
    pipe = CogVideoXPipeline(**{**components, "transformer": transformer})
    pipe.runs = {"attn": [], "ff": []}
    block = transformer.transformer_blocks[-1]
    block.attn1.to_out[0].register_forward_hook(lambda _m, args, _o: pipe.runs["attn"].append(len(args[0])))
    block.ff.net[2].register_forward_hook(lambda _m, args, _o: pipe.runs["ff"].append(len(args[0])))
    return pipe


@pytest.fixture(autouse=True)
def quiet():
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(verbosity)


def latents(pipe, **options):
    for runs in pipe.runs.values():
        runs.clear()
    return call(pipe, num_inference_steps=STEPS, output_type="latent", **options)


@pytest.mark.parametrize("sequential", [False, True], ids=["batched", "sequential"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_spares_what_its_rule_says(pipe, name, sequential):
    config, attention, feed_forward = CACHES[name]
    plain = latents(pipe, sequential_guidance=sequential)
    pipe.transformer.enable_cache(config)
    first = latents(pipe, sequential_guidance=sequential)
    halves = 2 if sequential else 1
    assert [len(pipe.runs["attn"]), len(pipe.runs["ff"])] == [halves * attention, halves * feed_forward]
    hooked = pipe.transformer.cached_layers
    assert hooked.hits > 0 and hooked.calls - hooked.computed == hooked.hits
    assert (first - plain).abs().max() > 1e-4
    torch.testing.assert_close(latents(pipe, sequential_guidance=sequential), first, rtol=0, atol=0)  # a second call starts anew
    pipe.transformer.disable_cache()
    torch.testing.assert_close(latents(pipe, sequential_guidance=sequential), plain, rtol=0, atol=0)
    assert pipe.transformer.cached_layers is None


@pytest.mark.parametrize("name", [name for name in CACHES if "skip" not in name])
def test_halves_made_one_after_the_other_are_not_mixed_up(pipe, name):
    """Caches that decide by the step alone leave out the same steps of both halves: batched and sequential are equal."""
    pipe.transformer.enable_cache(CACHES[name][0])
    torch.testing.assert_close(latents(pipe, sequential_guidance=True), latents(pipe), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", CACHES)
def test_after_a_failure_and_at_another_size(pipe, name):
    """What a stopped call has left in the cache is forgotten, also when it had another size."""

    def fail(_pipe, index, _timestep, _tensors):
        if index == 4:
            raise InterruptedError

    pipe.transformer.enable_cache(CACHES[name][0])
    expected = latents(pipe)
    with pytest.raises(InterruptedError):
        latents(pipe, height=48, callback_on_step_end=fail)
    torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in CACHES if name != "mag"])
def test_loops_that_are_guided_in_part(pipe, name):
    """Passes of one half have states of their own: every size of pass is computed at least once."""
    pipe.transformer.enable_cache(CACHES[name][0])
    assert latents(pipe, guidance_interval=(0.25, 0.75)).isfinite().all()
    sizes = set(pipe.runs["attn"])
    assert sizes == (set() if name == "skip" else {1, 2})


def test_faster_cache_leaves_out_the_unconditional_half(pipe):
    plain = latents(pipe)
    pipe.transformer.enable_cache(FasterCacheConfig(**FASTER))
    cached = latents(pipe)
    # Both halves in steps 0 and 4; of the others' halves, attention computes every second.
    assert pipe.runs["ff"] == [2, 1, 1, 1, 2, 1, 1, 1]
    assert pipe.runs["attn"] == [2, 1, 2, 1]
    assert (cached - plain).abs().max() > 1e-4
    torch.testing.assert_close(latents(pipe), cached, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"sequential_guidance": True}, {"guidance_interval": (0, 0.5)}, {"guidance_scale": 1.0}])
def test_faster_cache_is_refused_where_a_pass_holds_one_half(pipe, options):
    pipe.transformer.enable_cache(FasterCacheConfig(**FASTER))
    with pytest.raises(ValueError, match="all passes must hold both"):
        latents(pipe, **options)
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FasterCacheConfig(**FASTER, is_guidance_distilled=True))
    assert latents(pipe, **options).isfinite().all()
    assert len(pipe.runs["attn"]) < len(pipe.runs["ff"])


def test_faster_cache_when_a_callback_turns_guidance_off(pipe):
    def off(pipe, index, _timestep, tensors):
        if index == 2:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}
        return {}

    pipe.transformer.enable_cache(FasterCacheConfig(**FASTER))
    with pytest.raises(ValueError, match="a callback has turned guidance off"):
        latents(pipe, callback_on_step_end=off, callback_on_step_end_tensor_inputs=["prompt_embeds"])


def curve(pipe, plain, configs):
    """Relative error and number of computed passes of each config."""
    points = []
    for config in configs:
        pipe.transformer.enable_cache(config)
        try:
            made = latents(pipe)
        except NoEffectError as error:  # with a threshold that nothing passes
            made = error.latents
        points.append((float((made - plain).norm() / plain.norm()), len(pipe.runs["ff"])))
        pipe.transformer.disable_cache()
    return points


@pytest.mark.parametrize("cls", [TeaCacheConfig, SeaCacheConfig, FirstBlockCacheConfig])
def test_a_threshold_of_zero_computes_everything(pipe, cls):
    plain = latents(pipe)
    pipe.transformer.enable_cache(cls(threshold=0.0))
    with pytest.raises(NoEffectError) as caught:
        latents(pipe)
    torch.testing.assert_close(caught.value.latents, plain, rtol=0, atol=0)
    assert len(pipe.runs["ff"]) == STEPS


@pytest.mark.parametrize(
    "configs",
    [
        [FirstBlockCacheConfig(threshold=t) for t in (0.02, 0.2, 2.0)],
        [TeaCacheConfig(threshold=t) for t in (0.05, 0.5, 5.0)],
        [SeaCacheConfig(threshold=t) for t in (0.01, 0.3, 9.0)],
        [MagCacheConfig(threshold=t, mag_ratios=[0.98] * STEPS, num_inference_steps=STEPS) for t in (0.01, 0.05, 0.5)],
    ],
    ids=["first block", "tea", "sea", "mag"],
)
def test_errors_grow_with_the_threshold(pipe, configs):
    points = curve(pipe, latents(pipe), configs)
    errors, passes = zip(*points, strict=True)
    assert sorted(errors) == list(errors) and sorted(passes, reverse=True) == list(passes)
    assert passes[0] > passes[-1] and errors[0] < errors[-1]


def test_tea_cache_follows_its_sum():
    """Steps computed as the definition says, from the distances of the embeddings, which are computed here by hand."""
    model = tiny_twins("5b")[0]
    kwargs, runs = inputs(model), []
    model.transformer_blocks[-1].ff.register_forward_hook(lambda *_: runs.append(index))
    timesteps = [999, 998, 996, 960, 955, 950, 949, 100, 0]
    with torch.no_grad():
        e = [model.time_embedding(model.time_proj(torch.tensor([t])).float()) for t in timesteps]
    polynomial = (3.0, 0.5, 0.01)
    config = TeaCacheConfig(threshold=0.4, coefficients=polynomial, computed_first=2, computed_last=1)
    expected, total = [0, 1], 0.0
    for index in range(2, 8):
        d = float((e[index] - e[index - 1]).abs().sum() / e[index - 1].abs().sum())
        total += polynomial[0] * d**2 + polynomial[1] * d + polynomial[2]
        if total >= config.threshold:
            expected.append(index)
            total = 0.0
    assert 3 < len(expected) < 8
    model.enable_cache(config)
    for index, timestep in enumerate(timesteps):
        with torch.no_grad(), model.cache_context("cond", step_index=index, num_inference_steps=9, timestep=float(timestep)):
            model(**kwargs)
    assert runs == [*expected, 8]


def test_caches_say_what_they_need():
    model = tiny_twins("5b", num_layers=1)[0]
    kwargs = inputs(model)
    with pytest.raises(ValueError, match="leaves out all blocks but the first, and this model has 1"):
        model.enable_cache(FirstBlockCacheConfig())
    for config, message in ((TeaCacheConfig(), "TeaCache needs to know"), (PyramidAttentionBroadcastConfig(), "needs the timestep")):
        model.enable_cache(config)
        with pytest.raises(ValueError, match=message), model.cache_context("cond"), torch.no_grad():
            model(**kwargs)
        with pytest.raises(ValueError, match="already been enabled"):
            model.enable_cache(TeaCacheConfig())
        model.disable_cache()
    for wrong in ({"threshold": -1.0}, {"coefficients": ()}, {"computed_first": -1}, {"threshold": float("inf")}):
        with pytest.raises(ValueError):
            TeaCacheConfig(**wrong)
