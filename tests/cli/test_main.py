"""The command line as a whole: start-up, help, exit codes, and the commands besides generate."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from longlive_jax import verify
from longlive_jax.cli.main import build_parser

COMMANDS = (
    *("generate", "interactive", "setup", "convert", "export"),
    *("inspect", "serve", "quantize", "train", "verify", "memory", "version"),
    *("ablate", "report", "vbench", "config"),
)


def python(*words: str) -> tuple[float, str]:
    """Runs a fresh interpreter; returns the fewest processor seconds of three runs and what it printed."""
    best, out = float("inf"), ""
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best, out


def test_help_is_fast_and_loads_no_framework():
    script = """
import sys
from longlive_jax.cli.main import main
status = main(["generate", "--help"])
heavy = {"jax", "flax", "torch", "av", "PIL", "rich", "huggingface_hub"}
print("loaded", sorted(heavy & set(sys.modules)), status)
"""
    seconds, out = python("-c", script)
    assert out.splitlines()[-1] == "loaded [] 0"
    assert seconds < 0.7


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(longlive, command):
    result = longlive(command, "--help")
    assert result.status == 0
    assert result.out.startswith(f"usage: longlive {command}")
    assert len(result.out.splitlines()) > 5
    assert max(map(len, result.out.splitlines())) <= 110
    assert f"\n    {command} " in longlive("--help").out


def test_every_option_has_a_help_text():
    commands = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(commands) == set(COMMANDS)
    for parser in commands.values():
        for action in parser._actions:
            assert action.help, (parser.prog, action.option_strings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required: COMMAND; see `longlive --help`"),
        (("generte",), "invalid choice: 'generte'"),
        (("inspect",), "the following arguments are required: PATH; see `longlive inspect --help`"),
        (("inspect", "absent"), "absent"),
        (("export", "absent", "out.pt"), "absent is no"),
        (("export", "absent", "out.pt", "--layout", "x"), "argument --layout: invalid choice: 'x'"),
        (("convert", "absent.pt", "out"), "absent.pt"),
        (("convert", "only-one"), "the following arguments are required: DST"),
        (("setup", "longlive-2b", "out"), "model='longlive-2b' is unknown; choose one of longlive-1.3b"),
        (("verify", "absent"), "give --against RECORDED.npz or --layers; see `longlive verify --help`"),
        (("verify", "absent", "--against", "x.npz"), "absent is no"),
        (("verify", "absent", "--against", "x.npz", "--rtol", 0.1), "give both --rtol and --atol"),
        (("memory", "absent"), "the presets are wan_1_3b, wan_14b"),
        (("memory", "tiny", "--height", 31), "height=31 must be a positive multiple of 16"),
        (("memory", "tiny", "--batch", 0), "--batch=0 must be positive"),
        (("memory", "tiny", "--set", "window.window_frames=-1"), "give the number of frames in advance"),
    ],
)
def test_mistakes_are_one_line(refused, words, message):
    assert message in refused(*words)


def test_version(longlive):
    assert longlive("--version").out.startswith("longlive-jax ")
    result = longlive("version")
    assert result.status == 0
    assert "jax 0." in result.out
    assert "devices: cpu" in result.out


def test_a_closed_pipe_is_nobodys_fault(tiny):
    command = f"{sys.executable} -m longlive_jax.cli.main inspect {tiny} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (141, "")


def test_inspect_convert_and_export_pass_their_arguments_on(longlive, tiny, tmp_path):
    inspected = longlive("inspect", tiny)
    assert inspected.status == 0
    assert "vae" in inspected.out
    exported = longlive("export", tiny, "wan", "--layout", "wan")
    assert exported.status == 0, exported.err
    words = ("convert", "wan", "back", "--dtype", "bfloat16", "--part", "transformer", "--preset", "tiny")
    converted = longlive(*words)
    assert converted.status == 0, converted.err
    parts = json.loads((tmp_path / "back" / "config.json").read_text())["parts"]
    assert list(parts) == ["transformer"]
    assert parts["transformer"]["dtype"] == "bfloat16"
    assert longlive(*words).status == 2
    assert longlive(*words, "--overwrite").status == 0


def test_verify_reports_and_fails_on_a_miss(longlive, tiny, monkeypatch):
    fine = verify.Row("vae_decode", 1e-6, 1e-7, 0.5, verify.FLOAT32, True)
    missed = verify.Row("transformer:b", 0.1, 0.01, 0.5, verify.FLOAT32, False)
    calls = []

    def fake(checkpoint, recording, **options):
        calls.append((checkpoint, recording, options))
        return rows

    monkeypatch.setattr(verify, "verify", fake)
    rows = [fine]
    assert longlive("verify", tiny, "--against", "x.npz", "--dtype", "float32").status == 0
    rows = [fine, missed]
    result = longlive("verify", tiny, "--against", "x.npz", "--rtol", "0.1", "--atol", 0)
    assert result.status == 1
    assert result.err == ""
    assert [line.split()[0] for line in result.out.splitlines()] == [
        "component",
        "vae_decode",
        "transformer:b",
    ]
    assert "MISS (rtol 0.0001, atol 2e-05)" in result.out
    assert calls[0] == (str(tiny), "x.npz", {"overrides": {"dtype": "float32"}, "tolerance": None})
    assert calls[1][2] == {"overrides": {}, "tolerance": verify.Tolerance(rtol=0.1, atol=0.0)}


def test_verify_runs_on_a_real_recording(longlive, tiny, tmp_path):
    ids = np.zeros((1, 16), np.int64)
    np.savez(tmp_path / "x.npz", **{"tokenizer/prompts": np.array(["zzz"]), "tokenizer/ids": ids})
    result = longlive("verify", tiny, "--against", "x.npz")
    assert result.status == 1, result.err
    assert "tokenizer" in result.out


def test_memory_prints_the_budget(longlive, tiny):
    result = longlive("memory", tiny, "--set", "window.sink_frames=0", "--batch", 2)
    assert result.status == 0, result.err
    assert "2 videos of 48x32" in result.out
    for name in ("transformer weights", "key/value cache", "on a 24 GB card"):
        assert name in result.out
