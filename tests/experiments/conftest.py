"""A checkpoint to run studies on, and an empty place for their results."""

import functools

import pytest

from tests.toy.conftest import smoke_checkpoint  # noqa: F401  (the same random model)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    """Compiled programs and prompt embeddings, kept from test to test."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path, monkeypatch, shared_cache):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLIVE_CACHE", str(shared_cache))
    return tmp_path


@pytest.fixture(scope="session")
def checkpoint_of(smoke_checkpoint):  # noqa: F811
    """A checkpoint directory of random weights by seed, written once."""
    return functools.cache(smoke_checkpoint)
