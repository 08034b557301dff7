"""Guidance: formulas against the recorded numbers of the original code and the closed form; passes and layers that are left out."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from diffusers import ClassifierFreeGuidance, LayerSkipConfig, PerturbedAttentionGuidance
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.hooks import HookRegistry, apply_layer_skip
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from safetensors.torch import load_file

from diffusers_cogvideox import CogVideoXPipeline, SkipLayers
from diffusers_cogvideox.pipelines.guidance import dynamic_rule, guidance_at, guide, guide_away, steps_inside
from diffusers_cogvideox.pipelines.skip_layers import PARTS
from tiny_pipeline import call as call_for_frames


def scales(rule: str, steps: int) -> list[float]:
    ratio = 1000 / steps
    timesteps = [round(1000 - i * ratio) - 1 for i in range(steps)]
    return [guidance_at(rule, 6.0, index=i, timestep=t, steps=steps) for i, t in enumerate(timesteps)]


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("rule", "recorded"), [("stock", "dyn_cfg_sat"), ("progress", "dyn_cfg_intended")])
def test_schedules_equal_those_of_the_original_code(reference: Path, rule: str, recorded: str, steps: int):
    expected = load_file(reference / "sat" / "sampler_io.safetensors")[f"{recorded}_{steps}"]
    torch.testing.assert_close(torch.tensor(scales(rule, steps), dtype=torch.float64), expected)


def test_stock_schedule_begins_as_published():
    expected = torch.tensor([2.291, 2.544, 6.974, 6.420, 2.788, 4.272, 1.038, 4.170])
    torch.testing.assert_close(torch.tensor(scales("stock", 50)[:8]), expected, atol=6e-4, rtol=0)


def test_progress_rises_from_1_towards_1_plus_w():
    values = scales("progress", 28)
    assert values == sorted(values)
    assert values[0] == 1.0
    assert math.isclose(guidance_at("progress", 6.0, index=28, timestep=0, steps=28), 7.0)


def test_constant_guidance_is_the_scale_itself():
    assert guidance_at(None, 6.0, index=3, timestep=500, steps=10) == 6.0


def test_guide_extrapolates_from_the_unconditional_prediction():
    u, c = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guide(u, c, 0.0), u)
    torch.testing.assert_close(guide(u, c, 1.0), c)
    torch.testing.assert_close(guide(u, c, 3.0), 3 * c - 2 * u)


def test_rule_names():
    assert [dynamic_rule(value) for value in (False, True, "stock", "progress")] == [None, "stock", "stock", "progress"]
    with pytest.raises(ValueError, match=r"'cosine' is unknown.*progress"):
        dynamic_rule("cosine")


# --- in some of the steps ---------------------------------------------------------------------------------------------


def call(pipe: CogVideoXPipeline, **options) -> torch.Tensor:
    return call_for_frames(pipe, **{"output_type": "latent", "num_inference_steps": 4, **options})


@pytest.fixture
def passes(pipe):
    """The batch size of every call of the transformer."""
    batches = []
    handle = pipe.transformer.register_forward_pre_hook(lambda _, __, given: batches.append(len(given["hidden_states"])), with_kwargs=True)
    yield batches
    handle.remove()


@pytest.mark.parametrize("steps", [1, 7, 10, 30, 50])
@pytest.mark.parametrize("start", [0.0, 0.1, 0.3, 0.7])
def test_intervals_are_left_closed_and_right_open(steps, start):
    """Neighbouring intervals share no step and leave none out, whatever the rounding."""
    parts = [steps_inside(interval, steps, "x") if steps > 1 else range(1) for interval in ((start, 0.8), (0.8, 1.0))]
    before = math.ceil(start * steps - 1e-9)
    assert [*parts[0], *parts[1]] == list(range(before, steps)) or steps == 1


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.0, 1.0), [2, 2, 2, 2]), ((0.0, 0.5), [2, 2, 1, 1]), ((0.25, 0.75), [1, 2, 2, 1]), ((0.5, 1.0), [1, 1, 2, 2])],
)
def test_guidance_interval_halves_the_work_outside(pipe, passes, interval, expected):
    latents = call(pipe, guidance_interval=interval)
    assert passes == expected
    passes.clear()
    torch.testing.assert_close(call(pipe, guidance_interval=interval, sequential_guidance=True), latents, atol=1e-4, rtol=0)
    assert passes == [1] * sum(expected)


def test_guidance_interval_equals_a_cutoff_by_callback(pipe):
    """diffusers' own way to end guidance early, which drops the unconditional half after step 1."""
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    torch.testing.assert_close(call(pipe, guidance_interval=(0, 0.5)), call(pipe, callback_on_step_end=cutoff), atol=1e-5, rtol=0)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), (0.8, 0.2)])
def test_impossible_intervals(pipe, interval):
    with pytest.raises(ValueError, match=r"guidance_interval=.* is not possible: .*0 <= start < stop <= 1"):
        call(pipe, guidance_interval=interval)
    with pytest.raises(ValueError, match=r"interval=.* is not possible"):
        SkipLayers([0], interval=interval)


