"""Markers, offline mode and small helpers for the whole suite."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

pytest_plugins = ["pipeline_fixtures"]

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes minutes, run with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --slow runs it"))


def pytest_collection_finish() -> None:
    """What is imported stays: the collections of garbage that pipelines ask for need not go through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def modes_come_back() -> Iterator[None]:
    """A mode that one test leaves behind would change what later ones see."""
    yield
    left, _ = torch.is_grad_enabled(), torch.set_grad_enabled(True)
    assert left, "gradients are still off after this test"


@pytest.fixture
def reference() -> Path:
    """Folder with recorded outputs of the original code; its tests are skipped where it is absent."""
    if not REFERENCE.is_dir():
        pytest.skip(f"reference outputs of the original code are not at {REFERENCE}")
    return REFERENCE
