"""Expected shapes are remembered between starts, and traced again where they cannot be."""

import dataclasses

import jax
import pytest

from longlive_jax import user_cache
from longlive_jax.checkpoint import flatten
from longlive_jax.config import preset
from longlive_jax.convert import shapes

CONFIG = preset("toy")
PARTS = ("transformer", "text_encoder", "vae")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path))
    return tmp_path / "shapes"


def forget(monkeypatch):
    """What is traced from now on fails."""
    monkeypatch.setattr(shapes, "_traced", lambda part, config: pytest.fail(f"{part} was traced"))


@pytest.mark.parametrize("part", PARTS)
def test_the_second_time_nothing_is_traced(part, folder, monkeypatch):
    first = shapes.expected_tree(part, CONFIG)
    forget(monkeypatch)
    again = shapes.expected_tree(part, CONFIG)
    assert jax.tree.structure(first) == jax.tree.structure(again)
    for name, leaf in flatten(first).items():
        assert (leaf.shape, leaf.dtype) == (flatten(again)[name].shape, flatten(again)[name].dtype), name


def test_another_config_or_other_code_is_another_entry(folder, monkeypatch):
    shapes.expected_tree("text_encoder", CONFIG)
    wider = dataclasses.replace(CONFIG.text_encoder, ffn_dim=256)
    found = shapes.expected("text_encoder", dataclasses.replace(CONFIG, text_encoder=wider))
    assert any(256 in leaf.shape for leaf in found.values())
    monkeypatch.setattr(shapes, "_code", lambda: "changed")
    shapes.expected_tree("text_encoder", CONFIG)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": [[2], "no such type"]}'])
def test_a_broken_entry_is_made_again(content, folder):
    expected = shapes.expected("text_encoder", CONFIG)
    (file,) = folder.iterdir()
    whole = file.read_text()
    file.write_text(content)
    assert shapes.expected("text_encoder", CONFIG).keys() == expected.keys()
    assert file.read_text() == whole


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(user_cache.VARIABLE, str(tmp_path / "file"))
    assert shapes.expected("text_encoder", CONFIG)
