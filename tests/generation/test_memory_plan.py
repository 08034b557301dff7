"""`cogvideox plan`, and what `cogvideox generate` does with the same budgets."""

import json
import shutil
from pathlib import Path

import pytest

from diffusers_cogvideox import PRESETS, cli
from diffusers_cogvideox.generation.memory_plan import plan_for
from diffusers_cogvideox.generation.plan_options import PlanOptions


def printed(capsys, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def mistake(capsys, *arguments: str) -> str:
    """The one line of an error with status 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    (line,) = [line for line in captured.err.splitlines() if "error:" in line]
    return line


def test_options_are_pinned():
    actions = [action for action in cli.parser_for("plan")._actions if action.dest != "help"]
    names = {name for action in actions for name in (action.option_strings or [action.dest])}
    sizes = {"--size", "--frames", "--window", "--videos", "--steps"}
    expected = sizes | {"model", "--vram", "--ram", "--dtype", "--device", "--quantisation"}
    assert names == expected | {f"--{no}{name}" for name in ("guidance", "json") for no in ("", "no-")}


def test_help_says_which_unit_is_meant(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["plan", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "GB are 10**9 bytes, GiB 2**30" in shown


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_release_fits_into_24_gb(name, capsys):
    """By name and by repository, without network or weights."""
    text = printed(capsys, name, "--vram", "24GB", "--ram", "64GB")
    assert text.startswith(f"{name} in {PRESETS[name].dtype}: {PRESETS[name].num_frames} frames of")
    assert printed(capsys, PRESETS[name].repo_ids[0], "--vram", "24GB", "--ram", "64GB") == text


def test_what_is_asked_for_is_planned():
    options = PlanOptions("5b", vram="8GB", ram="32GB", size="256x384", frames=9, videos=2, steps=7, guidance=False, dtype="float32")
    plan = plan_for(options)
    work = plan.work
    assert (work.height, work.width, work.num_frames, work.videos, work.steps, work.guided) == (256, 384, 9, 2, 7, False)
    assert (plan.dtype, plan.device, plan.vram, plan.ram) == ("float32", "cuda", 8 * 10**9, 32 * 10**9)


def test_a_long_video_in_windows_needs_no_more_for_its_passes(capsys):
    long, windows, short = (
        plan_for(PlanOptions("5b", vram="24GB", ram="64GB", frames=frames, window=window))
        for frames, window in ((193, None), (193, 49), (49, None))
    )

    def denoising(plan, value="device"):
        return next(getattr(stage, value) for stage in plan.stages if stage.name == "denoise")

    assert windows.transformer == short.transformer
    assert denoising(short) < denoising(windows) < 1.1 * denoising(short)  # its latents, beside the same passes
    assert denoising(windows) < denoising(long)
    assert windows.work.windows == 6  # 49 latent frames in windows of 13 that share 4 and move
    assert 5.9 < denoising(windows, "seconds") / denoising(short, "seconds") < 6.1
    assert printed(capsys, "5b", "--vram", "24GB", "--frames", "193", "--window", "49").startswith(
        "5b in bfloat16: 193 frames of 480x720 in windows of 49, 50 steps with guidance"
    )


def test_a_folder_needs_only_its_configs(folders, tmp_path, capsys):
    folder = shutil.copytree(folders(), tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    told = json.loads(printed(capsys, str(folder), "--device", "cpu", "--json"))
    assert (told["device"], told["work"]["num_frames"], told["work"]["height"]) == ("cpu", 9, 64)
    assert [stage["name"] for stage in told["stages"]] == ["load", "text", "denoise", "decode"]
    alone = Path(folder) / "transformer"
    (alone / "weights.safetensors").touch()
    assert json.loads(printed(capsys, str(alone), "--json"))["work"]["num_frames"] == 9


def test_the_shipped_models_have_plans(capsys):
    assert "in memory throughout" in printed(capsys, "demo", "--device", "cpu")
    assert "encode" in printed(capsys, "demo-i2v", "--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan", "required: model"),
        ("plan 5b --vram 8", "--vram '8' does not say how much memory"),
        ("plan 5b --vram 0GB", "--vram 0 bytes is not possible"),
        ("plan 5b --ram 8TB", "--ram '8TB' does not say how much memory"),
        ("plan 5b --size 480", "--size '480' is not a size"),
        ("plan 5b --size 8x720", "size 8x720 (height x width) is not possible"),
        ("plan 5b --frames 0", "--frames 0 is not possible"),
        ("plan 5b --window 0", "--window 0 is not possible"),
        ("plan 5b --window 50", "Context windows of frames=50 are not possible"),
        ("plan 5b --videos 0", "--videos 0 is not possible"),
        ("plan 5b --steps many", "--steps many is not possible: expected int"),
        ("plan 7b", "there is no folder '7b'"),
        ("plan 7b", "Known by name are 2b, 5b, 5b-i2v"),
        ("plan 5b --vram 8GB --device cpu", "--vram 8GB has no meaning with --device cpu"),
        ("plan 5b --vram 1GB", "The smallest budget that works is"),
        ("plan 5b --quantisation int3", "quantisation 'int3' is unknown: use one of int8, "),
        ("plan 5b --vram 8GB --quantisation int8-dynamic", "slower than bfloat16 until the blocks are compiled"),
        ("generate x --quantisation nf4 --device cpu --output OUT", "'nf4' does not run on cpu"),
        ("generate x --vram 8", "Did you mean 8GB?"),
        ("generate x --ram 1MB --output OUT", "does not fit into 1.00 MB of RAM. The smallest budget that works is"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path):
    assert message in mistake(capsys, *arguments.replace("OUT", str(tmp_path)).split())


def test_a_quantisation_is_allowed_not_demanded(capsys):
    told = json.loads(printed(capsys, "5b", "--vram", "8GB", "--quantisation", "nf4", "--json"))
    assert told["transformer"]["quantisation"] is None
    assert [reason for reason in told["reasons"] if reason.startswith("nf4 is not used: the result stays the same without")]


def test_a_video_carries_its_plan_and_what_it_took(folders, tmp_path, capsys):
    output = tmp_path / "a.mp4"
    arguments = ["generate", "a red circle", "--model", str(folders()), "--output", str(output), "--steps", "2", "--ram", "8GB"]
    assert cli.main([*arguments, "--size", "32x48", "--quantisation", "fp8-cast"]) == 0
    assert "at the peak" in capsys.readouterr().err
    recipe = json.loads(output.with_suffix(".json").read_text())
    memory = recipe["memory"]
    assert recipe["settings"]["quantisation"] == "fp8-cast"  # what was allowed; and what was done
    assert memory["plan"]["transformer"]["quantisation"] is None
    assert memory["plan"]["ram"] == 8 * 10**9
    assert list(memory["stages"]) == ["encode", "text", "denoise", "decode"]
    assert memory["stages"]["decode"]["predicted_host"] > 0
    assert memory["stages"]["decode"]["host"] > 0
