"""A live session: what comes out is what a story would give, whatever is asked for on the way."""

import dataclasses
import json
import pathlib
import re
import threading
import time

import jax
import numpy as np
import pytest

from longlive_jax import PromptSwitch, Session, Story, UserError
from longlive_jax.config_dict import override
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.session import SessionError
from tests.inference._live import small_pipeline

DOCS = pathlib.Path(__file__).parents[2] / "docs"
FOX, STOPS, SNOW = "a red fox runs", "the fox stops", "it snows"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return small_pipeline()


def frames_of(blocks) -> np.ndarray:
    return np.concatenate([block.frames for block in blocks])


def take(session: Session, count: int) -> list:
    return [next(session) for _ in range(count)]


# --- frames -----------------------------------------------------------------------------------------


def test_a_session_gives_the_frames_of_the_same_story(pipe):
    """Bit for bit: both run the same compiled programs."""
    story = Story(FOX, (PromptSwitch(4, STOPS), PromptSwitch(12, SNOW, "keep", blend_frames=6)))
    expected = np.concatenate([c.video[0] for c in pipe.stream(story, frames=21, seed=3)])
    with Session(pipe, FOX, seed=3, blocks=7) as session:
        session.switch(STOPS, at=4)
        session.switch(SNOW, at=12, policy="keep", blend=6)
        blocks = list(session)
    np.testing.assert_array_equal(frames_of(blocks), expected)
    assert [block.first for block in blocks] == [0, 9, 21, 33, 45, 57, 69]
    assert [block.info.frame for block in blocks] == [0, 3, 6, 9, 12, 15, 18]
    assert [block.info.prompt for block in blocks] == [FOX, FOX, STOPS, STOPS, SNOW, SNOW, SNOW]
    assert [block.info.policy for block in blocks] == [None, None, "recache", None, "keep", "keep", None]
    assert [block.info.weight for block in blocks] == [1, 1, 1, 1, 0.5, 1, 1]
    switched = [block.info.timings.response is not None for block in blocks]
    assert switched == [False, False, True, False, True, False, False]
    assert all(b.info.timings.ready >= b.info.timings.dispatched > 0 for b in blocks)


def test_a_session_opens_with_the_steps_for_it(pipe):
    """Also after it was rewound to its beginning."""
    opened = dataclasses.replace(pipe, config=override(pipe.config, {"sampler.opening_steps": (1000, 500)}))
    expected = np.concatenate([c.video[0] for c in opened.stream(FOX, frames=9, seed=3)])
    plain = np.concatenate([c.video[0] for c in pipe.stream(FOX, frames=9, seed=3)])
    with Session(opened, FOX, seed=3, keep_blocks=4) as session:
        first = take(session, 3)
        session.rewind(0)
        again = take(session, 3)
    np.testing.assert_array_equal(frames_of(first), expected)
    np.testing.assert_array_equal(frames_of(again), expected)
    assert (frames_of(first) != plain).any()


def test_the_next_block_is_under_way_when_frames_are_handed_out(pipe):
    with Session(pipe, FOX, blocks=4) as session:
        assert [(block.info.block, session.next_block) for block in session] == [
            (0, 2),
            (1, 3),
            (2, 4),
            (3, 4),
        ]


def test_every_policy_takes_effect_at_the_next_open_block(pipe):
    policies = ["recache", "keep", "clear", "flush", "cut"]
    with Session(pipe, FOX, seed=3) as session:
        assert frames_of(take(session, 4)).shape == (45, 16, 16, 3)
        start = session.snapshot()
        take(session, 2)
        latents = [latest_latents(session)]
        for policy in policies:
            session.restore(start)
            session.switch(STOPS, policy=policy)
            pending, block = take(session, 2)
            assert (pending.info.policy, block.info.policy) == (None, policy)
            latents.append(latest_latents(session))
    for i, a in enumerate(latents):
        assert all(np.abs(a - b).max() > 1e-5 for b in latents[:i])


