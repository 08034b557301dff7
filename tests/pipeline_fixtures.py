"""Tiny folders and pipelines for the tests of pipelines and of the command line."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from diffusers.utils import logging

from diffusers_cogvideox import CogVideoXPipeline
from parity import StockPipeline
from tiny_pipeline import save_stock_folder

Folders = Callable[..., Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """folders(variant="5b", sampler="ddim") is a folder that diffusers saved; made once."""
    return cache(lambda variant="5b", sampler="ddim": save_stock_folder(tmp_path_factory.mktemp(variant), variant, sampler))


@pytest.fixture(scope="session")
def loaded(folders: Folders) -> Callable:
    """loaded(pipeline class, variant, sampler): that folder's components in that class, loaded once."""
    return cache(lambda cls, variant="5b", sampler="ddim": cls.from_pretrained(folders(variant, sampler)))


@pytest.fixture
def pipe(loaded: Callable) -> CogVideoXPipeline:
    """Our tiny 5B pipeline with DDIM; a new object in every test, over shared models."""
    return CogVideoXPipeline(**loaded(CogVideoXPipeline).components)


@pytest.fixture
def stock(loaded: Callable) -> StockPipeline:
    """Diffusers' pipeline over the same folder."""
    return StockPipeline(**loaded(StockPipeline).components)


@pytest.fixture
def reported(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Turns diffusers' way of logging on at the level of info, and gives what was logged."""
    logging.enable_propagation()
    caplog.set_level("INFO", logger="diffusers_cogvideox")
    yield caplog
    logging.disable_propagation()