def test_an_interval_without_any_step(pipe):
    with pytest.raises(ValueError, match=r"guidance_interval=\(0.1, 0.2\) holds none of 4 steps: make it at least 0.25 wide"):
        call(pipe, guidance_interval=(0.1, 0.2))


# --- without some of the layers ---------------------------------------------------------------------------------------


def without_block(model: torch.nn.Module, index: int) -> torch.nn.Module:
    """A copy that has never had that block."""
    shorter = copy.deepcopy(model)
    del shorter.transformer_blocks[index]
    return shorter


def test_guide_away_adds_the_difference():
    p, g, b = torch.randn(3, 5)
    torch.testing.assert_close(guide_away(p, g, b, 0.5), p + g / 2 - b / 2)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_the_worse_prediction_is_that_of_a_model_without_the_block(pipe, scale):
    shorter, calls = without_block(pipe.transformer, 1), []
    handle = pipe.transformer.register_forward_hook(lambda _, __, given, out: calls.append((given, out[0])), with_kwargs=True)
    call(pipe, skip_layers=SkipLayers([1], 2.0), guidance_scale=scale, num_inference_steps=1)
    handle.remove()
    (given, whole), (given_again, worse) = calls
    with torch.no_grad():
        torch.testing.assert_close(worse, shorter(**given_again)[0])
    torch.testing.assert_close(given_again["encoder_hidden_states"], given["encoder_hidden_states"][-1:])
    assert (worse - whole[-1:]).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_skip_layer_guidance_is_linear_in_its_scale(pipe, guidance):
    """One DDIM step from pure noise gives -v, so results differ by s (c - c_skipped), whatever the other guidance does."""
    options = {"num_inference_steps": 1, "guidance_scale": guidance}
    plain = call(pipe, **options)
    once, thrice = (call(pipe, skip_layers=SkipLayers([0], s), **options) - plain for s in (1.0, 3.0))
    assert once.abs().max() > 0.01
    torch.testing.assert_close(thrice, 3 * once, atol=1e-4, rtol=1e-4)
    conditional = call(pipe, num_inference_steps=1, guidance_scale=1.0)
    whole, pipe.transformer = pipe.transformer, without_block(pipe.transformer, 0)
    skipped = call(pipe, num_inference_steps=1, guidance_scale=1.0)
    pipe.transformer = whole
    torch.testing.assert_close(once, conditional - skipped, atol=1e-4, rtol=1e-4)


def test_parts_of_a_layer(pipe):
    """Whole block, attention alone, attention scores alone, and nothing: four different predictions."""
    kinds = [None, *(SkipLayers([1], part=part) for part in PARTS)]
    results = [call(pipe, num_inference_steps=1, skip_layers=layers) for layers in kinds]
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.combinations(results, 2))