def latest_latents(session: Session) -> np.ndarray:
    return np.asarray(session.snapshot().moment.stream.rollout.history)


def test_of_requests_for_one_block_the_last_counts(pipe):
    with Session(pipe, FOX, seed=3) as session:
        next(session)
        session.switch(SNOW)
        session.switch(STOPS, policy="keep")
        blocks = take(session, 3)
        assert [b.info.prompt for b in blocks] == [FOX, STOPS, STOPS]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.switch("  "), "prompt='  ' must be text"),
        (lambda s: s.switch(STOPS, policy="forget"), "policy='forget' must be one of recache, keep, clear"),
        (lambda s: s.switch(STOPS, keep_sink=1), "keep_sink=1 must be true or false"),
        (lambda s: s.switch(STOPS, at="soon"), r"at='soon' must be a latent frame \(40\) or seconds"),
        (lambda s: s.switch(STOPS, at=2), "at: frame 2 has passed; the next block begins at frame 9"),
        (lambda s: s.switch(STOPS, at=True), r"at=True must be a latent frame \(40\) or '10s'"),
        (lambda s: s.switch(STOPS, blend="-3"), "blend='-3' must be a latent frame"),
        (lambda s: s.switch(STOPS, blend=3, curve="wavy"), "curve='wavy' must be one of linear, spherical"),
        (lambda s: s.change(), "give settings or a seed to change"),
        (lambda s: s.change(seed=-1), "seed=-1 must be in"),
        (lambda s: s.change({"video.fps": 8}), "video.fps cannot change while a session runs"),
        (lambda s: s.change({"window.windw": 8}), "'windw' is not a setting"),
        (lambda s: s.change({"window.window_frames": 5}), "must be at least sink_frames"),
        (lambda s: s.change({"window.window_frames": -1}), "a session has no end"),
        (lambda s: s.change({"window.sink_frames": 4}), "the sink of 3 frames cannot grow"),
        (lambda s: s.rewind(1), "block=1 is not kept, but none"),
        (lambda s: s.snapshot(place="disk"), "place='disk' must be"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line_and_the_video_goes_on(running, ask, message):
    session = running
    with pytest.raises(UserError, match=message) as caught:
        ask(session)
    assert "\n" not in str(caught.value)
    assert session.settle(0)  # nothing of it waits
    assert session.next_block == 3


@pytest.fixture(scope="module")
def running(pipe):
    with Session(pipe, FOX, seed=3) as session:
        take(session, 2)
        yield session
        assert next(session).info.block == 2


def test_what_no_session_can_begin_with(pipe):
    unbounded = override(pipe.config, {"window.window_frames": -1})
    with pytest.raises(UserError, match="a session has no end"):
        Session(dataclasses.replace(pipe, config=unbounded), FOX)
    with pytest.raises(UserError, match="height=17"):
        Session(pipe, FOX, height=17)
    with pytest.raises(UserError, match="prompt=''"):
        Session(pipe, "")


# --- branches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_snapshot_is_good_for_many_branches(pipe, place):
    with Session(pipe, FOX, seed=3) as session:
        take(session, 3)
        snapshot = session.snapshot(place=place)
        state = snapshot.moment.stream
        assert (
            snapshot.nbytes == sum(x.nbytes for x in jax.tree.leaves(state)) > state.rollout.cache.key.nbytes
        )
        with session.fork(snapshot) as other:
            other.switch(STOPS, policy="flush")
            branch = take(other, 3)
        onward = take(session, 3)
        assert [b.info.block for b in onward] == [b.info.block for b in branch] == [3, 4, 5]
        np.testing.assert_array_equal(onward[0].frames, branch[0].frames)  # it was under way already
        assert np.abs(onward[1].frames.astype(int) - branch[1].frames).max() > 0
        session.restore(snapshot)
        np.testing.assert_array_equal(frames_of(take(session, 3)), frames_of(onward))
        session.restore(snapshot)
        session.switch(STOPS, policy="flush")
        np.testing.assert_array_equal(frames_of(take(session, 3)), frames_of(branch))


def test_rewinding_to_a_kept_block(pipe):
    with Session(pipe, FOX, seed=3, keep_blocks=3) as session:
        blocks = take(session, 5)  # block 5 is under way
        with pytest.raises(UserError, match="block=1 is not kept, but 3, 4, 5"):
            session.rewind(1)
        session.rewind(3)
        again = take(session, 2)
        assert [b.info.block for b in again] == [3, 4]
        np.testing.assert_array_equal(frames_of(again), frames_of(blocks[3:]))
        session.rewind(4)
        session.switch(SNOW, policy="clear")
        assert next(session).info.policy == "clear"  # the rewound block itself can still be changed


# --- files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eventful(pipe, tmp_path_factory):
    """A session with every kind of event, its frames and its file."""
    path = tmp_path_factory.mktemp("session") / "live.json"
    blocks = []
    with Session(pipe, FOX, seed=3) as session:
        blocks += take(session, 1)
        session.switch(STOPS, policy="cut")
        blocks += take(session, 3)
        session.change({"window.window_frames": 9}, seed=8)
        session.switch(SNOW, blend="1s", curve="spherical", policy="flush")
        blocks += take(session, 4)
        before = session.snapshot()
        session.switch(FOX, policy="clear")  # a branch that is given up
        take(session, 3)
        session.restore(before)
        session.switch(STOPS)
        blocks += take(session, 3)
        session.save(path)
        blocks += take(session, 1)  # was under way
    return path, frames_of(blocks)


def test_a_session_file_replays_bit_for_bit_and_goes_on(pipe, eventful, tmp_path):
    path, frames = eventful
    with Session.load(path, pipe) as session:
        replayed = list(session.replay())
        np.testing.assert_array_equal(frames_of(replayed), frames)
        assert session.recorded_blocks == len(replayed) == 12
        session.save(tmp_path / "again.json")
        assert next(session).info.block == 12
    assert (tmp_path / "again.json").read_text() == path.read_text()
    events = json.loads(path.read_text())["events"]
    assert [(e["event"], e["block"]) for e in events] == [
        ("switch", 2), ("change", 5), ("switch", 5), ("switch", 9),
    ]  # fmt: skip


def test_settings_change_at_a_block_boundary(pipe):
    with Session(pipe, FOX, seed=3) as session:
        plain = take(session, 4)
    with Session(pipe, FOX, seed=3) as session:
        take(session, 1)
        session.change(seed=4)
        session.change({"switch.policy": "keep", "sampler.shift": 5.0})
        session.switch(STOPS)
        blocks = take(session, 2)
        assert [(b.info.seed, b.info.policy) for b in blocks] == [(3, None), (4, "keep")]
        np.testing.assert_array_equal(blocks[0].frames, plain[1].frames)
        assert np.abs(blocks[1].frames.astype(int) - plain[2].frames).max() > 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v.pop("events"), "is damaged: KeyError 'events'"),
        (lambda v: v.update(blocks=-1), "is damaged: blocks=-1 must be a whole number"),
        (lambda v: v.update(format="x"), "is not a session file"),
        (lambda v: v["events"].append({"event": "explode", "block": 3}), "event 'explode' is not known"),
        (lambda v: v["events"][0].update(policy="x"), "policy='x' must be one of"),
        (lambda v: v["config"]["transformer"].update(dim=32), "the model has another shape"),
        (
            lambda v: v.update(
                origin={"checkpoint": "x", "weights": "auto", "use_lora": True, "fingerprints": {"vae": "0"}}
            ),
            "",
        ),
    ],
)
def test_a_damaged_session_file_is_one_line(pipe, eventful, tmp_path, damage, message):
    values = json.loads(eventful[0].read_text())
    damage(values)
    (tmp_path / "x.json").write_text(json.dumps(values))
    if message:
        with pytest.raises(UserError, match=message) as caught:
            Session.load(tmp_path / "x.json", pipe)
        assert "\n" not in str(caught.value)
    else:  # without a pipeline it opens the recorded checkpoint, which is not there
        with pytest.raises(UserError, match="checkpoint=x is no checkpoint"):
            Session.load(tmp_path / "x.json")


