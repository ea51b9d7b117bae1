"""What goes over the socket: JSON both ways, and one binary message per frame.

A message from a browser is checked here, whole, before anything acts on it; what is wrong with it comes
back as one line. docs/serve.md lists the messages.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from typing import Any, Literal, get_args

from longlive_jax.config import SwitchPolicy
from longlive_jax.errors import UserError, require
from longlive_jax.inference.story import BlendCurve
from longlive_jax.serve.settings import MAX_BLEND_SECONDS, MAX_STEPS, MESSAGE_BYTES, PROMPT_CHARS, Pace

VERSION = 1
_FRAME = struct.Struct("<BBHIII")
Channel = Literal[0, 1, 2]
"""The live video, or the left or right side of a comparison."""

Side = Literal["left", "right", "neither"]
Origin = Literal["here", "start"]


def pack_frame(image: bytes, *, channel: int, take: int, block: int, index: int, sent: float) -> bytes:
    """One frame: a header of 16 bytes and the image as it is (PNG or JPEG).

    Args:
      image: the encoded image.
      channel: see `Channel`.
      take: the take it belongs to.
      block: the block it belongs to.
      index: video frame.
      sent: seconds on any clock that only runs forward; travels in ms modulo 2**32.
    """
    header = _FRAME.pack(VERSION, channel, take & 0xFFFF, block, index, int(sent * 1000) & 0xFFFFFFFF)
    return header + image


def unpack_frame(message: bytes) -> tuple[dict[str, int], bytes]:
    """Inverse of `pack_frame`: the header's fields, and the image."""
    names = ("version", "channel", "take", "block", "index", "sent_ms")
    return dict(zip(names, _FRAME.unpack_from(message), strict=True)), message[_FRAME.size :]


# --- from the browser -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """A place in the history: the beginning of a block in the line of a take."""

    take: int
    block: int


@dataclasses.dataclass(frozen=True)
class Hello:
    """The first message: a key from an earlier `welcome`, or empty."""

    key: str


@dataclasses.dataclass(frozen=True)
class Open:
    """Asks for a session."""

    prompt: str
    seed: int
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Watch:
    """Asks to watch a session."""

    room: str


@dataclasses.dataclass(frozen=True)
class Switch:
    """Another prompt, after going back to `point` if there is one."""

    prompt: str
    blend_seconds: float
    curve: BlendCurve
    point: Point | None


@dataclasses.dataclass(frozen=True)
class Change:
    """Other settings (dotted names) or another seed."""

    settings: Mapping[str, Any]
    seed: int | None


@dataclasses.dataclass(frozen=True)
class Rewind:
    """Back to a block."""

    point: Point


@dataclasses.dataclass(frozen=True)
class Compare:
    """Two videos side by side from the same state or from the same seed."""

    origin: Origin
    prompt: str
    left: Mapping[str, Any]
    right: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Keep:
    """Ends a comparison and goes on with one side, or where the video was."""

    side: Side


@dataclasses.dataclass(frozen=True)
class SetPace:
    """How fast frames are shown."""

    pace: Pace


@dataclasses.dataclass(frozen=True)
class Ping:
    """Answered with the same number."""

    t: float


@dataclasses.dataclass(frozen=True)
class Act:
    """A message that is only a name."""

    name: str


ACTS = ("pause", "resume", "restart", "claim", "release", "leave", "cancel", "end")
FromBrowser = Hello | Open | Watch | Switch | Change | Rewind | Compare | Keep | SetPace | Ping | Act
Command = Switch | Change | Rewind | Compare | Keep | SetPace | Act
"""Messages only the one in control may send (of `Act`: pause, resume, restart, end)."""


def parse(message: str | bytes) -> FromBrowser:
    """Reads one message.

    Raises:
      UserError: it is not one; the message says why in one line.
    """
    require(isinstance(message, str), "binary messages are not taken")
    require(len(message) <= MESSAGE_BYTES, f"a message may have {MESSAGE_BYTES} characters")
    try:
        values = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise UserError("the message is not JSON") from error
    require(isinstance(values, dict), "a message must be a table")
    fields = _Fields(values)
    kind = fields.text("type", most=20)
    if kind in ACTS:
        parsed: FromBrowser = Act(kind)
    elif kind in _READERS:
        parsed = _READERS[kind](fields)
    else:
        raise UserError(f"type={kind!r} is not known")
    fields.check_all_read()
    return parsed


