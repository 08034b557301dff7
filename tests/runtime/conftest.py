"""A tiny pipeline for the tests of what runs inside it."""

from pathlib import Path

import pytest

from diffusers_cogvideox import CogVideoXPipeline
from tiny_pipeline import save_stock_folder


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> CogVideoXPipeline:
    """The tiny 5B pipeline, loaded once."""
    folder: Path = save_stock_folder(tmp_path_factory.mktemp("tiny"))
    return CogVideoXPipeline.from_pretrained(folder)


@pytest.fixture
def pipe(loaded: CogVideoXPipeline) -> CogVideoXPipeline:
    """A new pipeline object over the same models."""
    return CogVideoXPipeline(**loaded.components)
