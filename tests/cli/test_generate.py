"""`longlive generate`: files, sidecars, refusals before any weight is read, and interruption."""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import jax
import numpy as np
import pytest

from longlive_jax import video
from longlive_jax.cli import common, outputs
from longlive_jax.cli.options import add_how, overrides, switch_frame
from longlive_jax.config import preset
from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.inference.story import PromptSwitch, Story

SMALL = ("--frames", 6, "--window", 9, "--quiet")


def sidecar(path: str) -> dict:
    return json.loads(pathlib.Path(path).read_text())


def files() -> list[str]:
    return sorted(str(p) for p in pathlib.Path().rglob("*") if p.is_file())


def coarse(frames: np.ndarray) -> np.ndarray:
    """Means over 8x8 pixels."""
    rows, columns = frames.shape[1] // 8, frames.shape[2] // 8
    return frames.reshape(len(frames), rows, 8, columns, 8, 3).mean(axis=(2, 4))


# --- what is written --------------------------------------------------------------------------------


def test_everything_at_once(longlive, tiny):
    result = longlive(
        *("generate", "--checkpoint", tiny, *SMALL, "--seed", 5, "--out", "fox.mp4"),
        *("--prompt", "a red fox runs", "--prompt", "the fox stops", "--switch-at", 3),
        *("--latents", "fox.npy", "--sheet", "fox.png"),
    )
    assert result.status == 0, result.err
    assert result.out.startswith("fox.mp4  (21 frames, 1.31 s, 48x32")
    assert result.err == ""
    assert files() == ["fox.json", "fox.mp4", "fox.npy", "fox.png"]

    # The files hold what the Python interface returns for the same call.
    pipe = Pipeline.load(tiny, overrides={"window.window_frames": 9})
    story = Story("a red fox runs", (PromptSwitch(3, "the fox stops"),))
    expected = pipe(story, frames=6, seed=5)
    np.testing.assert_array_equal(np.load("fox.npy"), expected.latents[0])
    written = video.read_video("fox.mp4")
    assert written.shape == expected.frames.shape[1:] == (21, 32, 48, 3)
    assert np.abs(coarse(written) - coarse(expected.frames[0])).mean() < 8  # noise, through H.264
    assert sidecar("fox.json")["video"] == {
        "file": "fox.mp4", "complete": True, "frames": 21, "seconds": 21 / 16, "fps": 16, "latent_frames": 6,
    }  # fmt: skip


def test_a_sidecar_reproduces_its_video(longlive, tiny):
    words = ("--prompt", "a red fox", "--prompt", "the fox stops", "--switch-at", "0.5s", "--policy", "keep")
    options = ("--steps", "1000,500", "--sink", 2, "--set", "sampler.shift=4", "--fps", 8)
    options = (*options, "--opening-steps", "5")
    first = longlive(
        "generate", "--checkpoint", tiny, *SMALL, *words, *options, "--seed", 9, "--out", "a.mp4",
        "--latents", "a.npy",
    )  # fmt: skip
    assert first.status == 0, first.err
    again = longlive("generate", "--from", "a.json", "--out", "b.mp4", "--latents", "b.npy", "--quiet")
    assert again.status == 0, again.err
    np.testing.assert_array_equal(np.load("a.npy"), np.load("b.npy"))
    assert pathlib.Path("a.mp4").read_bytes() == pathlib.Path("b.mp4").read_bytes()
    a, b = sidecar("a.json"), sidecar("b.json")
    assert (a["config"], a["weights"], a["request"]["story"]) == (
        b["config"],
        b["weights"],
        b["request"]["story"],
    )
    assert a["config"]["sampler"] == {
        "steps": [1000, 500], "opening_steps": [1000, 800, 600, 400, 200], "warp_steps": True, "shift": 4.0,
        "context_noise": 0.0,
    }  # fmt: skip
    # And the sidecar of the copy reproduces as well.
    assert longlive("generate", "--from", "b.json", "--out", "c.npy", "--quiet").status == 0
    np.testing.assert_array_equal(np.load("a.npy"), np.load("c.npy"))


