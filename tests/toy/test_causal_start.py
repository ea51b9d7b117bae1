"""The comparison of two causal students, from their exports to its JSON, on random weights."""

import json
import pathlib
import shutil

import pytest

from benchmarks import causal_start
from longlive_jax import storage


@pytest.fixture
def runs(smoke_checkpoint, tmp_path, monkeypatch):
    """Two runs with exports; the first has a report."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("forced", "ode")):
        pathlib.Path(name).mkdir()
        shutil.copytree(smoke_checkpoint(seed, stage="causal_init"), f"{name}/export")
    report = {"steps": 5, "resumed_at": 0, "seconds": 12.5, "seconds_per_step": 2.0, "scores": {}}
    storage.write_json("forced/report.json", report)
    return ["forced=forced/export", "ode=ode/export"]


def test_two_exports_are_measured_on_the_same_scenes(runs, capsys):
    few = ["--clips", "2", "--seeds", "1", "2", "--batch", "2", "--frames", "6", "--json", "r.json"]
    assert causal_start.main([*runs, *few, "--quiet"]) == 0
    out = capsys.readouterr().out
    result = json.loads(pathlib.Path("r.json").read_text())
    assert list(result["exports"]) == ["forced", "ode"]
    assert result["generation"]["sampler"]["steps"] == [1000, 750, 500, 250]
    for export in result["exports"].values():
        assert set(export["scores"]) == set(causal_start.MEASURES)
        for found in export["scores"].values():
            assert found["clips"] == 4
            assert found["low"] <= found["mean"] <= found["high"]
    assert result["exports"]["forced"]["training"]["seconds"] == 12.5
    assert result["exports"]["ode"]["training"] == {}
    difference = result["differences"]["forced - ode"]["iou"]
    means = [export["scores"]["iou"]["mean"] for export in result["exports"].values()]
    assert difference["difference"] == pytest.approx(means[0] - means[1], abs=2e-4)
    assert difference["difference"] != 0  # other weights make other videos
    assert "trained in 12 s" in out
    assert "trained in unknown time" in out


def test_wrong_exports_are_refused_in_one_line(runs, capsys):
    for words, message in (
        (runs[:1], "two or more"),
        ([runs[0], runs[0]], "two or more"),
        (["a=x", "b=y"], "x"),
    ):
        assert causal_start.main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    assert not pathlib.Path("benchmarks").exists()