# --- failures, threads, length ----------------------------------------------------------------------


def test_a_failure_is_reported_and_the_session_goes_on_from_a_snapshot(pipe, monkeypatch):
    with Session(pipe, FOX, seed=3) as session:
        expected = frames_of(take(session, 5))
    with Session(pipe, FOX, seed=3, keep_blocks=2) as session:
        frames = take(session, 2)
        advance = Pipeline.advance

        def broken(self, state, **_):
            advance(self, state)  # consumes the state, as a step that fails on the device does
            raise ZeroDivisionError("out of luck\nand more")

        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "advance", broken)
            frames += take(session, 1)  # was under way
            for _ in range(2):  # until it is restarted
                with pytest.raises(
                    SessionError, match=r"block 3 failed: out of luck; `restart` goes"
                ) as caught:
                    next(session)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            with pytest.raises(SessionError):
                session.snapshot()
        assert session.restart() == 3
        frames += take(session, 2)
        assert [b.info.block for b in frames] == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(frames_of(frames), expected)
    with Session(pipe, FOX, seed=3) as session:  # nothing kept
        take(session, 2)
        with monkeypatch.context() as patch:
            patch.setattr(Pipeline, "advance", broken)
            next(session)
            with pytest.raises(SessionError):
                next(session)
        assert session.restart() == 0
        np.testing.assert_array_equal(frames_of(take(session, 5)), expected)