def test_scores_are_the_identity_in_perturbed_attention(pipe):
    """Each token then attends to itself alone: the first product of the attention's output projection is with the values."""
    attention, seen = pipe.transformer.transformer_blocks[1].attn1, []
    handles = [
        attention.to_v.register_forward_hook(lambda _, __, out: seen.append(out)),
        attention.to_out[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    call(pipe, num_inference_steps=1, guidance_scale=1.0, skip_layers=SkipLayers([1], part="scores"))
    for handle in handles:
        handle.remove()
    values, attended, values_again, attended_again = seen
    assert (values - attended).abs().max() > 0.1
    torch.testing.assert_close(values_again, attended_again)


def test_skip_layer_interval(pipe, passes):
    call(pipe, skip_layers=SkipLayers([0], interval=(0.25, 0.75)))
    assert passes == [2, 2, 1, 2, 1, 2]


def hooks_of(model: torch.nn.Module) -> dict[str, list[str]]:
    registries = {name: getattr(part, "_diffusers_hook", None) for name, part in model.named_modules()}
    return {name: list(registry.hooks) for name, registry in registries.items() if registry is not None and registry.hooks}


def test_hooks_go_and_the_users_own_stay(folders):
    pipe = CogVideoXPipeline.from_pretrained(folders())
    apply_layer_skip(pipe.transformer, LayerSkipConfig([0], fqn="transformer_blocks"))
    before, latents = hooks_of(pipe.transformer), call(pipe)
    assert before["transformer_blocks.0"] == ["layer_skip_hook"]
    call(pipe, skip_layers=SkipLayers([0, 1]))
    assert hooks_of(pipe.transformer) == before
    torch.testing.assert_close(call(pipe), latents, atol=0, rtol=0)


def test_hooks_go_after_an_error(folders):
    pipe = CogVideoXPipeline.from_pretrained(folders())
    expected = call(pipe)

    def fail(*_):
        if any(hooks_of(pipe.transformer).values()):
            raise RuntimeError("in the middle of a skipped pass")

    handle = pipe.transformer.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        call(pipe, skip_layers=SkipLayers([1]))
    handle.remove()
    assert hooks_of(pipe.transformer) == {}
    assert isinstance(pipe.transformer._diffusers_hook, HookRegistry)
    torch.testing.assert_close(call(pipe), expected, atol=0, rtol=0)


@pytest.mark.parametrize("layers", [[], [2], [0, -1]])
def test_layers_that_are_not_there(pipe, layers):
    with pytest.raises(ValueError, match=r"layers=\[.*\] is not possible: name some of the transformer's 2 blocks, 0 to 1"):
        call(pipe, skip_layers=SkipLayers(layers))


def test_skipping_without_effect_is_refused():
    with pytest.raises(ValueError, match="scale=0 has no effect"):
        SkipLayers([0], scale=0)
    with pytest.raises(ValueError, match="part='ff' is unknown: use one of block, attention, scores"):
        SkipLayers([0], part="ff")


@pytest.mark.parametrize("everywhere", [True, False])
def test_scores_need_the_native_backend(folders, monkeypatch, everywhere):
    pipe, scores = CogVideoXPipeline.from_pretrained(folders()), {"skip_layers": SkipLayers([0], part="scores"), "num_inference_steps": 1}
    if everywhere:
        monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", AttentionBackendName.FLEX)
    else:
        pipe.transformer.transformer_blocks[1].attn1.processor._attention_backend = AttentionBackendName.FLEX
    with pytest.raises(ValueError, match="has no effect with the attention backend flex"):
        call(pipe, **scores)
    for block in pipe.transformer.transformer_blocks:
        block.attn1.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    call(pipe, **scores)


# --- guiders of diffusers ---------------------------------------------------------------------------------------------


def test_a_guider_that_stops_leaves_passes_out(pipe, passes):
    stopped = call(pipe, guider=ClassifierFreeGuidance(guidance_scale=6.0, stop=0.5))
    assert passes == [1] * 6
    torch.testing.assert_close(stopped, call(pipe, guidance_interval=(0.0, 0.5)), atol=1e-4, rtol=0)


def test_a_guider_leaves_no_hooks_behind(pipe):
    before = call(pipe)
    guider = PerturbedAttentionGuidance(
        guidance_scale=6.0, perturbed_guidance_layers=[0], perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )
    assert (call(pipe, guider=guider) - before).abs().max() > 1e-2
    torch.testing.assert_close(call(pipe), before, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guider": "cfg"}, TypeError, "guider='cfg' is not possible: pass one of diffusers' guiders"),
        ({"guidance_scale": 3.0}, ValueError, r"guidance_scale cannot be combined with a guider \(ClassifierFreeGuidance\)"),
        ({"use_dynamic_cfg": True, "sequential_guidance": True}, ValueError, "use_dynamic_cfg, sequential_guidance cannot be combined"),
        ({"skip_layers": SkipLayers([0])}, ValueError, "skip_layers cannot be combined"),
    ],
)
def test_a_guider_decides_alone(pipe, options, error, message):
    with pytest.raises(error, match=message):
        call(pipe, **{"guider": ClassifierFreeGuidance(), **options})
