"""Importing the package is cheap, and its public names are there."""

import subprocess
import sys
import time

import pytest

import longlive_jax


def test_import_is_fast_and_touches_no_device():
    script = """
import sys, time
start = time.perf_counter()
import longlive_jax
seconds = time.perf_counter() - start
heavy = sorted({"jax", "torch", "flax", "av", "PIL"} & set(sys.modules))
longlive_jax.preset("wan_1_3b"), longlive_jax.Story("a"), longlive_jax.UserError
print(heavy, "jax" in sys.modules, seconds)
longlive_jax.Pipeline
import jax._src.xla_bridge as bridge
print(bridge.backends_are_initialized(), "torch" in sys.modules)
"""
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert time.perf_counter() - start < 30  # the whole of it, importing jax and flax included
    first, second = out.splitlines()
    heavy, seconds = first.rsplit(" ", 1)
    assert heavy == "[] False"
    assert float(seconds) < 1.5
    assert second == "False False"


def test_every_public_name_resolves():
    for name in longlive_jax.__all__:
        assert getattr(longlive_jax, name) is not None
        assert name in dir(longlive_jax)
    assert longlive_jax.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        longlive_jax.Pipelin  # noqa: B018
