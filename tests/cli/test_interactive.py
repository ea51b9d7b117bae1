"""`longlive interactive`: lines in, a video and a session file out, whatever standard input is."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from longlive_jax import video
from longlive_jax.inference.pipeline import Pipeline

SMALL = ("--window", 9, "--steps", "1000,500")


@pytest.fixture
def typed(monkeypatch):
    """Gives the command these lines on standard input."""

    def give(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return give


def events(path: str) -> list[dict]:
    return json.loads(pathlib.Path(path).read_text())["events"]


def test_lines_become_switches_and_the_file_replays(longlive, tiny, typed):
    # Paused, so that times are met however slow the machine is.
    typed(
        *("", "a red fox runs", "the fox stops", "a fox", "/pause", "/policy flush", "/blend 6"),
        *("@21 deep snow", "/jump", "/seed x", "/set video.fps=3", "@1 too late", "@33 the fox", "/seed 5"),
        "/resume",
    )
    result = longlive(
        "interactive", "--checkpoint", tiny, *SMALL, "--seconds", 9, "--seed", 2, "--out", "live/"
    )
    assert result.status == 0, result.err
    assert result.out.startswith("live/  (153 frames, 9.56 s, 48x32")
    frames = video.read_video("live")
    assert len(frames) == 153
    recorded = events("live.session.json")
    names = ("event", "prompt", "policy", "blend_frames", "seed")
    assert [tuple(event.get(name) for name in names) for event in recorded] == [
        ("switch", "the fox stops", "recache", 0, None),
        ("switch", "a fox", "recache", 0, None),
        ("change", None, None, None, 5),
        ("switch", "deep snow", "flush", 6, None),
        ("switch", "the fox", "flush", 6, None),
    ]
    blocks = [event["block"] for event in recorded]
    assert blocks == sorted(set(blocks))  # one after the other, so that each is seen
    assert blocks[-2:] == [7, 11]
    errors = [line for line in result.err.splitlines() if line.startswith("error")]
    assert [error.split(";")[0] for error in errors] == [
        "error: /jump is not known",
        "error: /seed x: must be a whole number",
        "error: video.fps cannot change while a session runs",
        "error: at: frame 1 has passed",
    ]
    shown = [line.split("  ")[-1] for line in result.err.splitlines() if "  " in line]
    assert shown[-3:] == ["a fox", "deep snow", "the fox"]

    again = longlive("interactive", "--replay", "live.session.json", "--out", "again/", "--quiet")
    assert (again.status, again.err) == (0, "")
    np.testing.assert_array_equal(video.read_video("again"), frames)


def test_the_end_of_the_input_ends_the_video_after_its_last_prompt(longlive, tiny, typed):
    typed("the fox stops", "@9 deep snow")
    result = longlive("interactive", "--checkpoint", tiny, *SMALL, "--prompt", "a red fox runs", "--quiet")
    assert result.status == 0, result.err
    assert result.err == ""
    assert result.out.startswith("outputs/live-0.mp4  (")
    assert [e["prompt"] for e in events("outputs/live-0.session.json")] == ["the fox stops", "deep snow"]
    assert len(video.read_video("outputs/live-0.mp4")) == 4 * (4 * 3 - 1) + 1  # to the block of frame 9


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint", "TINY"), "there is no prompt; type one, or give --prompt"),
        (("--checkpoint", "TINY", "--prompt", " "), "prompt=' ' must be text"),
        (("--checkpoint", "TINY", "--prompt", "a", "--seconds", 0), "--seconds=0.0 must be positive"),
        (("--checkpoint", "TINY", "--prompt", "a", "--height", 33), "height=33 must be"),
        (("--checkpoint", "TINY", "--prompt", "a", "--window", -1), "a session has no end"),
        (("--checkpoint", "TINY", "--prompt", "a", "--seed", -1), "seed=-1 must be in"),
        (("--checkpoint", "TINY", "--prompt", "a", "--out", "x.avi"), "out=x.avi"),
        (("--checkpoint", "TINY", "--prompt", "a", "--out", "TAKEN.mp4"), "TAKEN.mp4 exists already"),
        (("--replay", "absent.json"), "absent.json: cannot be read"),
        (("--replay", "x.json", "--prompt", "a", "--seed", 1), "leave --prompt, --seed out"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(refused, tiny, typed, words, message):
    typed()
    pathlib.Path("TAKEN.mp4").touch()
    words = [str(word).replace("TINY", str(tiny)) for word in words]
    assert message in refused("interactive", *words, "--quiet")
    assert [p.name for p in pathlib.Path().rglob("*") if p.is_file()] == ["TAKEN.mp4"]


def test_a_failure_leaves_what_there_is(longlive, tiny, typed, monkeypatch):
    advance, blocks = Pipeline.advance, []

    def broken(self, state, **_):
        blocks.append(state)
        if len(blocks) == 3:
            raise ZeroDivisionError("out of luck")
        return advance(self, state)

    monkeypatch.setattr(Pipeline, "advance", broken)
    typed()
    words = ("interactive", "--checkpoint", tiny, *SMALL, "--prompt", "a fox", "--seconds", 9, "--quiet")
    result = longlive(*words, "--out", "a.mp4")
    assert result.status == 1
    assert "SessionError: block 2 failed: out of luck" in result.err
    assert len(video.read_video("a.mp4")) == 21  # the two blocks before


def test_a_pipe_that_stays_open_and_a_signal(tiny, tmp_path, cache_dir):
    words = ["interactive", "--checkpoint", str(tiny), *map(str, SMALL), "--out", "a.mp4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "longlive_jax.cli.main", *words],
        cwd=tmp_path,
        env=os.environ | {"LONGLIVE_CACHE": str(cache_dir), "PYTHONPATH": os.getcwd()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for prompt in ("a red fox", "the fox stops"):
        process.stdin.write(f"{prompt}\n")
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while not (line := process.stderr.readline()).rstrip().endswith(f"  {prompt}"):
            assert line
            assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.startswith("a.mp4  (")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.mp4", "a.session.json"]
    assert len(video.read_video(tmp_path / "a.mp4")) > 9
    assert [e["prompt"] for e in events(tmp_path / "a.session.json")] == ["the fox stops"]
