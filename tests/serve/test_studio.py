"""The studio around real sessions: what it shows is what the sessions give."""

import json
import pathlib
import time

import numpy as np
import pytest

from longlive_jax import Session
from longlive_jax.serve import images, protocol
from longlive_jax.serve import studio as studio_lib
from longlive_jax.serve.lane import Frame
from longlive_jax.serve.settings import ServeConfig
from longlive_jax.serve.studio import Studio
from longlive_jax.serve.warming import Warming
from longlive_jax.session.warm_up import warm_up
from tests.inference._live import small_pipeline
from tests.serve.page import wait_for

FOX, STOPS = "a red fox runs", "the fox stops"


@pytest.fixture(autouse=True)
def drawn_sessions():
    """Here sessions are real."""


class Watched:
    """A studio and what it has said."""

    def __init__(self, folder: pathlib.Path, **settings) -> None:
        self.events: list = []
        config = ServeConfig(pace="free", warms_up=False, **settings)
        pipe = small_pipeline()
        self.studio = Studio(
            pipe,
            protocol.Open(FOX, 3, {}),
            config=config,
            warming=Warming(pipe, is_on=False),
            folder=folder,
            emit=self._emit,
        )

    def _emit(self, event) -> None:
        self.events.append(event)
        if isinstance(event, Frame):
            self.studio.flow.report(accepted=1, backlog=0)
        if len(self.events) > 20 and not isinstance(event, Frame):
            time.sleep(0.01)  # as a browser would, so that a test is not far behind

    def __enter__(self) -> "Watched":
        self.studio.start()
        return self

    def __exit__(self, *error) -> None:
        self.studio.close()

    def told(self, kind: str, **wanted):
        """The first event of a kind with these values."""

        def found():
            for event in list(self.events):
                is_kind = not isinstance(event, Frame) and event["type"] == kind
                if is_kind and all(event.get(name) == value for name, value in wanted.items()):
                    return event
            return None

        return wait_for(found, seconds=300)

    def frames(self, *, take: int = 0, count: int) -> np.ndarray:
        """The first frames of a take, uint8 [count, Y, X, 3]."""
        wait_for(lambda: len(self._of(take)) >= count, seconds=300)
        return np.stack([images.decode(image) for image in self._of(take)[:count]])

    def _of(self, take: int) -> list[bytes]:
        unpacked = [
            protocol.unpack_frame(event.data) for event in list(self.events) if isinstance(event, Frame)
        ]
        return [image for header, image in unpacked if header["take"] == take]


def test_what_is_shown_is_what_a_session_gives_after_rewinding_too(tmp_path):
    with Watched(tmp_path, snapshots=16) as watched:
        first = watched.frames(count=45)
        watched.told("stored", take=0, block=8)
        watched.studio.perform(protocol.Rewind(protocol.Point(0, 4)))
        state = watched.told("state", current=1)
        start = state["takes"][1]["start"]
        again = watched.frames(take=1, count=12)
    with Session(small_pipeline(), FOX, seed=3, blocks=5) as session:
        blocks = [next(session) for _ in range(5)]
    expected = np.concatenate([block.frames for block in blocks])
    np.testing.assert_array_equal(first, expected[:45])
    assert 2 <= start <= 4, "the nearest kept state"
    np.testing.assert_array_equal(again, blocks[start].frames)


def test_switch_compare_keep_and_save(tmp_path):
    with Watched(tmp_path) as watched:
        watched.told("stored", block=3)
        watched.studio.perform(
            protocol.Compare("here", STOPS, {"switch.policy": "recache"}, {"switch.policy": "keep"})
        )
        watched.told("stored", take=2, prompt=STOPS)
        left, right = (watched.frames(take=take, count=36) for take in (1, 2))
        np.testing.assert_array_equal(left[:12], right[:12])
        assert (left != right).any(), "recache and keep go different ways"
        watched.studio.perform(protocol.Keep("right"))
        watched.told("state", current=2, compare=None)
        watched.studio.save(tmp_path / "kept.session.json")
    recorded = json.loads((tmp_path / "kept.session.json").read_text())
    (switch,) = [event for event in recorded["events"] if event["event"] == "switch"]
    assert (switch["prompt"], switch["policy"]) == (STOPS, "keep")


def test_an_exception_of_the_model_is_survived(tmp_path, monkeypatch):
    with Watched(tmp_path) as watched:
        watched.told("stored", block=5)
        monkeypatch.setattr(studio_lib.turn.Pipeline, "advance", _broken)
        failed = watched.told("state", phase="failed")
        assert "the device is gone" in failed["error"]
        monkeypatch.undo()
        watched.studio.perform(protocol.Act("restart"))
        assert watched.told("state", phase="running", current=1)["takes"][1]["start"] >= 2
        watched.frames(take=1, count=4)


def _broken(*_, **__):
    raise RuntimeError("the device is gone")


@pytest.mark.slow
def test_after_warming_up_no_switch_compiles_anything(caplog):
    pipe = small_pipeline()
    assert list(warm_up(pipe, FOX)) == [None, "recache", "keep", "clear", "flush", "cut"]
    with Session(pipe, FOX) as session:
        for _ in range(2):
            next(session)
        import jax

        with jax.log_compiles(), caplog.at_level("WARNING"):
            caplog.clear()
            for policy in ("recache", "flush", "recache", "cut", "recache", "keep", "clear", "recache"):
                session.switch(STOPS, policy=policy)
                for _ in range(2):
                    next(session)
    programs = [r.getMessage() for r in caplog.records if "Compiling" in r.getMessage()]
    large = ("recache", "flush", "cut", "keep", "clear", "jit(step", "_decode", "encode_text")
    assert not [text for text in programs if any(name in text for name in large)]
