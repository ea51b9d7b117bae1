"""What a run says of itself: its pace, its clock, its progress."""

import io
import json
import sys

import jax
import pytest

from longlive_jax.training import metrics


class Clock:
    """Stands in for `time`; moved by hand."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(metrics.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def compiles():
    return metrics.CompileCounter()


def make_steps(rate, clock, seconds, *, frames=6):
    for each in seconds:
        rate.begin()
        clock.now += each
        rate.tick(frames)


def test_utilisation_is_of_the_devices_peak(monkeypatch, clock, compiles):
    assert metrics.peak_flops("NVIDIA H100 80GB HBM3", devices=8) == 8 * 989e12
    assert metrics.peak_flops("NVIDIA H100 PCIe", devices=1) == 756e12
    assert metrics.peak_flops("TPU v5 lite", devices=4) == 4 * 197e12
    assert metrics.peak_flops("TPU v5p", devices=1) == 459e12
    assert metrics.peak_flops("cpu") is None
    monkeypatch.setattr(metrics, "PEAK_FLOPS", {"cpu": 1e9})
    rate = metrics._Rate(compiles)
    make_steps(rate, clock, [2.0, 2.0])
    assert rate.metrics(4e9) == {  # 2 Gflop/s of 1 Gflop/s for each of the devices
        "seconds_per_step": 2.0,
        "frames_per_second": 3.0,
        "utilisation": pytest.approx(2 / jax.device_count()),
    }


def test_the_pace_of_alternating_steps_is_their_mean(monkeypatch, clock, compiles):
    """As in a distillation: every third step updates the generator, too, and takes four times as long."""
    monkeypatch.setattr(metrics, "PEAK_FLOPS", {"cpu": 1e9 / jax.device_count()})
    rate = metrics._Rate(compiles)
    for _ in range(40):
        make_steps(rate, clock, [4.0], frames=12)
        make_steps(rate, clock, [1.0, 1.0], frames=6)
        assert rate.seconds == pytest.approx(2.0)
    assert rate.metrics(1e9) == pytest.approx(
        {"seconds_per_step": 2.0, "frames_per_second": 4.0, "utilisation": 0.5}
    )


def test_the_pace_leaves_out_compilations_pauses_and_what_is_between_steps(clock, compiles):
    rate = metrics._Rate(compiles)
    rate.begin()
    clock.now += 500.0
    compiles.count += 3  # the first step compiles
    rate.tick(6)
    assert rate.seconds is None
    assert rate.metrics(1e9) == {}
    make_steps(rate, clock, [4.0, 1.0, 1.0])
    clock.now += 300.0  # an evaluation
    make_steps(rate, clock, [4.0, 1.0, 1.0, 70.0])  # the last was held up
    assert rate.seconds == pytest.approx(2.0)
    make_steps(rate, clock, [40.0] * 60)  # a pace that changes for good is believed
    assert rate.seconds == pytest.approx(40.0)


def test_the_pace_is_right_where_every_other_step_waits_for_both(clock, compiles):
    """As with a checkpoint every two steps: one is only handed to the device, the next waits for the two."""
    rate = metrics._Rate(compiles)
    for _ in range(6):
        make_steps(rate, clock, [0.001, 3.999])
        assert rate.seconds == pytest.approx(2.0)


def test_the_clock_adds_up_over_all_starts(tmp_path, clock):
    """Steps that are made again took their time twice."""

    def start(first_step, *, steps, closes):
        log = metrics.Log(tmp_path, first_step=first_step, steps=9, is_quiet=True)
        for step in range(first_step + 1, first_step + steps + 1):
            log.begin()
            clock.now += 10.0
            log.tick(step, 0)
            log.scalars(step, {"loss": 1.0})
        if closes:
            log.close()
        return log.total_seconds

    assert start(0, steps=4, closes=False) == 40.0  # killed after the checkpoint of step 2
    assert start(2, steps=0, closes=False) == 40.0  # and again, before its first step
    assert start(2, steps=3, closes=True) == 70.0
    assert start(5, steps=4, closes=True) == 110.0
    lines = [json.loads(line) for line in (tmp_path / metrics.METRICS_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert lines[-1]["total_seconds"] == 110.0


class Screen(io.StringIO):
    """Standard error that is, or is not, a terminal."""

    def __init__(self, *, is_terminal):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self):
        return self._is_terminal


def shown(monkeypatch, clock, compiles, *, is_terminal, is_quiet=False):
    """What is shown of 40 steps of a second each, with a note after the tenth."""
    screen, rate = Screen(is_terminal=is_terminal), metrics._Rate(compiles)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    progress = metrics._Progress(40, is_quiet=is_quiet)
    for step in range(1, 41):
        make_steps(rate, clock, [1.0])
        progress.show(step, {"loss": 0.125}, rate)
        if step == 10:
            progress.note("step 10: [all] 0.5")
    progress.close()
    return screen.getvalue()


def test_progress_in_a_log_is_a_line_now_and_then(monkeypatch, clock, compiles):
    found = shown(monkeypatch, clock, compiles, is_terminal=False)
    assert found.splitlines() == [
        "1/40  loss 0.125  1 s/step  0:39 left",
        "step 10: [all] 0.5",
        "16/40  loss 0.125  1 s/step  0:24 left",
        "31/40  loss 0.125  1 s/step  0:09 left",
    ]
    assert shown(monkeypatch, clock, compiles, is_terminal=False, is_quiet=True) == ""


def test_progress_on_a_terminal_is_a_bar(monkeypatch, clock, compiles):
    found = shown(monkeypatch, clock, compiles, is_terminal=True)
    assert "\x1b[" in found  # it is drawn over
    assert "40/40" in found
    assert "loss 0.125  1 s/step  0:00 left" in found
    assert "step 10: [all] 0.5\n" in found.replace("\r", "")
    assert shown(monkeypatch, clock, compiles, is_terminal=True, is_quiet=True) == ""
