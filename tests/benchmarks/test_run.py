"""What a suite stores: every part says where it was measured, and nothing that was measured is lost."""

import json
import sys

import pytest

from benchmarks import common, run
from benchmarks.parts import PARTS
from benchmarks.run import table

HERE = {"machine": {"processor": "one", "cores": 2, "devices": ["cpu"], "versions": {"jax": "1"}}}
THERE = {"machine": {"cores": 16, "devices": ["a GPU"], "versions": {"jax": "1"}}}
ATTENTION = {**THERE, "rows": [{"case": "keys=64", "seconds": 0.1}]}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Runs the tiny suite on made-up numbers, `suite.found`, and returns what is stored then."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "here", lambda: HERE)

    def measure(*options):
        monkeypatch.setattr(sys, "argv", ["run", "--suite", "tiny", *options])
        run.main()
        return run.stored("suite_tiny")

    measure.found = {"rows": [{"case": "new", "seconds": 0.2}]}
    monkeypatch.setattr(run, "measured", lambda part, suite, *, timeout: measure.found)
    return measure


def test_the_table_has_a_line_for_every_row_and_for_what_failed():
    rows = [
        {"case": "keys=64", "seconds": 0.002, "floor_seconds": 0.001, "times_floor": 2.0, "error": "1e-3"}
    ]
    text = table({"attention": {"rows": rows}, "vae": {"failed": "not done after 1 s"}})
    assert len(text.splitlines()) == 3
    assert "2.000" in text
    assert "failed: not done after 1 s" in text


def test_parts_of_another_machine_stay_beside_new_ones(suite):
    common.write("suite_tiny", {"attention": ATTENTION})
    assert suite("--only", "length") == {"attention": ATTENTION, "length": {**HERE, **suite.found}}
    assert suite("--only", "vae")["length"] == {**HERE, **suite.found}


@pytest.mark.parametrize("old", [ATTENTION, {**ATTENTION, **HERE, "xla_flags": "--xla_fast=true"}])
def test_a_part_from_elsewhere_is_not_replaced_unasked(suite, capsys, old):
    common.write("suite_tiny", {"attention": old})
    with pytest.raises(SystemExit, match=r"suite_tiny\.json holds attention .* --name, or add --replace"):
        suite("--only", "attention", "length")
    assert "..." not in capsys.readouterr().err, "nothing has been measured"
    assert run.stored("suite_tiny") == {"attention": old}
    assert suite("--only", "attention", "--name", "other") == {"attention": old}
    assert run.stored("other") == {"attention": {**HERE, **suite.found}}
    assert suite("--only", "attention", "--replace") == {"attention": {**HERE, **suite.found}}


def test_a_failure_does_not_replace_what_was_measured(suite):
    good = suite("--only", "length")
    suite.found = {"rows": [], "failed": "not done after 1 s"}
    assert suite("--only", "length") == good
    assert suite("--only", "vae")["vae"]["failed"] == "not done after 1 s"


def test_a_part_runs_in_a_process_that_says_how_much_memory_it_took():
    found = run.measured("tune", "tiny", timeout=300)
    assert [row["skipped"] for row in found["rows"]] == ["the default device is a cpu"]
    assert found["process_peak_mib"] > 50
    assert "failed" not in found


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("suite_*.json")), ids=lambda path: path.stem)
def test_every_stored_part_says_where_it_was_measured(path):
    parts = json.loads(path.read_text())
    assert parts.keys() <= PARTS.keys()
    for part in parts.values():
        assert part["machine"]["devices"]
        assert part["rows"]
