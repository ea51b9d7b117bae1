"""How the work of the kernels is cut."""

import dataclasses

import pytest

from longlive_jax.ops.windowed_attention import tiling as tilings
from longlive_jax.ops.windowed_attention.tiling import BackwardTiling, Problem, Tiling

WAN = Problem(batch=1, heads=12, query_len=4680, key_len=18720, head_dim=128)
H200 = {"device_kind": "NVIDIA H200", "multiprocessors": 132}


@pytest.mark.parametrize(
    "change", [{"block_q": 32}, {"block_kv": 100}, {"stages": 1}, {"splits": 0}, {"compute_registers": 248}]
)
def test_impossible_tilings_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change)).split("_")[0]):
        Tiling(**change)


def test_impossible_backward_tilings_are_refused():
    with pytest.raises(ValueError, match="block_held=96 must be a multiple of 64"):
        BackwardTiling(block_held=96)


def test_the_rule_fills_the_multiprocessors():
    """444 tiles on 132 multiprocessors are 3.4 waves; twice as many shares waste less."""
    chosen = tilings.choose(WAN, **H200)
    blocks = 444 * chosen.splits
    waves = -(-blocks // 132)
    assert blocks / (132 * waves) > 0.9
    assert chosen.stages == 3
    assert chosen.fits(WAN.head_dim)


@pytest.mark.parametrize("key_len", [1, 512])
def test_few_keys_are_not_split(key_len):
    """Joining the shares of attention to the text would take longer than the attention."""
    assert tilings.choose(dataclasses.replace(WAN, key_len=key_len), **H200).splits == 1


def test_a_measured_tiling_goes_before_the_rule(monkeypatch):
    measured = Tiling(block_kv=64, stages=4, splits=3)
    monkeypatch.setattr(tilings, "TUNED", {("NVIDIA H200", WAN): measured})
    assert tilings.choose(WAN, **H200) == measured
    assert tilings.choose(WAN, device_kind="NVIDIA H100", multiprocessors=132) != measured


def test_candidates_fit_and_begin_with_the_rule():
    found = tilings.candidates(WAN, multiprocessors=132)
    assert found[0] == tilings.heuristic(WAN, multiprocessors=132)
    assert len(set(found)) == len(found) > 8
    assert all(t.fits(WAN.head_dim) for t in found)