@pytest.mark.parametrize(
    ("word", "steps"),
    [("2", (1000, 500)), ("1", (1000,)), ("500", "500"), ("900,100", "900,100"), ("0", "0")],
)
def test_a_small_number_is_how_many_steps(word, steps):
    parser = argparse.ArgumentParser()
    add_how(parser)
    assert overrides(parser.parse_args(["--steps", word])) == {"sampler.steps": steps}


def test_a_sidecar_does_not_accept_other_weights(longlive, refused, tiny, tmp_path):
    assert (
        longlive("generate", "--checkpoint", tiny, *SMALL, "--prompt", "a fox", "--out", "a.npy").status == 0
    )
    values = sidecar("a.json")
    values["weights"]["vae"] = "0" * 32
    pathlib.Path("a.json").write_text(json.dumps(values))
    assert "the vae has other weights than those recorded" in refused(
        "generate", "--from", "a.json", "--out", "b.npy"
    )
    chosen = longlive("generate", "--from", "a.json", "--checkpoint", tiny, "--out", "b.npy", "--quiet")
    assert chosen.status == 0
    assert chosen.err == "warning: the vae has other weights than those recorded; the result will differ\n"


def test_prompt_files_give_numbered_videos_whatever_the_batch(longlive, tiny):
    pathlib.Path("p.txt").write_text("a red fox\nthe snow\n\nthe fox stops\n")
    common_words = ("generate", "--checkpoint", tiny, *SMALL, "--prompt-file", "p.txt", "--seed", 1)
    result = longlive(*common_words, "--batch", 2, "--out", "v.mp4", "--latents", "l.npy")
    assert result.status == 0, result.err
    assert [line.split()[0] for line in result.out.splitlines()] == ["v-0.mp4", "v-1.mp4", "v-2.mp4"]
    assert [sidecar(f"v-{i}.json")["request"]["seed"] for i in range(3)] == [1, 2, 3]
    one = longlive("generate", "--from", "v-1.json", "--out", "one.npy", "--quiet")
    assert one.status == 0, one.err
    np.testing.assert_allclose(np.load("one.npy"), np.load("l-1.npy"), atol=1e-4)


def test_two_devices_make_the_video_of_one_and_say_what_they_exchange(longlive, tiny, refused):
    words = ("generate", "--checkpoint", tiny, *SMALL[:-1], "--prompt", "a red fox")
    one = longlive(*words, "--quiet", "--out", "one.npy")
    two = longlive(*words, "--devices", 2, "--out", "two.npy")
    assert (one.status, two.status) == (0, 0), two.err
    assert "2 devices: 2 (heads); each receives 0.1 MB per block from the others" in two.err
    np.testing.assert_allclose(np.load("two.npy"), np.load("one.npy"), atol=1e-4)
    assert "devices=4: the 6 tokens of a frame cannot be split 4 ways" in refused(*words, "--devices", 4)
    apart = longlive(*words, "--decode-apart", "--out", "apart.npy")
    assert apart.status == 0, apart.err
    assert "device 1 decodes" in apart.err
    np.testing.assert_array_equal(np.load("apart.npy"), np.load("one.npy"))
    assert "devices=8 and one to decode apart: this process has 8" in refused(
        *words, "--devices", 8, "--decode-apart"
    )


def test_jsonl_and_default_names(longlive, tiny):
    line = {
        "segments": [
            {"prompt": "A red fox, in [snow]!"},
            {"prompt": "stops", "at_frame": 3, "policy": "clear"},
        ]
    }
    pathlib.Path("p.jsonl").write_text(json.dumps(line))
    result = longlive("generate", "--checkpoint", tiny, *SMALL, "--prompt-file", "p.jsonl")
    assert result.status == 0, result.err
    assert files() == ["outputs/a-red-fox-in-snow-0.json", "outputs/a-red-fox-in-snow-0.mp4", "p.jsonl"]


