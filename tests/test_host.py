"""What importing adds to diffusers, what `register` puts in place, and that `unregister` takes all of it back."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import diffusers
import PIL.Image
import pytest
import torch
from diffusers import AutoModel, ConsisIDTransformer3DModel, DiffusionPipeline
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks._helpers import AttentionProcessorRegistry, TransformerBlockRegistry
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.pipelines.cogview3 import pipeline_cogview3plus
from diffusers.pipelines.consisid import pipeline_consisid
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_cogvideox as ours
from diffusers_cogvideox import host
from parity import TINY_TRANSFORMERS, StockDDIMScheduler, StockDPMScheduler, StockPipeline, StockVAE
from tiny_pipeline import call, save_stock_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock_folder(tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return call(StockPipeline.from_pretrained(folder), num_inference_steps=4)


def touched() -> dict[str, object]:
    """Every attribute and table entry of diffusers that this package may touch, as it is now."""
    names = [*host.REPLACED, "CogVideoXScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"]
    return {
        "attributes": {name: vars(diffusers).get(name, "lazy") for name in names},
        "all": set(vars(diffusers)),
        "method": vars(DiffusionPipeline).get("register_to_config", "inherited"),
        "libraries": {name: dict(classes) for name, classes in LOADABLE_CLASSES.items()},
        "blocks": dict(TransformerBlockRegistry._registry),
        "processors": dict(AttentionProcessorRegistry._registry),
        "single files": set(SINGLE_FILE_LOADABLE_CLASSES),
    }


def assert_ours(pipe: DiffusionPipeline) -> None:
    assert type(pipe) is ours.CogVideoXPipeline
    assert type(pipe.vae) is ours.AutoencoderKLCogVideoX
    assert type(pipe.transformer) is ours.CogVideoXTransformer3DModel
    assert type(pipe.scheduler) is ours.CogVideoXDDIMScheduler


# --- import -----------------------------------------------------------------------------------------------------------


def test_extending_adds_and_replaces_nothing(monkeypatch: pytest.MonkeyPatch):
    blocks, processors = TransformerBlockRegistry._registry, AttentionProcessorRegistry._registry
    for table, key in (
        (blocks, host.CogVideoXBlock),
        (processors, host.CogVideoXAttnProcessor),
        (LOADABLE_CLASSES, ours.__name__),
        (vars(diffusers), "CogVideoXScheduler"),
        (vars(diffusers), host.SINGLE_FILE),
        (SINGLE_FILE_LOADABLE_CLASSES, host.SINGLE_FILE),
    ):
        monkeypatch.delitem(table, key)
    without = touched()
    host.extend()
    assert blocks.keys() - without["blocks"].keys() == {host.CogVideoXBlock}
    assert processors.keys() - without["processors"].keys() == {host.CogVideoXAttnProcessor}
    assert {**without["libraries"], ours.__name__: {}} == LOADABLE_CLASSES
    assert set(vars(diffusers)) - without["all"] == {"CogVideoXScheduler", host.SINGLE_FILE}
    assert SINGLE_FILE_LOADABLE_CLASSES.keys() - without["single files"] == {host.SINGLE_FILE}
    assert {name: vars(diffusers).get(name, "lazy") for name in host.REPLACED} == {
        name: without["attributes"][name] for name in host.REPLACED
    }


def test_a_scheduler_of_that_name_in_diffusers_stays(monkeypatch: pytest.MonkeyPatch):
    theirs = type("CogVideoXScheduler", (), {})
    monkeypatch.setattr(diffusers, "CogVideoXScheduler", theirs)
    host.extend()
    assert diffusers.CogVideoXScheduler is theirs


def test_importing_replaces_nothing():
    script = (
        "import diffusers; from diffusers.hooks._helpers import TransformerBlockRegistry as B, AttentionProcessorRegistry as P;"
        "from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES as L;"
        "names = ['AutoencoderKLCogVideoX', 'CogVideoXTransformer3DModel', 'CogVideoXPipeline', 'CogVideoXDPMScheduler'];"
        "B._register(); P._register();"
        "before = [getattr(diffusers, n) for n in names], dict(B._registry), dict(P._registry), dict(L);"
        "import diffusers_cogvideox as ours;"
        "assert before[0] == [getattr(diffusers, n) for n in names];"
        "added = [set(now) - set(then) for now, then in zip((B._registry, P._registry, L), before[1:])];"
        "assert all(now[k] is then[k] for now, then in zip((B._registry, P._registry, L), before[1:]) for k in then);"
        "assert [len(a) for a in added] == [1, 1, 1] and added[2] == {'diffusers_cogvideox'}, added;"
        "assert diffusers.CogVideoXScheduler is ours.CogVideoXScheduler"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_repeating_the_import_effects_changes_nothing():
    before = touched()
    host.extend()
    after = touched()
    assert before["attributes"] == after["attributes"]
    assert before["libraries"] == after["libraries"]
    assert before["blocks"].keys() == after["blocks"].keys()


@pytest.mark.parametrize("name", ["ModelMixin", "SchedulerMixin", "DiffusionPipeline"])
def test_base_classes_are_visible_where_diffusers_looks(name: str):
    assert getattr(ours, name) is getattr(diffusers, name)


# --- register ---------------------------------------------------------------------------------------------------------


def test_diffusion_pipeline_loads_ours_while_registered(folder: Path, expected: torch.Tensor):
    before = touched()
    with ours.registered():
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert type(AutoModel.from_pretrained(str(folder), subfolder="transformer")) is ours.CogVideoXTransformer3DModel
        assert {name: getattr(diffusers, name) for name in host.REPLACED} == host.REPLACED
    assert_ours(pipe)
    torch.testing.assert_close(call(pipe, num_inference_steps=4), expected, atol=1e-3, rtol=0)
    assert touched() == before
    assert type(DiffusionPipeline.from_pretrained(folder)) is StockPipeline


def everything() -> dict[tuple[str, str], object]:
    """Every attribute of every module of diffusers that is loaded, and of every class in it, by (module or class, name)."""

    def theirs(name: str) -> bool:
        return name.partition(".")[0] == "diffusers"

    modules = {name: module for name, module in list(sys.modules.items()) if theirs(name)}
    members = {member for module in modules.values() for member in vars(module).values() if isinstance(member, type)}
    classes = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in members if theirs(cls.__module__)}
    return {(owner, name): value for owner, there in {**modules, **classes}.items() for name, value in list(vars(there).items())}


def test_register_touches_only_what_the_list_names_and_unregister_all_of_it():
    before = everything()
    ours.register()
    during = everything()
    ours.unregister()
    after = everything()
    base = f"{DiffusionPipeline.__module__}.{DiffusionPipeline.__qualname__}"
    named = {("diffusers", name) for name in host.REPLACED} | {(base, "register_to_config")}
    assert {key for key in before.keys() | during.keys() if before.get(key) is not during.get(key)} <= named
    assert {key for key in named if key in during and during[key] is not before.get(key)} == named
    assert not {key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)}


def test_unregister_restores_lazy_names_and_foreign_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(vars(diffusers), "CogVideoXPipeline", raising=False)
    marker = type("AutoencoderKLCogVideoX", (), {})
    monkeypatch.setattr(diffusers, "AutoencoderKLCogVideoX", marker)
    ours.register()
    ours.unregister()
    assert "CogVideoXPipeline" not in vars(diffusers)
    assert diffusers.AutoencoderKLCogVideoX is marker
    assert diffusers.CogVideoXPipeline is StockPipeline


def test_calls_are_counted():
    before = touched()
    ours.register()
    ours.register()
    ours.unregister()
    assert diffusers.CogVideoXPipeline is ours.CogVideoXPipeline
    ours.unregister()
    assert touched() == before
    with pytest.raises(RuntimeError, match=r"unregister\(\) without register\(\)"):
        ours.unregister()
    assert touched() == before


def test_a_class_that_somebody_put_there_since_stays(monkeypatch: pytest.MonkeyPatch):
    newer = type("CogVideoXPipeline", (), {})
    with ours.registered():
        monkeypatch.setattr(diffusers, "CogVideoXPipeline", newer)
    assert diffusers.CogVideoXPipeline is newer
    vars(diffusers).pop("CogVideoXPipeline")
    monkeypatch.undo()
    vars(diffusers).pop("CogVideoXPipeline", None)  # lazy again
    assert diffusers.CogVideoXPipeline is StockPipeline


def test_an_error_inside_the_block_undoes_too():
    before = touched()
    with pytest.raises(KeyError), ours.registered():
        raise KeyError
    assert touched() == before


def test_threads_may_register_at_once():
    before = touched()

    def work() -> None:
        for _ in range(200):
            with ours.registered():
                assert diffusers.CogVideoXPipeline is ours.CogVideoXPipeline

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert touched() == before


def test_models_that_borrow_our_parts_keep_their_schedulers():
    """CogView3+ and ConsisID test their scheduler with isinstance against diffusers' own class."""
    with ours.registered():
        assert diffusers.CogVideoXDPMScheduler is StockDPMScheduler
        assert diffusers.CogVideoXDDIMScheduler is StockDDIMScheduler
        assert pipeline_cogview3plus.CogVideoXDPMScheduler is StockDPMScheduler
        assert pipeline_consisid.CogVideoXDPMScheduler is StockDPMScheduler


