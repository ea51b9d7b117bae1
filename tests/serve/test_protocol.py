"""Messages: what is taken, and that everything else is refused with one line."""

import contextlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.errors import UserError
from longlive_jax.serve import protocol
from longlive_jax.serve.protocol import Act, Change, Compare, Keep, Open, Point, Rewind, Switch


def parse(**message):
    return protocol.parse(json.dumps(message))


def test_messages_are_read():
    assert parse(type="open", prompt="  a  fox ", seed=3, settings={"window": 9}) == Open(
        "a fox", 3, {"window.window_frames": 9}
    )
    assert parse(type="open", prompt="a", settings={"opening_steps": [1000, 500]}) == Open(
        "a", 0, {"sampler.opening_steps": (1000, 500)}
    )
    assert parse(type="switch", prompt="b") == Switch("b", 0.0, "linear", None)
    assert parse(type="switch", prompt="b", blend=2, curve="spherical", take=1, block=7) == Switch(
        "b", 2.0, "spherical", Point(1, 7)
    )
    assert parse(
        type="change", settings={"policy": "keep", "keep_sink": False, "steps": [1000, 500]}
    ) == Change({"switch.policy": "keep", "switch.keep_sink": False, "sampler.steps": (1000, 500)}, None)
    assert parse(type="change", seed=0) == Change({}, 0)
    assert parse(type="rewind", take=0, block=4) == Rewind(Point(0, 4))
    assert parse(type="compare", left={"policy": "recache"}, right={"policy": "keep"}) == Compare(
        "here", "", {"switch.policy": "recache"}, {"switch.policy": "keep"}
    )
    assert parse(type="compare", origin="start", left={"opening_steps": [1000]}, right={}) == Compare(
        "start", "", {"sampler.opening_steps": (1000,)}, {}
    )
    assert parse(type="keep", side="left") == Keep("left")
    assert [parse(type=name) for name in protocol.ACTS] == [Act(name) for name in protocol.ACTS]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({}, "type is missing"),
        ({"type": "fly"}, "type='fly' is not known"),
        ({"type": "open"}, "prompt is missing"),
        ({"type": "open", "prompt": " "}, "the prompt is empty"),
        ({"type": "open", "prompt": 3}, "prompt must be text"),
        ({"type": "open", "prompt": "x" * 1001}, "prompt has 1001 characters; at most 1000 are taken"),
        ({"type": "open", "prompt": "a \ud800"}, "prompt holds half a character"),
        ({"type": "open", "prompt": "a", "seed": -1}, "seed=-1 must be a whole number in"),
        ({"type": "open", "prompt": "a", "seed": True}, "seed=True must be a whole number"),
        ({"type": "switch", "prompt": "a", "blend": float("nan")}, "blend=nan must be a number"),
        ({"type": "switch", "prompt": "a", "curve": "round"}, "curve='round' must be one of linear"),
        ({"type": "switch", "prompt": "a", "extra": 1}, "'extra' is not known here"),
        ({"type": "change"}, "give settings or a seed"),
        ({"type": "change", "settings": {"dtype": "float32"}}, "'dtype' is not known here"),
        ({"type": "change", "settings": {"steps": []}}, "steps must be a list of 1 to 16"),
        ({"type": "change", "settings": {"steps": list(range(17))}}, "steps must be a list"),
        ({"type": "change", "settings": {"opening_steps": [1000]}}, "opening_steps: the first block is made"),
        ({"type": "compare", "left": {"opening_steps": [1000]}}, "opening_steps: the first block is made"),
        ({"type": "change", "settings": {"window": 10**9}}, "window=1000000000 must be a whole number"),
        ({"type": "change", "settings": []}, "settings must be a table"),
        ({"type": "compare", "left": {"policy": "best"}}, "policy='best' must be one of recache"),
        ({"type": "keep", "side": ["left"]}, "side=['left'] must be one of"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(message, reason):
    with pytest.raises(UserError) as refused:
        protocol.parse(json.dumps(message))
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "[" * 5000, b"\x00", '"' + "x" * 20000 + '"'])
def test_what_is_no_message_is_refused(text):
    with pytest.raises(UserError):
        protocol.parse(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_NAMES = st.sampled_from(
    [
        "prompt",
        "seed",
        "settings",
        "take",
        "block",
        "side",
        "pace",
        "t",
        "key",
        "room",
        "left",
        "blend",
        "curve",
    ]
)
_KINDS = st.sampled_from(
    ["hello", "open", "watch", "switch", "change", "rewind", "compare", "keep", "pace", "ping"]
)


@settings(max_examples=100, deadline=None)
@given(kind=_KINDS, fields=st.dictionaries(_NAMES, _JSON, max_size=5))
def test_no_message_raises_anything_but_a_refusal(kind, fields):
    with contextlib.suppress(UserError):
        protocol.parse(json.dumps({**fields, "type": kind}))


def test_frames_keep_their_header():
    packed = protocol.pack_frame(b"image", channel=2, take=65537, block=7, index=80, sent=5e6)
    header, image = protocol.unpack_frame(packed)
    assert image == b"image"
    assert header == {
        "version": 1, "channel": 2, "take": 1, "block": 7, "index": 80, "sent_ms": 5_000_000_000 % 2**32,
    }  # fmt: skip
