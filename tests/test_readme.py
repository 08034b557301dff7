"""What the README says can be done: its Python runs, its commands parse, its links and make targets exist."""

import re
import shlex
from pathlib import Path

import diffusers
import pytest

import diffusers_cogvideox
from diffusers_cogvideox import cli, demo
from diffusers_cogvideox.generation.batch import read_items
from diffusers_cogvideox.options import GenerateOptions
from tiny_pipeline import save_stock_folder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines() if line]
HUB = re.compile(r'"zai-org/[\w.-]+"')


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_stock_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def restored():
    """Undo a `register()` that a block leaves behind."""
    before = {name: vars(diffusers).get(name) for name in diffusers_cogvideox.host.REPLACED}
    yield
    if diffusers_cogvideox.host._count:
        diffusers_cogvideox.unregister()
    assert {name: vars(diffusers).get(name) for name in before} == before


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_runs(code, folder, tmp_path, monkeypatch, restored):
    """A tiny folder stands in for hub repositories and the shipped model, the processor for the GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "demo_model", lambda: folder)
    assert len(code.splitlines()) <= 10
    code = HUB.sub(repr(str(folder)), code).replace('"cuda"', '"cpu"')
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("cogvideox ")])
def test_commands_parse(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, verb, *arguments = shlex.split(line)
    assert isinstance(cli._parse(verb, arguments), cli.VERBS[verb].options)


def test_batches_are_understood(tmp_path):
    for number, code in enumerate(code for language, code in BLOCKS if language == "json"):
        (tmp_path / f"{number}.jsonl").write_text(code)
        assert len(read_items(GenerateOptions(str(tmp_path / f"{number}.jsonl")))) == len(code.splitlines())
    assert (tmp_path / "0.jsonl").exists()


DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_targets_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    assert not [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert not [target for target in re.findall(r"\bmake (\w+) ", text) if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


def test_figures_name_their_source():
    """Every number in the README's measured section stands beside the JSON file that it comes from."""
    measured = README.split("## Measured")[1].split("\n## ")[0]
    named = re.findall(r"benchmarks/results/[\w/.-]+\.json", measured)
    assert not [name for name in named if not (ROOT / name).is_file()]
    assert named or not re.search(r"\d", measured)