@pytest.mark.parametrize("out", ["v.gif", "frames/", "frames"])
def test_other_formats(longlive, tiny, out):
    result = longlive("generate", "--checkpoint", tiny, *SMALL, "--prompt", "a fox", "--out", out)
    assert result.status == 0, result.err
    assert video.read_video(out).shape == (21, 32, 48, 3)
    assert sidecar(f"{out.rstrip('/').removesuffix('.gif')}.json")["video"]["frames"] == 21


def test_length_in_seconds_and_a_last_block_that_is_cut(longlive, tiny):
    words = ("generate", "--checkpoint", tiny, "--window", 9, "--quiet", "--prompt", "a fox")
    assert longlive(*words, "--seconds", 1, "--out", "a.mp4", "--latents", "a.npy").status == 0
    assert len(np.load("a.npy")) == 5
    assert len(video.read_video("a.mp4")) == 17
    assert longlive(*words, "--seconds", 1, "--out", "b.npy").status == 0
    np.testing.assert_array_equal(np.load("b.npy"), np.load("a.npy"))


def test_overwrite(longlive, refused, tiny):
    words = ("generate", "--checkpoint", tiny, *SMALL, "--prompt", "a fox", "--out", "a.mp4")
    assert longlive(*words).status == 0
    before = pathlib.Path("a.mp4").read_bytes()
    assert "a.mp4 exists already; choose another name or add --overwrite" in refused(*words)
    assert pathlib.Path("a.mp4").read_bytes() == before
    assert longlive(*words, "--seed", 1, "--overwrite").status == 0
    assert pathlib.Path("a.mp4").read_bytes() != before


def test_compiled_programs_are_kept(longlive, tiny, cache_dir):
    assert (
        longlive("generate", "--checkpoint", tiny, *SMALL, "--prompt", "a fox", "--out", "a.npy").status == 0
    )
    assert jax.config.jax_compilation_cache_dir == str(cache_dir / "xla")


# --- refusals ---------------------------------------------------------------------------------------

