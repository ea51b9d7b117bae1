"""Starts: the first frame, memory and pairs, with a program in place of Python that takes no time."""

import subprocess
import sys

import pytest

from benchmarks import common, start_up

GENERATE = """#!/bin/sh
for out; do :; done
mkdir "${out%/}.partial-1"
: > "${out%/}.partial-1/frame_000000.png"
sleep 0.5
"""
FAIL = """#!/bin/sh
echo "there is no such checkpoint" >&2
exit 3
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script where Python is."""

    def put(text):
        path = tmp_path / "python"
        path.write_text(text)
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return put


def test_the_first_frame_is_there_before_the_process_ends(program, tmp_path):
    program(GENERATE)
    found = start_up.start(tmp_path / "checkpoint", tmp_path, "first")
    assert 0 < found["first_frame_seconds"] <= found["seconds"] - 0.4
    assert found["processor_seconds"] < 0.4
    assert 0 < found["process_peak_mib"] < 50


def test_a_start_that_fails_says_why(program, tmp_path):
    program(FAIL)
    with pytest.raises(RuntimeError, match=r"failed \(3\): there is no such checkpoint"):
        start_up.start(tmp_path / "checkpoint", tmp_path, "first")


def test_ratios_are_taken_pair_by_pair():
    pairs = [
        {"first": {"seconds": first}, "second": {"seconds": second}, "first_over_second": {"seconds": ratio}}
        for first, second, ratio in ((4, 2, 2), (9, 3, 3), (30, 3, 10))
    ]
    expected = {"first": {"seconds": 9}, "second": {"seconds": 3}, "first_over_second": {"seconds": 3}}
    assert start_up.medians(pairs) == expected


def test_the_memory_of_a_process_is_its_own():
    child = subprocess.Popen(["sleep", "60"])
    assert common.process_peak_mib(child.pid) < 50 < common.process_peak_mib()
    child.kill()
    child.wait()
    assert common.process_peak_mib(child.pid) is None
