"""The Pallas kernels in Pallas' GPU interpreter: values, gradients, and how threads wait for each other."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 240


def interpreted(*cases: str) -> list[dict]:
    """The errors of some cases, found in a process of their own: a deadlock is a timeout there."""
    flags = "--xla_force_host_platform_device_count=8"
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16", "XLA_FLAGS": flags}
    process = subprocess.run(
        [sys.executable, "-m", "tests.ops._interpreted", *cases],
        cwd=ROOT, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    return [json.loads(line) for line in process.stdout.splitlines()]


def check(results: list[dict]) -> None:
    for result in results:
        assert result["out"] < 2e-2, result
        assert result["lse"] < 1e-3, result
        relative = [v for k, v in result.items() if k not in ("case", "out", "lse")]
        assert all(v < 2e-2 for v in relative), result


def test_ragged_tiles_and_shares():
    check(interpreted("ragged"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["aligned", "one_key", "empty_cache", "no_cache", "gradients"])
def test_the_other_cases(case):
    check(interpreted(case))