FOX = ("--prompt", "a fox")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            FOX,
            "--checkpoint is missing; make one with `longlive setup`, or try the small model",
        ),
        (("--checkpoint", "TINY"), "give either --prompt or --prompt-file"),
        (("--checkpoint", "TINY", *FOX, "--prompt-file", "p.txt"), "give either --prompt or --prompt-file"),
        (("--checkpoint", "nowhere", *FOX), "checkpoint=nowhere is no"),
        (("--checkpoint", "TINY", *FOX, "--frmes", 3), "--frmes is not known here, did you mean --frames?"),
        (("--checkpoint", "TINY", *FOX, "--frames", "many"), "argument --frames: invalid int value: 'many'"),
        (("--checkpoint", "TINY", *FOX, "--frames", 0), "--frames=0 must be positive"),
        (("--checkpoint", "TINY", *FOX, "--frames", 3, "--seconds", 1), "give either --frames or --seconds"),
        (("--checkpoint", "TINY", *FOX, "--seconds", -1), "seconds=-1.0 must be positive"),
        (("--checkpoint", "TINY", *FOX, "--height", 33), "height=33 must be a positive multiple of 16"),
        (("--checkpoint", "TINY", *FOX, "--seed", -1), "seed=-1 must be in [0, 4294967295]"),
        (("--checkpoint", "TINY", *FOX, "--window", 5), "window.window_frames=5 must be at least"),
        (("--checkpoint", "TINY", *FOX, "--steps", "250,1000"), "sampler.steps=(250, 1000) must fall"),
        (("--checkpoint", "TINY", *FOX, "--policy", "forget"), "argument --policy: invalid choice: 'forget'"),
        (
            ("--checkpoint", "TINY", *FOX, "--set", "windw.x=1"),
            "windw.x: 'windw' is not a setting; choose one of",
        ),
        (("--checkpoint", "TINY", *FOX, "--set", "dtype"), "'dtype' must be dotted.name=value"),
        (
            ("--checkpoint", "TINY", *FOX, "--sink", 1, "--set", "window.sink_frames=2"),
            "--set window.sink_frames=2: this setting is given twice",
        ),
        (("--checkpoint", "TINY", *FOX, *FOX), "2 prompts need 1 switch frames, not 0"),
        (
            ("--checkpoint", "TINY", *FOX, *FOX, "--switch-at", "soon"),
            "--switch-at='soon' must be a latent frame",
        ),
        (("--checkpoint", "TINY", *FOX, *FOX, "--switch-at", 21), "the video has 21 latent frames"),
        (("--checkpoint", "TINY", "--prompt-file", "absent.txt"), "prompt file absent.txt cannot be read"),
        (("--checkpoint", "TINY", *FOX, "--out", "x.avi"), "out=x.avi: .avi is not a format we write"),
        (("--checkpoint", "TINY", *FOX, "--out", "no/x.mp4"), "the folder no does not exist"),
        (("--checkpoint", "TINY", *FOX, "--latents", "x.npz"), "--latents=x.npz must end in .npy"),
        (("--checkpoint", "TINY", *FOX, "--latents", "no/x.npy"), "the folder no does not exist"),
        (("--checkpoint", "TINY", *FOX, "--out", "x.npy", "--sheet", "x.png"), "--sheet needs a video"),
        (("--checkpoint", "TINY", *FOX, "--out", "x.npy", "--latents", "y.npy"), "both ask for latents"),
        (("--checkpoint", "TINY", *FOX, "--weights", "transformer_ema"), "has no transformer_ema"),
        (("--from", "absent.json"), "absent.json: cannot be read"),
        (("--from", "TINY/config.json"), "is not the JSON file that `longlive generate` leaves beside"),
        (("--from", "x.json", "--seed", 3), "--from says everything about the video; leave --seed out"),
        (("--from", "x.json", *FOX, "--no-keep-sink"), "leave --keep-sink, --prompt out"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(refused, tiny, monkeypatch, words, message):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Pipeline, "load", load)
    line = refused("generate", *(str(word).replace("TINY", str(tiny)) for word in words))
    assert message in line
    assert files() == []
    assert not pathlib.Path("outputs").exists()


def test_a_damaged_sidecar_is_one_line(longlive, refused, tiny):
    assert longlive("generate", "--checkpoint", tiny, *SMALL, *FOX, "--out", "a.npy").status == 0
    values = sidecar("a.json")
    del values["request"]["frames"]
    pathlib.Path("b.json").write_text(json.dumps(values))
    assert "from=b.json is damaged: KeyError 'frames'; generate anew" in refused(
        "generate", "--from", "b.json"
    )


def test_a_video_needs_a_vae(longlive, refused, tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text())
    del config["parts"]["vae"]
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("transformer.safetensors", "text_encoder.safetensors", "tokenizer.json"):
        os.link(tiny / name, bare / name)
    (bare / "config.json").write_text(json.dumps(config))
    assert "has no vae" in refused("generate", "--checkpoint", "bare", *FOX, "--out", "a.mp4")
    result = longlive("generate", "--checkpoint", "bare", *SMALL, *FOX, "--out", "a.npy")
    assert result.status == 0, result.err