class _Fields:
    """Takes fields out of a message, each checked."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def has(self, name: str) -> bool:
        return self._values.get(name) is not None

    def text(self, name: str, *, most: int, default: str | None = None) -> str:
        value = self._take(name, default)
        require(isinstance(value, str), f"{name} must be text")
        require(len(value) <= most, f"{name} has {len(value)} characters; at most {most} are taken")
        require(value.isascii() or _is_unicode(value), f"{name} holds half a character")
        return value

    def whole(self, name: str, *, least: int, most: int, default: int | None = None) -> int:
        value = self._take(name, default)
        require(
            type(value) is int and least <= value <= most,
            f"{name}={_shown(value)} must be a whole number in [{least}, {most}]",
        )
        return value

    def number(self, name: str, *, most: float, default: float | None = None) -> float:
        value = self._take(name, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        require(
            is_number and math.isfinite(value) and 0 <= value <= most,
            f"{name}={_shown(value)} must be a number in [0, {most:g}]",
        )
        return float(value)

    def flag(self, name: str) -> bool:
        value = self._take(name, None)
        require(isinstance(value, bool), f"{name}={_shown(value)} must be true or false")
        return value

    def choice(self, name: str, options: tuple[str, ...], *, default: str | None = None) -> Any:
        value = self._take(name, default)
        require(value in options, f"{name}={_shown(value)} must be one of {', '.join(options)}")
        return value

    def table(self, name: str) -> "_Fields":
        value = self._take(name, {})
        require(isinstance(value, dict), f"{name} must be a table")
        return _Fields(value)

    def steps(self, name: str) -> tuple[int, ...]:
        value = self._take(name, None)
        require(
            isinstance(value, list) and 0 < len(value) <= MAX_STEPS and all(type(v) is int for v in value),
            f"{name} must be a list of 1 to {MAX_STEPS} whole numbers",
        )
        return tuple(value)

    def check_all_read(self) -> None:
        require(not self._values, f"{_shown(', '.join(self._values))} is not known here")

    def _take(self, name: str, default: Any) -> Any:
        value = self._values.pop(name, None)
        value = default if value is None else value
        require(value is not None, f"{name} is missing")
        return value


def _is_unicode(text: str) -> bool:
    """JSON can spell one half of a surrogate pair, which no encoder takes."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _prompt(fields: _Fields, *, default: str | None = None) -> str:
    text = " ".join(fields.text("prompt", most=PROMPT_CHARS, default=default).split())
    require(bool(text) or default is not None, "the prompt is empty")
    return text


def _point(fields: _Fields) -> Point:
    return Point(
        fields.whole("take", least=0, most=1 << 16), fields.whole("block", least=0, most=(1 << 32) - 1)
    )


def _settings(fields: _Fields, *, begins: bool) -> dict[str, Any]:
    """The knobs of the page, as dotted names of the config; some act on the beginning of a video alone."""
    found: dict[str, Any] = {}
    if fields.has("window"):
        found["window.window_frames"] = fields.whole("window", least=1, most=1000)
    if fields.has("sink"):
        found["window.sink_frames"] = fields.whole("sink", least=0, most=1000)
    if fields.has("steps"):
        found["sampler.steps"] = fields.steps("steps")
    if fields.has("opening_steps"):
        require(begins, "opening_steps: the first block is made; give it to open, or compare from start")
        found["sampler.opening_steps"] = fields.steps("opening_steps")
    if fields.has("policy"):
        found["switch.policy"] = fields.choice("policy", get_args(SwitchPolicy))
    if fields.has("keep_sink"):
        found["switch.keep_sink"] = fields.flag("keep_sink")
    fields.check_all_read()
    return found


def _seed(fields: _Fields, *, default: int | None = None) -> int:
    return fields.whole("seed", least=0, most=(1 << 32) - 1, default=default)


def _switch(fields: _Fields) -> Switch:
    return Switch(
        prompt=_prompt(fields),
        blend_seconds=fields.number("blend", most=MAX_BLEND_SECONDS, default=0.0),
        curve=fields.choice("curve", get_args(BlendCurve), default="linear"),
        point=_point(fields) if fields.has("take") else None,
    )


def _change(fields: _Fields) -> Change:
    settings = _settings(fields.table("settings"), begins=False)
    seed = _seed(fields) if fields.has("seed") else None
    require(bool(settings) or seed is not None, "give settings or a seed to change")
    return Change(settings, seed)


def _compare(fields: _Fields) -> Compare:
    origin: Origin = fields.choice("origin", get_args(Origin), default="here")
    return Compare(
        origin=origin,
        prompt=_prompt(fields, default=""),
        left=_settings(fields.table("left"), begins=origin == "start"),
        right=_settings(fields.table("right"), begins=origin == "start"),
    )


_READERS: Mapping[str, Any] = {
    "hello": lambda fields: Hello(fields.text("key", most=64, default="")),
    "open": lambda fields: Open(
        _prompt(fields), _seed(fields, default=0), _settings(fields.table("settings"), begins=True)
    ),
    "watch": lambda fields: Watch(fields.text("room", most=64)),
    "switch": _switch,
    "change": _change,
    "rewind": lambda fields: Rewind(_point(fields)),
    "compare": _compare,
    "keep": lambda fields: Keep(fields.choice("side", get_args(Side))),
    "pace": lambda fields: SetPace(fields.choice("pace", get_args(Pace))),
    "ping": lambda fields: Ping(fields.number("t", most=1e15)),
}
