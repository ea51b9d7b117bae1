"""Commands that compile for minutes keep what they compiled, unless they are told not to."""

import pathlib

import pytest

from longlive_jax.cli import options, train
from longlive_jax.cli.main import main

CONFIG = pathlib.Path(__file__).parents[2] / "configs/toy/text.py"


@pytest.mark.parametrize(
    ("words", "enabled"), [([], 1), (["--no-compile-cache"], 0), (["--compile-cache"], 1)]
)
def test_train(words, enabled, monkeypatch):
    calls = []
    monkeypatch.setattr(options, "enable_compile_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(train, "train", lambda *_, **__: calls.append("train") or 0)
    assert main(["train", str(CONFIG), *words]) == 0
    assert calls == ["cache"] * enabled + ["train"]


@pytest.mark.parametrize(("words", "enabled"), [([], 1), (["--no-compile-cache"], 0)])
def test_verify(words, enabled, monkeypatch):
    calls = []
    monkeypatch.setattr(options, "enable_compile_cache", lambda: calls.append("cache"))
    monkeypatch.setattr("longlive_jax.verify.verify_layers", lambda *_, **__: calls.append("verify"))
    assert main(["verify", "toy", "--layers", *words]) == 0
    assert calls == ["cache"] * enabled + ["verify"]
