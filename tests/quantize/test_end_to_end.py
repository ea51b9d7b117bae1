"""A quantised checkpoint in use: the bundled model, a converted one, a live session and the studio."""

import pathlib

import jax
import numpy as np
import pytest
from starlette.testclient import TestClient

from longlive_jax import PromptSwitch, Session, Story, video
from longlive_jax.checkpoint import open_checkpoint
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.quantize.store import quantize_checkpoint
from longlive_jax.serve import images, server
from longlive_jax.serve.app import create_app
from longlive_jax.toy import describe, evaluation
from longlive_jax.toy.world import BACKGROUND, COLOUR, Attributes, World
from tests.serve.conftest import Browser, sockets_that_are_left  # noqa: F401

FOX, STOPS = "a red fox runs", "the fox stops"
LIVE = {"window.rope": "relative", "cache_dtype": "int8"}  # those of `longlive serve` below


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory) -> pathlib.Path:
    """The tiny checkpoint in int8."""
    path = tmp_path_factory.mktemp("quantized") / "tiny-int8"
    quantize_checkpoint(tiny, path, recipe="int8")
    return path


def test_the_bundled_model_is_quantised_inspected_and_shows_its_prompt(longlive, tmp_path):
    result = longlive("quantize", "toy", "small")
    assert result.status == 0, result.err
    files = [open_checkpoint(path).part_file("transformer").path for path in ("toy", "small")]
    before, after = (file.stat().st_size for file in files)
    assert f"on disk: {before / 2**20:.2f} MiB (bfloat16) -> {after / 2**20:.2f} MiB, " in result.out
    assert f"{before / after:.2f}x smaller" in result.out.splitlines()[1]
    assert "60 linear layers in 8 bits, 7 in float32" in result.out

    counted = [
        longlive("inspect", path).out.split("\n  transformer ")[1].split()[0] for path in ("toy", "small")
    ]
    assert counted == [f"{open_checkpoint('toy').parts['transformer'].parameters:,}"] * 2

    asked = Attributes("square", "red", "right", "dark")
    words = ("--prompt", describe(asked), "--frames", 3, "--out", "a.mp4", "--set", "cache_dtype=int8")
    result = longlive("generate", "--checkpoint", "small", *words)
    assert result.status == 0, result.err
    frames = video.read_video("a.mp4")
    assert frames.shape == (9, 64, 64, 3)
    seen = evaluation.read_pixels(World(), frames[None])
    named = [COLOUR, BACKGROUND]
    assert (seen.codes[..., named] == np.array(asked.codes)[named]).all()


def test_a_converted_checkpoint_is_quantised_and_generates(tiny, longlive):
    for command in (
        ("export", tiny, "wan", "--layout", "wan"),
        ("convert", "wan", "converted", "--preset", "tiny"),
        ("quantize", "converted", "small"),
    ):
        result = longlive(*command)
        assert result.status == 0, result.err
    assert "from" in open_checkpoint("small").source["quantized"]
    videos = {}
    for name in ("converted", "small"):
        result = longlive(
            "generate", "--checkpoint", name, "--prompt", FOX, "--frames", 3, "--out", f"{name}.mp4"
        )
        assert result.status == 0, result.err
        videos[name] = video.read_video(f"{name}.mp4").astype(int)
    away = np.abs(videos["small"] - videos["converted"])
    assert videos["small"].std() > 1  # noise, and not one colour
    assert 0 < away.mean() < 0.2 * videos["converted"].std()


def test_a_session_over_int8_weights_and_cache_switches_its_prompt(small):
    pipe = Pipeline.load(small, overrides=LIVE)
    expected = np.concatenate(
        [chunk.video[0] for chunk in pipe.stream(Story(FOX, (PromptSwitch(3, STOPS),)), frames=6, seed=3)]
    )
    plain = np.concatenate([chunk.video[0] for chunk in pipe.stream(FOX, frames=6, seed=3)])
    with Session(pipe, FOX, seed=3, blocks=2) as session:
        session.switch(STOPS, at=3)
        blocks = list(session)
        cache = session.snapshot().moment.stream.rollout.cache
    assert [(block.info.prompt, block.info.policy) for block in blocks] == [(FOX, None), (STOPS, "recache")]
    frames = np.concatenate([block.frames for block in blocks])
    np.testing.assert_array_equal(frames, expected)
    np.testing.assert_array_equal(frames[:9], plain[:9])
    assert (frames[9:] != plain[9:]).any()
    assert {"int8", "bfloat16"} <= {str(leaf.dtype) for leaf in jax.tree.leaves(cache)}


def test_the_studio_loads_it_and_switches_its_prompt(small, longlive, monkeypatch):
    """`longlive serve` up to its port, and a browser at the app that it would serve there."""
    shown = {}

    def run(pipe, config, taken, ready):
        shown["pipe"] = pipe
        with (
            taken,
            TestClient(create_app(pipe, config), base_url="http://localhost") as client,
            client.websocket_connect("ws://localhost/ws") as socket,
        ):
            browser = Browser(socket)
            browser.open(FOX, seed=3)
            shown["first"] = images.decode(browser.frame()[1])
            browser.send(type="switch", prompt=STOPS)
            shown["switched"] = browser.get("block", prompt=STOPS)
            browser.send(type="end")

    monkeypatch.setattr(server, "run", run)
    words = ("--port", 0, "--pace", "free", "--no-warm-up", "--set", "cache_dtype=int8")
    result = longlive("serve", "--checkpoint", small, *words)
    assert result.status == 0, result.err
    assert (shown["pipe"].config.quantization, shown["pipe"].config.cache_dtype) == ("int8", "int8")
    assert shown["switched"]["policy"] == "recache"
    assert shown["first"].std() > 1
