"""Other people's code beside ours: the same numbers, and a row that says so where it is missing."""

import sys

import jax
import numpy as np
import pytest
import torch

from benchmarks import attention, common, floors, peers
from benchmarks.run import table
from benchmarks.suites import SUITES
from longlive_jax.models.transformer import Transformer, init_params

TINY = SUITES["tiny"]
RATES = floors.Rates(flops=1e12, bandwidth=1e12)

DELEGATING = """
import jax
def dot_product_attention(query, key, value, *, implementation):
    assert implementation == "xla"
    return jax.nn.dot_product_attention(query, key, value)
"""
REFUSING = """
def dot_product_attention(query, key, value, *, implementation):
    raise NotImplementedError("Not supported on cpu.")
"""


@pytest.fixture(autouse=True)
def _a_known_machine(monkeypatch):
    monkeypatch.setattr(peers, "measured_rates", lambda suite: RATES)
    monkeypatch.setattr(common, "torch_device", lambda: "cpu")


@pytest.fixture
def fill():
    arrays = attention._attention_arrays(TINY)
    return attention._Fill(TINY, RATES, arrays, length=arrays[3].shape[1] // 2)


def test_a_pass_of_ours_and_of_diffusers_side_by_side():
    ours, theirs = peers.peers(TINY)
    assert [ours["case"], theirs["case"]] == ["ours", "diffusers cpu"]
    assert ours["floor_seconds"] == theirs["floor_seconds"] > 0
    assert min(ours["seconds"], theirs["seconds"]) > 0
    assert float(theirs["difference"]) < 1e-5
    assert len(table({"peers": {"rows": [ours, theirs]}}).splitlines()) == 3


def test_ours_is_measured_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ours, theirs = peers.peers(TINY)
    assert ours["case"] == "ours"
    assert ours["seconds"] > 0
    assert theirs == {"case": "diffusers", "seconds": 0.0, "skipped": "diffusers is not installed"}


def test_half_precision_keeps_what_diffusers_keeps_in_float32():
    model = Transformer(TINY.transformer)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    theirs = peers.build_diffusers(TINY.transformer, params, dtype="bfloat16")
    types = {name: parameter.dtype for name, parameter in theirs.named_parameters()}
    assert types["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert types["blocks.0.scale_shift_table"] == torch.float32
    assert theirs.rope.freqs_cos.dtype == torch.float32


@pytest.fixture
def tokamax(tmp_path, monkeypatch):
    """Puts a package of that name where it is found."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tokamax", raising=False)

    def write(text):
        (tmp_path / "tokamax.py").write_text(text)

    yield write
    sys.modules.pop("tokamax", None)


def test_tokamax_gets_all_keys_as_one_array(fill, tokamax):
    tokamax(DELEGATING)
    (row,) = attention._tokamax_rows(fill, attention._tokamax([fill]), fill.exact())
    assert row["case"] == f"tokamax xla keys={fill.keys}"
    assert float(row["error"]) < 1e-5


def test_what_tokamax_refuses_costs_its_row_only(fill, tokamax):
    tokamax(REFUSING)
    (row,) = attention._tokamax_rows(fill, attention._tokamax([fill]), fill.exact())
    assert row["skipped"] == "Not supported on cpu."


def test_torch_attends_to_the_same_numbers(fill):
    (row,) = attention._torch_rows(fill, fill.exact())
    assert row["case"] == f"torch cpu keys={fill.keys}"
    assert float(row["error"]) < 1e-5