def test_too_little_device_memory_is_the_users_line(refused, tiny, monkeypatch):
    def load(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes")

    monkeypatch.setattr(Pipeline, "load", load)
    line = refused("generate", "--checkpoint", tiny, *SMALL, *FOX, "--out", "a.mp4")
    assert "the device has too little memory; try a smaller --height" in line
    assert files() == []


def test_our_own_faults_show_a_traceback(longlive, tiny, monkeypatch):
    def load(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(Pipeline, "load", load)
    result = longlive("generate", "--checkpoint", tiny, *SMALL, *FOX, "--out", "a.mp4")
    assert result.status == 1
    assert "Traceback" in result.err
    assert "this is a fault in longlive-jax" in result.err
    assert files() == []


def test_switch_times():
    config = preset("tiny")
    assert [switch_frame(text, config) for text in ("40", "10s", "0.5 s", ".5s")] == [40, 41, 3, 3]
    for wrong in ("", "s", "-3", "3.5", "1e3s"):
        with pytest.raises(UserError, match="must be a latent frame"):
            switch_frame(wrong, config)


def test_names():
    assert outputs.slug("A red fox, in [snow]!") == "a-red-fox-in-snow"
    assert outputs.slug("狐狸 in snow") == "狐狸-in-snow"
    assert outputs.slug("../..") == "video"
    assert len(outputs.slug("long " * 50)) <= 40
    assert outputs.numbered("a.mp4", 3, 12) == "a-03.mp4"
    assert outputs.numbered("a/", 0, 2) == "a-0/"
    assert outputs.numbered("a", 0, 1) == "a"


# --- length and interruption ------------------------------------------------------------------------


def test_memory_does_not_grow_with_length(longlive, tiny, monkeypatch):
    """Host allocations and device arrays at every block of a video ten times as long."""
    seen: list[tuple[int, int]] = []
    write = outputs.Writers.write

    def watched(self, frames, latents):
        write(self, frames, latents)
        device = sum(array.nbytes for array in jax.live_arrays())
        seen.append((tracemalloc.get_traced_memory()[0], device))

    monkeypatch.setattr(outputs.Writers, "write", watched)
    words = (
        "generate",
        "--checkpoint",
        tiny,
        "--window",
        9,
        "--quiet",
        *FOX,
        "--overwrite",
        "--out",
        "a.mp4",
    )
    longlive(*words, "--frames", 12, "--latents", "a.npy")  # compiles
    seen.clear()
    tracemalloc.start()
    try:
        assert longlive(*words, "--frames", 12, "--latents", "a.npy").status == 0
        host, device = (max(column[1:]) for column in zip(*seen, strict=True))
        assert longlive(*words, "--frames", 120, "--latents", "a.npy").status == 0
    finally:
        tracemalloc.stop()
    assert len(seen) == 4 + 40
    long_host, long_device = (max(column[5:]) for column in zip(*seen, strict=True))
    frame = 32 * 48 * 3
    assert long_device <= device
    assert long_host - host < 100 * frame  # holding the 432 further frames would be four times this


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_run_leaves_a_playable_video(tiny, tmp_path, cache_dir, number):
    words = ["generate", "--checkpoint", str(tiny), "--window", "9", "--frames", "30000", *FOX, "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "longlive_jax.cli.main", *words, "--out", "a.mp4", "--latents", "a.npy"],
        cwd=tmp_path,
        env=os.environ | {"LONGLIVE_CACHE": str(cache_dir), "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size > 10_000 for p in tmp_path.glob("a.partial-*.npy")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "interrupted\n"
    assert out.startswith("a.mp4  (")
    assert ", interrupted)" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.npy"]
    facts = json.loads((tmp_path / "a.json").read_text())["video"]
    assert facts["complete"] is False
    assert (
        len(video.read_video(tmp_path / "a.mp4")) == facts["frames"] == 4 * (facts["latent_frames"] - 1) + 1
    )
    assert len(np.load(tmp_path / "a.npy")) == facts["latent_frames"] > 0


def test_an_interruption_waits_for_a_shield_and_comes_once():
    done = []
    with common.Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):
            shielded(interruption, done)
        os.kill(os.getpid(), signal.SIGINT)  # what is open is being finished: nothing happens
        time.sleep(0.01)
        done.append("finished")
    assert done == ["through", "finished"]


def shielded(interruption: common.Interruption, done: list[str]) -> None:
    with interruption.shield():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append("through")
    done.append("not reached")