def test_another_thread_pauses_switches_and_stops(pipe):
    session, seen, done = Session(pipe, FOX, seed=3), [], threading.Event()

    def iterate():
        seen.extend(block.info for block in session)
        done.set()

    thread = threading.Thread(target=iterate)
    thread.start()
    try:
        wait_until(lambda: session.next_block >= 3)
        session.pause()
        wait_until(lambda: session._flight is None)
        paused_at = session.next_block
        session.switch(STOPS, policy="keep")
        assert not session.settle(0.05)
        assert session.next_block == paused_at
        snapshot = session.snapshot()  # works while paused
        assert snapshot.block == paused_at
        session.resume()
        assert session.settle(30)
        wait_until(lambda: session.next_block > paused_at + 1)
    finally:
        session.close()
    assert done.wait(30)
    thread.join()
    assert [info.block for info in seen] == list(range(len(seen)))
    assert [info.block for info in seen if info.policy == "keep"] == [paused_at]
    with pytest.raises(UserError, match="the session has ended"):
        session.switch(SNOW)


def wait_until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_memory_is_flat(pipe):
    """Device arrays after every block of a long video; the 20-minute run is `benchmarks.interactive`."""
    live = []
    with Session(pipe, FOX, seed=3, keep_blocks=1) as session:
        for block in session:
            if block.info.block % 10 == 5:
                session.switch([STOPS, SNOW][block.info.block % 2], policy="keep")
            live.append(sum(array.nbytes for array in jax.live_arrays()))
            if block.info.block == 60:
                break
    assert max(live[20:]) <= max(live[5:20])


def test_the_documented_session_runs(pipe, tmp_path, monkeypatch, capsys):
    (page,) = re.findall(r"```python\n(.*?)```", (DOCS / "interactive.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "load", lambda path, overrides: pipe)
    exec(compile(page, "docs/interactive.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == [str(block) for block in range(8)]
    assert "recache" in shown[4]
    events = json.loads((tmp_path / "fox.session.json").read_text())["events"]
    assert [event["event"] for event in events] == ["switch", "change", "switch"]
