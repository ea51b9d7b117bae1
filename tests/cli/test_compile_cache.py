"""Commands that compile for minutes keep what they compiled, unless they are told not to."""

import pathlib

import jax
import pytest

from longlive_jax.cli import options, train
from longlive_jax.cli.main import main

CONFIG = pathlib.Path(__file__).parents[2] / "configs/toy/text.py"


@pytest.fixture
def calls(monkeypatch):
    """What commands ask of the cache, and that it was before their work."""
    found = []
    monkeypatch.setattr(options, "enable_compile_cache", found.append)
    monkeypatch.setattr(train, "train", lambda *_, **__: found.append("work") or 0)
    monkeypatch.setattr("longlive_jax.verify.verify_layers", lambda *_, **__: found.append("work"))
    return found


@pytest.mark.parametrize(
    ("words", "wanted"), [([], None), (["--no-compile-cache"], False), (["--compile-cache"], True)]
)
@pytest.mark.parametrize(
    "command", [["train", str(CONFIG)], ["verify", "toy", "--layers"]], ids=lambda c: c[0]
)
def test_commands_say_what_was_asked_for(command, words, wanted, calls):
    assert main([*command, *words]) == 0
    assert calls == [wanted, "work"]


def test_not_wanted_changes_nothing(monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("a setting was changed"))
    assert options.enable_compile_cache(False) is False
