"""Two processes with a device each, joined on this machine, train like one process with two devices."""

import signal
import socket
import subprocess
import sys

import jax
import pytest

from longlive_jax import checkpoint, sharding
from longlive_jax.cli.main import main
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.training import processes, stages
from tests.training import _runs
from tests.training._runs import losses, smoke, started, wait_for_losses

pytestmark = pytest.mark.usefixtures("fast_programs")

CHANGES = {
    "run__steps": 30,
    "run__checkpoint_every": 100,
    "flow__sample_steps": 1,
    "evaluation__clips": 1,
    "evaluation__batch_size": 1,
}
"""No checkpoint but those a signal and the end make, and a short evaluation."""

_make_mesh = sharding.make_mesh

TOLERANCE = 1e-5
"""Relative; the sum over the batch is taken in another order."""

SECONDS = 60.0
"""The longest the processes may take to end."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two(words):
    """The command lines of both processes."""
    join = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    return [[*words, *join, str(index)] for index in range(2)]


def two_device_mesh(*, data, fsdp):
    """A mesh of two of this process's devices."""
    return _make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Losses of a run of one process with two devices, from its first step to its last."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", two_device_mesh)
        stages.train(smoke("teacher", base, folder, **CHANGES), is_quiet=True)
    return losses(folder)


def run_two(base, folder, log, *options, after=None, number=signal.SIGTERM):
    """Runs two processes, to the end or until the second one gets a signal after so many losses.

    Returns:
      Their exit statuses and what they said.
    """
    words = [*_runs.words("teacher", base, folder, **CHANGES), *options]
    with started(two(words), log) as running:
        if after is not None:
            wait_for_losses(folder, after, running)
            running[1].send_signal(number)
        statuses = [process.wait(timeout=SECONDS if after else 4 * SECONDS) for process in running]
    return statuses, [(log / f"process_{index}.log").read_text() for index in range(2)]


def test_two_processes_train_stop_and_go_on_in_one(base, whole, tmp_path, monkeypatch):
    """A SIGTERM to one of them saves and stops both; one process goes on from what both have saved."""
    folder = tmp_path / "run"
    statuses, said = run_two(base, folder, tmp_path, after=2)
    assert statuses == [128 + signal.SIGTERM] * 2
    assert ["--resume auto" in text for text in said] == [True, False]  # only the first one speaks
    [saved] = (folder / "checkpoints").iterdir()
    for pattern in ("data/process_{}-of-2.json", "state/ocdbt.process_{}"):
        assert all((saved / pattern.format(index)).exists() for index in range(2))  # both have written
    assert list(losses(folder)) == list(range(1, int(saved.name) + 1))
    assert int(saved.name) < len(whole)

    monkeypatch.setattr(sharding, "make_mesh", two_device_mesh)
    report = stages.train(smoke("teacher", base, folder, **CHANGES), resume="auto", is_quiet=True)
    assert report["resumed_at"] == int(saved.name)
    assert losses(folder) == pytest.approx(whole, rel=TOLERANCE)


@pytest.mark.slow
def test_two_processes_go_on_in_two_and_export(base, whole, tmp_path):
    folder = tmp_path / "run"
    assert run_two(base, folder, tmp_path, after=4)[0] == [128 + signal.SIGTERM] * 2
    statuses, said = run_two(base, folder, tmp_path, "--resume", "auto")
    assert statuses == [0, 0]
    assert ["exported to" in text for text in said] == [True, False]
    assert losses(folder) == pytest.approx(whole, rel=TOLERANCE)
    exported = checkpoint.open_checkpoint(folder / "export")
    exported.load("transformer", expect=expected_tree("transformer", exported.config))
    statuses, said = run_two(base, folder, tmp_path)
    assert statuses == [2, 2]
    assert all("already holds a run" in text for text in said)


@pytest.mark.slow
def test_a_process_that_dies_does_not_leave_the_other_waiting(base, tmp_path):
    statuses, _ = run_two(base, tmp_path / "run", tmp_path, after=2, number=signal.SIGKILL)
    assert statuses[1] == -signal.SIGKILL
    assert statuses[0] != 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--coordinator 10.0.0.1:1234", "--processes and --process not given"),
        ("--processes 2 --process 1", "--coordinator not given"),
        ("--coordinator 10.0.0.1 --processes 2 --process 0", "HOST:PORT"),
        ("--coordinator 10.0.0.1:1234 --processes 2 --process 2", "from 0 to 1"),
        ("--coordinator 10.0.0.1:1234 --processes 2 --process 1 --distributed", "leave out --coordinator"),
    ],
)
def test_a_half_given_address_is_refused_in_one_line(words, expected, capsys):
    """None of these waits for anybody."""
    assert main(["train", str(_runs.CONFIGS / "text.py"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_no_cluster_in_the_environment_is_said():
    """In a process of its own: this one has touched its devices."""
    words = [sys.executable, "-m", "longlive_jax.cli.main", "train", str(_runs.CONFIGS / "text.py")]
    found = subprocess.run([*words, "--distributed"], capture_output=True, text=True, timeout=SECONDS)
    assert found.returncode == 2
    assert "no cluster is found" in found.stderr


def test_a_coordinator_that_does_not_answer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(processes, "CONNECT_SECONDS", 0)
    [_, words] = two(["train", str(_runs.CONFIGS / "text.py")])
    assert main(words) == 2
    assert "does not answer" in capsys.readouterr().err
