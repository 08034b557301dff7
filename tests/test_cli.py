"""The command line: its exact set of options, its help, its errors, and what it hands to the verbs."""

import dataclasses
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from docstring_parser import parse_from_object

import diffusers_cogvideox
from diffusers_cogvideox import cli
from diffusers_cogvideox.options import DecodeOptions, EvaluateOptions, GenerateOptions, InfoOptions, parse_size
from diffusers_cogvideox.training.config import TrainConfig
from tiny_pipeline import save_stock_folder

SAMPLING = {"--steps", "--guidance-scale", "--sampler", "--dtype", "--device", "--seed", "--overwrite", "--no-overwrite"}
# An option cannot appear, disappear or change its name by accident.
OPTIONS = {
    "generate": {"prompt", "--model", "--output", "--negative-prompt", "--num-videos", "--size", "--frames", "--fps"}
    | {"--lora", "--lora-alpha", "--vram", "--ram", "--quantisation", "--cache", "--max-error", "--window"}
    | {"--image", "--last-image", "--video", "--strength", "--mask", "--control", "--extend", "--fit"}
    | {"--checkpoint-every", "--parallel", "--preview", "--no-preview", "--save-latents", "--no-save-latents", "--tiling", "--no-tiling"}
    | SAMPLING,
    "decode": {"latents", "--model", "--output", "--layout", "--fps", "--dtype", "--device", "--tiling", "--no-tiling"}
    | {"--overwrite", "--no-overwrite"},
    "info": {"model", "--json", "--no-json"},
    "calibrate": {"model", "--prompts", "--prompts-file", "--caches", "--output"} | SAMPLING,
    "convert": {"input", "output", "--to", "--dtype", "--max-shard-size", "--text-encoder", "--like", "--only", "--lora-alpha"}
    | {f"--{no}{name}" for name in ("merge-lora", "verify", "trust-pickle", "overwrite") for no in ("", "no-")},
    "evaluate": {"what", "model", "--output", "--prompts", "--untrained-prompts", "--batch-size", "--baselines", "--no-baselines"}
    | SAMPLING,
}
TRAIN = """
task: vae
output: run
model: {latent_channels: 4}
stages:
- {steps: 2, batch_size: 3, frames: 9}
data: {height: 32, width: 48}
"""


