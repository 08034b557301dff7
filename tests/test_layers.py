"""The shape of the source tree, read with `ast`: import layers, sizes, documentation, types, repetition."""

import ast
import importlib
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import diffusers_cogvideox

ROOT = Path(diffusers_cogvideox.__file__).parent
PACKAGE = ROOT.name
# Community pipelines are run by diffusers, from outside the package.
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if "community/" not in path.as_posix())

# From the ground up; a part imports only from lower rows, never from its own.
LAYERS = [
    {"geometry", "presets", "files", "demo", "units"},
    {"video_io", "options", "tasks"},
    {"models", "schedulers", "checkpoints"},
    {"runtime", "data"},
    {"pipelines"},
    {"generation"},
    {"conversion", "training", "evaluation"},
    {"host", "community"},
    {"cli", "__init__"},
    {"__main__"},
]
FORBIDDEN = {("training", "pipelines")}  # a validation callback is handed in

MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS, RUN = 400, 60, 10, 6
# Signatures that diffusers prescribes: constructors carry every config key, calls every option of a pipeline.
MANDATED = {"__init__", "__call__", "forward", "step", "encode_prompt", "shared_arguments"}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


PUBLIC_NAMES = [
    "PRESETS",
    "AutoencoderKLCogVideoX",
    "CogVideoXContinuationPipeline",
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "CogVideoXFunControlPipeline",
    "CogVideoXFunInpaintPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXPipeline",
    "CogVideoXPipelineOutput",
    "CogVideoXScheduler",
    "CogVideoXTransformer3DModel",
    "CogVideoXVideoToVideoPipeline",
    "ContextWindows",
    "DiffusionPipeline",
    "Geometry",
    "ModelMixin",
    "SchedulerMixin",
    "SkipLayers",
    "community_pipeline",
    "match_preset",
    "register",
    "registered",
    "shifted_config",
    "unregister",
]


@cache
def tree(name):
    """Syntax tree of a source file, given relative to the package."""
    return ast.parse((ROOT / name).read_text(encoding="utf-8"))


def nodes(name, *kinds):
    return [node for node in ast.walk(tree(name)) if isinstance(node, kinds)]


def arguments(function):
    """All parameters of a function but self and cls."""
    spec = function.args
    named = [a for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs) if a.arg not in ("self", "cls")]
    return named, [a for a in (spec.vararg, spec.kwarg) if a]


def level(part):
    return next((i for i, row in enumerate(LAYERS) if part in row), None)


def part_of(name):
    return Path(name).parts[0].removesuffix(".py")


def imported_parts(name):
    """Top-level parts of the package that a file imports from."""
    base = [PACKAGE, *Path(name).parts[:-1]]
    for node in nodes(name, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        else:
            origin = (base[: len(base) - node.level + 1] if node.level else []) + (node.module or "").split(".") * bool(node.module)
            modules = [origin] if len(origin) > 1 else [[*origin, alias.name] for alias in node.names]
        for module in modules:
            if module[0] == PACKAGE:
                yield module[1] if len(module) > 1 and level(module[1]) is not None else "__init__"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name):
    part = part_of(name)
    assert level(part) is not None, f"{part} has no place in LAYERS"
    others = set(imported_parts(name)) - {part}
    assert not {other for other in others if level(other) >= level(part)}
    assert not {(part, other) for other in others} & FORBIDDEN


def test_the_import_reader_sees_upward_imports():
    """The check above can fail: the package's own __init__ imports from nearly everywhere."""
    assert {"models", "pipelines", "host", "geometry"} <= set(imported_parts("__init__.py"))
    assert "geometry" in set(imported_parts("models/autoencoder.py"))


@pytest.mark.parametrize("name", SOURCES)
def test_files_open_with_their_idea_and_their_names(name):
    module = tree(name)
    assert ast.get_docstring(module), "no module docstring"
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    # Pipelines leave annotations alive, because diffusers reads component classes from them.
    deferred = any(node.module == "__future__" for node in nodes(name, ast.ImportFrom))
    live_init = any(isinstance(base, ast.Name) and "Pipeline" in base.id for cls in nodes(name, ast.ClassDef) for base in cls.bases)
    assert deferred or live_init or len(module.body) == 1, "no `from __future__ import annotations`"
    declared = any(
        isinstance(target, ast.Name) and target.id == "__all__"
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
    )
    assert declared or len(module.body) == 1 or name == "__main__.py", "no __all__"


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "__main__.py"])
def test_declared_names_exist(name):
    module = importlib.import_module(".".join([PACKAGE, *Path(name).with_suffix("").parts]).removesuffix(".__init__"))
    declared = getattr(module, "__all__", [])
    assert len(set(declared)) == len(declared)
    assert all(hasattr(module, entry) for entry in declared)


def test_public_names_are_these():
    assert sorted(diffusers_cogvideox.__all__) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", SOURCES)
def test_functions_are_small_typed_and_documented(name):
    faults = []
    for function in nodes(name, *FUNCTIONS):
        named, rest = arguments(function)
        if function.end_lineno - function.lineno + 1 > MAX_FUNCTION:
            faults.append(f"{function.name} has more than {MAX_FUNCTION} lines")
        if len(named) > MAX_PARAMETERS and function.name not in MANDATED:
            faults.append(f"{function.name} has more than {MAX_PARAMETERS} parameters")
        faults += [f"{function.name}({argument.arg}) has no type" for argument in (*named, *rest) if argument.annotation is None]
    for owner in (tree(name), *nodes(name, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_") and not ast.get_docstring(node):
                faults.append(f"{node.name} has no docstring")
    assert not faults


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_that_does_not_belong_here(name):
    """No print, no permute over more than four axes, no unfinished work, no size arithmetic outside geometry.py."""
    calls = nodes(name, ast.Call)
    assert not [call.lineno for call in calls if getattr(call.func, "id", "") == "print"]
    assert not [call.lineno for call in calls if getattr(call.func, "attr", "") == "permute" and len(call.args) > 4]
    source = (ROOT / name).read_text(encoding="utf-8")
    assert not re.findall(r"\b(?:TODO|FIXME|XXX)\b", source)
    if name != "geometry.py":
        assert not re.findall(r"// [48]\b|- 1\) //|% patch_size|\* 4 \+ 1", source)


@cache
def statements(name):
    """Code lines with their numbers: no docstrings, comments, imports or lone brackets."""
    skipped = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and ast.get_docstring(node) is not None:
            node = node.body[0]
        elif not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), start=1)
    kept = ((number, line.strip()) for number, line in lines if number not in skipped)
    return [(number, line) for number, line in kept if not line.startswith("#") and re.search(r"\w", line)]


def test_no_code_is_repeated():
    """No run of six equal code lines stands in two places."""
    places = defaultdict(list)
    for name in SOURCES:
        code = statements(name)
        for start in range(len(code) - RUN + 1):
            places[tuple(line for _, line in code[start : start + RUN])].append(f"{name}:{code[start][0]}")
    assert not [where for where in places.values() if len(where) > 1]