def test_consisid_makes_the_same_video_while_registered(folder: Path, tmp_path: Path):
    """ConsisID's repositories name CogVideoX's VAE and schedulers."""
    options = TINY_TRANSFORMERS["5b-i2v"] | {"num_layers": 1, "is_train_face": False}
    parts = StockPipeline.from_pretrained(folder).components | {"transformer": ConsisIDTransformer3DModel(**options)}
    pipe = pipeline_consisid.ConsisIDPipeline(**parts | {"scheduler": StockDPMScheduler(**parts["scheduler"].config)})
    pipe.save_pretrained(tmp_path)
    call_options = {"image": PIL.Image.new("RGB", (96, 64), (200, 30, 30)), "height": 64, "width": 96}
    expected = call(pipe, **call_options)
    with ours.registered():
        loaded = pipeline_consisid.ConsisIDPipeline.from_pretrained(tmp_path)
        assert type(loaded.vae) is ours.AutoencoderKLCogVideoX
        assert type(loaded.scheduler) is StockDPMScheduler
        torch.testing.assert_close(call(loaded, **call_options), expected, atol=1e-3, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKLCogVideoX"]
    assert type(pipeline_consisid.ConsisIDPipeline.from_pretrained(tmp_path / "again").vae) is StockVAE


# --- community pipeline -----------------------------------------------------------------------------------------------


def test_community_pipeline(folder: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    before = touched()
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=ours.community_pipeline(), trust_remote_code=True)
    assert_ours(pipe)
    torch.testing.assert_close(call(pipe, num_inference_steps=4), expected, atol=1e-3, rtol=0)
    assert touched() == before
    pipe.save_pretrained(tmp_path / "saved")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is StockPipeline


# --- hooks of diffusers that know classes by name ---------------------------------------------------------------------


def counted_forward(pipe: DiffusionPipeline) -> int:
    """How often the last block's feed-forward network runs in a call of 6 steps."""
    runs = []
    handle = pipe.transformer.transformer_blocks[-1].ff.register_forward_hook(lambda *_: runs.append(1))
    call(pipe, num_inference_steps=6, output_type="latent")
    handle.remove()
    return len(runs)


def test_first_block_cache_skips_steps(folder: Path):
    pipe = ours.CogVideoXPipeline.from_pretrained(folder)
    assert counted_forward(pipe) == 6
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    assert counted_forward(pipe) < 6
    pipe.transformer.disable_cache()
    assert counted_forward(pipe) == 6


def test_attention_broadcast_reaches_our_attention(folder: Path):
    pipe = ours.CogVideoXPipeline.from_pretrained(folder)
    plain = call(pipe, num_inference_steps=6, output_type="latent")
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: int(pipe.current_timestep),
    )
    pipe.transformer.enable_cache(config)
    assert not torch.allclose(call(pipe, num_inference_steps=6, output_type="latent"), plain, atol=1e-4)


def test_layer_skip_of_attention_alone(folder: Path):
    pipe = ours.CogVideoXPipeline.from_pretrained(folder)
    plain = call(pipe, output_type="latent")
    config = LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=True, skip_ff=False)
    apply_layer_skip(pipe.transformer, config)
    assert not torch.allclose(call(pipe, output_type="latent"), plain, atol=1e-4)


def test_private_names_of_diffusers_are_where_host_expects_them():
    assert isinstance(LOADABLE_CLASSES, dict)
    assert LOADABLE_CLASSES[ours.__name__] == {}
    assert issubclass(ours.AutoencoderKLCogVideoX, getattr(diffusers, host.SINGLE_FILE))
    assert SINGLE_FILE_LOADABLE_CLASSES[host.SINGLE_FILE] == {"checkpoint_mapping_fn": host.as_diffusers}
    assert TransformerBlockRegistry.get(host.CogVideoXBlock)._cls is host.CogVideoXBlock
    assert AttentionProcessorRegistry.get(host.CogVideoXAttnProcessor).skip_processor_output_fn is host._skip_attention