def names(verb: str) -> set[str]:
    """Flags of a verb, and the names of its positional arguments."""
    actions = [action for action in cli.parser_for(verb)._actions if action.dest != "help"]
    return {name for action in actions for name in (action.option_strings or [action.dest])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_stock_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def handed(monkeypatch) -> list:
    """What the verbs get instead of running."""
    calls: list = []
    for name, verb in cli.VERBS.items():
        monkeypatch.setitem(cli.VERBS, name, dataclasses.replace(verb, run=lambda options: calls.append(options) or "done"))
    return calls


@pytest.fixture
def config(tmp_path) -> Path:
    (tmp_path / "train.yaml").write_text(TRAIN)
    return tmp_path / "train.yaml"


def failure(capsys, *arguments: str) -> str:
    """The one line that a mistake prints; it must end with status 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1
    return lines[0]


# --- the set of options and its help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", OPTIONS)
def test_options_are_pinned(verb):
    assert names(verb) == OPTIONS[verb]


def test_options_of_train_are_the_keys_of_the_file():
    expected = {f"--{field.name}" for field in dataclasses.fields(TrainConfig)}
    assert expected | {"--config", "--print_config", "--data.clips", "--optimisation.learning_rate"} <= names("train")


@pytest.mark.parametrize("options", [GenerateOptions, DecodeOptions, InfoOptions, EvaluateOptions])
def test_every_option_has_help_that_is_shown(options, capsys):
    verb = next(name for name, verb in cli.VERBS.items() if verb.options is options)
    with pytest.raises(SystemExit, match="0"):
        cli.main([verb, "--help"])
    shown = " ".join(capsys.readouterr().out.split()).replace("- ", "-")
    documented = {p.arg_name: p.description for cls in options.__mro__[:-1] for p in parse_from_object(cls).params}
    for field in dataclasses.fields(options):
        assert " ".join(documented[field.name].split()).replace("- ", "-") in shown


def test_help_of_the_command_lists_every_verb(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and verb.summary in shown for name, verb in cli.VERBS.items())


def test_help_of_generate_is_in_groups(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "--help"])
    shown = capsys.readouterr().out
    places = [shown.index(text) for text in ("\n  --model", "\nhow to sample:", "\n  --steps", "\nwhat to start from:", "\n  --image")]
    assert places == sorted(places)
    assert len(shown.splitlines()) < 145


def test_help_of_train(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    assert "cogvideox train CONFIG.yaml" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == "cogvideox 0.1.0\n"


def test_help_needs_no_library_of_models():
    """The package's own __init__, which diffusers looks into, loads them; nothing on the way to the help does."""
    program = """
import sys, types
package = types.ModuleType("diffusers_cogvideox")
package.__path__ = sys.argv[1:]
sys.modules["diffusers_cogvideox"] = package  # without running its __init__
from diffusers_cogvideox.cli import main
try:
    main(["generate", "--help"])
finally:
    assert not {"torch", "diffusers", "transformers"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, *diffusers_cogvideox.__path__], check=True, capture_output=True)


# --- what arrives at the verbs ------------------------------------------------------------------------------------------


def test_defaults(handed):
    assert cli.main(["generate", "a red circle"]) == 0
    assert cli.main(["info"]) == 0
    assert cli.main(["evaluate", "shapes"]) == 0
    assert cli.main(["decode", "a.safetensors"]) == 0
    expected = [GenerateOptions("a red circle"), InfoOptions("demo"), EvaluateOptions("shapes", "demo"), DecodeOptions("a.safetensors")]
    assert handed == expected


def test_every_flag_of_decode_arrives(handed):
    flags = "--model m --output o --layout vae --fps 16 --dtype bfloat16 --device cpu --tiling --overwrite"
    assert cli.main(["decode", "z", *flags.split()]) == 0
    given = {"model": "m", "output": "o", "layout": "vae", "fps": 16, "dtype": "bfloat16", "device": "cpu"}
    assert handed == [DecodeOptions("z", tiling=True, overwrite=True, **given)]


def test_every_flag_arrives(handed):
    flags = "--model m --output o --seed 3 --steps 7 --guidance-scale 2.5 --size 64x96 --frames 9 --fps 16 --dtype bfloat16"
    flags += " --device cpu --negative-prompt blue --num-videos 2 --sampler dpm --overwrite --preview --checkpoint-every 5"
    flags += " --image i --last-image j --fit contain --lora a --lora b:0.5 --lora-alpha 64 --tiling --save-latents"
    assert cli.main(["generate", "12", *flags.split()]) == 0
    expected = GenerateOptions(
        "12",
        model="m",
        output="o",
        seed=3,
        steps=7,
        guidance_scale=2.5,
        size="64x96",
        frames=9,
        fps=16,
        dtype="bfloat16",
        device="cpu",
        negative_prompt="blue",
        num_videos=2,
        sampler="dpm",
        overwrite=True,
        preview=True,
        checkpoint_every=5,
        image="i",
        last_image="j",
        fit="contain",
        lora=("a", "b:0.5"),
        lora_alpha=64.0,
        tiling=True,
        save_latents=True,
    )
    assert handed == [expected]


@pytest.mark.parametrize("flags", ["--video v --strength 0.5", "--video v --mask m", "--control c --frames 5", "--extend e --frames 5"])
def test_other_sources_arrive(flags, handed):
    assert cli.main(["generate", "x", *flags.split()]) == 0
    words = flags.replace("--", "").split()
    numbers = {"strength": float, "frames": int}
    expected = {name: numbers.get(name, str)(value) for name, value in zip(words[::2], words[1::2], strict=True)}
    assert handed == [GenerateOptions("x", **expected)]


def test_booleans_can_be_turned_off(handed):
    assert cli.main(["evaluate", "shapes", "folder", "--no-baselines"]) == 0
    assert handed == [EvaluateOptions("shapes", "folder", baselines=False)]


def test_train_reads_the_file_and_flags_override_it(handed, config):
    flags = ["--optimisation.learning_rate", "0.5", "--compile", "--model.norm_num_groups", "2", "--seed", "4"]
    assert cli.main(["train", str(config), *flags]) == 0
    (run,) = handed
    assert (run.task, run.seed, run.compile, run.optimisation.learning_rate) == ("vae", 4, True, 0.5)
    assert run.model == {"latent_channels": 4, "norm_num_groups": 2}
    assert [dataclasses.astuple(stage)[:3] for stage in run.stages] == [(2, 3, 9)]
    assert (run.data.height, run.data.width, run.data.seed) == (32, 48, 0)


def test_train_runs_the_task(config, tmp_path, monkeypatch, capsys):
    from diffusers_cogvideox.training import curves, loop, vae

    monkeypatch.setattr(curves, "plot_curves", lambda _, path: path)
    monkeypatch.setattr(vae, "VAETask", lambda config: ("task", config))
    monkeypatch.setattr(loop, "run", lambda config, task, _: Path(config.output) / ("final" if task == ("task", config) else "wrong"))
    assert cli.main(["train", str(config)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "the trained model is in run/final\nthe curves are in run/curves.png\n"
    assert "training the vae in run" in captured.err


def test_train_prints_the_resolved_config(config, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", str(config), "--seed", "9", "--print_config"])
    shown = capsys.readouterr().out
    assert "seed: 9" in shown
    assert "learning_rate: 0.001" in shown


def test_info_of_a_folder(folder, capsys):
    assert cli.main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pipeline"] == "CogVideoXPipeline"


# --- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "required: VERB"),
        ("make x", "invalid choice: 'make'"),
        ("generate", "required: prompt"),
        ("generate x --stops 3", "unrecognized arguments: --stops 3"),
        ("generate x --step 3", "unrecognized arguments: --step 3"),
        ("generate x --steps many", "--steps many is not possible: expected int"),
        ("generate x --guidance-scale x", "--guidance-scale x is not possible: expected float"),
        ("generate x --dtype half", "--dtype half is not possible: expected one of 'float32', 'bfloat16', 'float16'"),
        ("generate x --size 64", "--size '64' is not a size: write height x width"),
        ("generate x --steps 0", "--steps 0 is not possible: it must be at least 1"),
        ("generate x --guidance-scale nan", "--guidance-scale nan is not possible"),
        ("generate x --guidance-scale .inf", "--guidance-scale inf is not possible: it must be at least 0, and finite"),
        ("generate a red circle", "unrecognized arguments: red circle (a text with spaces needs quotes)"),
        ("generate x --seed -1", "--seed -1 is not possible"),
        ("generate x --seed 9223372036854775808", "it must be below 2**63"),
        ("generate x --num-videos 0", "--num-videos 0 is not possible"),
        ("generate x --image a --video b", "--image and --video cannot be combined: start from"),
        ("generate x --image a --extend b", "--image and --extend cannot be combined"),
        ("generate x --last-image a --control b", "--last-image and --control cannot be combined"),
        ("generate x --mask a", "--mask says which part of a video to make anew: add --video"),
        ("generate x --image b --mask a", "--image and --mask cannot be combined"),
        ("generate x --strength 0.5", "--strength 0.5 has an effect only with --video"),
        ("generate x --image a --strength 0.5", "--strength 0.5 has an effect only with --video"),
        ("generate x --video a --mask b --strength 0.5", "--strength 0.5 has an effect only with --video, and without --mask"),
        ("generate x --video a --strength 0", "--strength 0.0 is not possible: it must be above 0"),
        ("generate x --video a --strength 1.5", "--strength 1.5 is not possible"),
        ("generate x --video a --frames 9", "--frames 9 has no effect with --video"),
        ("generate x --fit cover", "--fit cover has no effect without a picture or a video"),
        ("generate x --image a --fit crop", "--fit crop is not possible: expected one of 'cover', 'contain', 'stretch'"),
        ("generate x --lora-alpha 4", "--lora-alpha 4.0 has no effect without --lora"),
        ("generate x --lora a --lora-alpha 0", "--lora-alpha 0.0 is not possible: it must be positive"),
        ("generate x --extend a --save-latents", "--save-latents is not possible with --extend"),
        ("decode", "required: latents"),
        ("decode nowhere.safetensors", "there is no file nowhere.safetensors"),
        ("decode x --layout sat", "--layout sat is not possible: expected one of 'pipeline', 'vae'"),
        ("decode x --fps 0", "--fps 0 is not possible: it must be at least 1"),
        ("generate x --checkpoint-every 0", "--checkpoint-every 0 is not possible: it must be at least 1"),
        ("evaluate quality", "expected one of 'shapes'"),
        ("evaluate shapes --batch-size 0", "--batch-size 0 is not possible"),
        ("evaluate shapes --no-baselines --untrained-prompts 9", "--untrained-prompts has no effect with --no-baselines"),
        ("train", "required: task, output, model, stages"),
        ("train missing.yaml", "File does not exist"),
        ("train --optimisation.learning_rate x", "--optimisation.learning_rate x is not possible: expected float"),
        ("info nowhere", "there is no folder 'nowhere'"),
    ],
)
def test_mistakes_are_one_line_with_status_2(arguments, message, capsys):
    line = failure(capsys, *arguments.split())
    assert line.startswith("cogvideox")
    assert message in line


@pytest.mark.parametrize("replacement", [("seed", "sead: 1\nseed"), ("height", "heigth"), ("batch_size", "batchsize")])
def test_unknown_keys_of_the_file_are_errors(replacement, config, capsys):
    config.write_text((TRAIN + "seed: 0\n").replace(*replacement))
    assert "accept" in failure(capsys, "train", str(config))


def test_an_impossible_stage_is_an_error(config, capsys):
    config.write_text(TRAIN.replace("steps: 2", "steps: 0"))
    assert "steps=0" in failure(capsys, "train", str(config))


def test_termination_ends_a_run_as_ctrl_c_does(monkeypatch, capsys):
    monkeypatch.setitem(cli.VERBS, "info", dataclasses.replace(cli.VERBS["info"], run=lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["info"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "stopped" in capsys.readouterr().err


def test_a_verb_runs_in_any_thread(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "info", dataclasses.replace(cli.VERBS["info"], run=lambda _: "done"))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cli.main, ["info"]).result() == 0


def test_collections_of_garbage_leave_out_what_was_imported(monkeypatch):
    """And are afterwards as before, also where a program has set aside objects of its own."""
    frozen, seen = [0], []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen[0])
    monkeypatch.setattr(gc, "freeze", lambda: frozen.__setitem__(0, 5))
    monkeypatch.setattr(gc, "unfreeze", lambda: frozen.__setitem__(0, 0))
    monkeypatch.setattr("diffusers_cogvideox.generation.generate.generate", lambda _: seen.append(frozen[0]) or [])
    for before, during in ((0, 5), (3, 3)):
        frozen[0] = before
        assert cli.main(["generate", "a prompt"]) == 0
        assert (seen.pop(), frozen[0]) == (during, before)


def test_ctrl_c_gives_130(monkeypatch, capsys):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "info", dataclasses.replace(cli.VERBS["info"], run=stop))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\ncogvideox info: stopped\n"


@pytest.mark.parametrize(("stub", "status", "said"), [("raise KeyboardInterrupt", 130, "\ncogvideox: stopped\n"), ("", 3, "")])
def test_ctrl_c_during_the_imports(stub, status, said, tmp_path):
    """The installed command, over a package whose import is interrupted."""
    source = Path(diffusers_cogvideox.__file__).parents[1]
    package = tmp_path / "diffusers_cogvideox"
    package.mkdir()
    (package / "__init__.py").write_text(stub)
    (package / "cli.py").write_text("def main(): return 3")
    program = "import sys; sys.path[:0] = sys.argv[1:]; from cogvideox_command import main; sys.exit(main())"
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(source)], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (status, said)
    assert "cogvideox = cogvideox_command:main" in (source.parent / "setup.cfg").read_text()


def test_defects_are_not_hidden(monkeypatch):
    def fail(options):
        raise RuntimeError("a defect")

    monkeypatch.setitem(cli.VERBS, "info", dataclasses.replace(cli.VERBS["info"], run=fail))
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["info"])


def test_sizes():
    assert parse_size("480x720") == parse_size(" 480 X 720 ") == (480, 720)
    for text in ("480", "480x", "480x720x3", "-480x720", "480.0x720"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(text)


def test_the_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["__main__.py", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("diffusers_cogvideox", run_name="__main__")
    assert capsys.readouterr().out == "cogvideox 0.1.0\n"
