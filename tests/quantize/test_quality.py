"""The benchmark of quality: its plan, its differences, its table; and once from a checkpoint to the JSON."""

import json
import pathlib

import numpy as np
import pytest

from benchmarks import quantize_quality, toy_model
from tests.toy.conftest import smoke_checkpoint  # noqa: F401

SETTINGS = toy_model.Settings(clips=16, seeds=(1,), batch=16, frames=6, long_frames=9, switch_frames=6)


def tables():
    """Made-up measurements: int8 loses 0.5 points in every clip, fp8 loses 5."""
    random, found = np.random.default_rng(0), {}
    cells = quantize_quality.plan(SETTINGS, recipes=("none", "int8", "fp8"), caches=("same", "int8"))
    base = {measure: random.uniform(0.2, 0.8, 16) for measure in quantize_quality.MEASURES}
    for cell in cells:
        loss = {"none": 0.0, "int8": 0.005, "fp8": 0.05}[cell.overrides["quantization"]]
        found[cell.name] = {measure: values - loss for measure, values in base.items()}
    return found


def test_every_recipe_with_and_without_a_quantised_cache_at_both_lengths():
    cells = quantize_quality.plan(SETTINGS, recipes=quantize_quality.RECIPES, caches=("same", "int8"))
    assert len(cells) == 16
    assert [cell.frames for cell in cells[:2]] == [6, 9]
    assert cells[0].overrides == {"quantization": "none", "cache_dtype": "same"}
    assert {cell.kind for cell in cells} == set(quantize_quality.KINDS)


def test_differences_are_those_from_full_precision_in_points():
    found = tables()
    rows = quantize_quality.differences(found)
    compared = {(row["kind"], row["variant"]) for row in rows}
    assert len(compared) == 10
    assert ("clip", quantize_quality.PLAIN) not in compared
    for row in rows:
        loss = {"none": 0, "int8": -0.5, "fp8": -5}[row["variant"].split(",")[0]]
        assert row["difference"] == pytest.approx(loss, abs=1e-3)
        assert row["differs"] == (loss != 0)
    assert quantize_quality.verdict(rows) == {
        kind: {"loss": 0.5, "at_most": 0.5, "passes": True} for kind in ("clip", "long")
    }
    estimates = {name: toy_model.summarise(table) for name, table in found.items()}
    text = quantize_quality.table_of(rows, estimates)
    assert len(text.splitlines()) == 2 + 6
    assert "| fp8, int8 cache | " in text
    assert "(-5.0, -5.0 to -5.0)" in text


@pytest.mark.slow
def test_from_a_checkpoint_to_the_result_and_again_from_its_cells(
    smoke_checkpoint,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path / "cache"))
    words = [str(smoke_checkpoint(0)), "--clips", "2", "--seeds", "1", "--batch", "2", "--frames", "6"]
    words += [
        "--long-frames",
        "9",
        "--recipes",
        "none",
        "int8",
        "--json",
        "r.json",
        "--cells",
        "cells",
        "--quiet",
    ]
    assert quantize_quality.main(words) == 0
    result = json.loads(pathlib.Path("r.json").read_text())
    assert len(result["cells"]) == 8
    assert set(result["int8_loses_points"]) == {"clip", "long"}

    def fail(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(toy_model, "measure", fail)
    assert quantize_quality.main(words) == 0
    assert json.loads(pathlib.Path("r.json").read_text())["cells"] == result["cells"]
