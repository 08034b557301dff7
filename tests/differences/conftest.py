"""Our pipelines and diffusers' over the same tiny folders."""

from collections.abc import Callable
from functools import cache

import pytest

from tiny_pipeline import save_stock_folder


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """loaded(pipeline class, variant="5b", sampler="ddim"): a folder that diffusers saved, in that class, loaded once."""
    folder = cache(lambda variant, sampler: save_stock_folder(tmp_path_factory.mktemp(variant), variant, sampler))
    return cache(lambda cls, variant="5b", sampler="ddim": cls.from_pretrained(folder(variant, sampler)))
