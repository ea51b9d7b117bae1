"""What a video is asked to show: a first prompt and the prompts that replace it on the way.

A story counts in latent frames. It comes from prompts on the command line, from a text file with a
prompt per line, or from a JSONL file with a story per line; `read_stories` says what a line may hold.
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from longlive_jax.config import SwitchPolicy, VAEConfig
from longlive_jax.errors import UserError, require

BlendCurve = Literal["linear", "spherical"]
"""How a blend goes from the embedding of one prompt to that of the next."""


@dataclasses.dataclass(frozen=True)
class PromptSwitch:
    """A new prompt from a frame on.

    Attributes:
      frame: latent frame at which the prompt is asked for, at least 1. It takes effect at the first
        block that starts there or later, see `effective_frame`.
      prompt: the text.
      policy: what happens to the cache; None is the config's `switch.policy`.
      keep_sink: whether a recache leaves the sink alone; None is the config's `switch.keep_sink`.
      blend_frames: latent frames on the way from the old prompt to this one, rounded up to blocks, see
        `blend_blocks`. The policy is applied at their end. None and 0 switch at once.
      curve: how the blend goes.
    """

    frame: int
    prompt: str
    policy: SwitchPolicy | None = None
    keep_sink: bool | None = None
    blend_frames: int | None = None
    curve: BlendCurve = "linear"

    def __post_init__(self) -> None:
        _check_frame(self.frame)
        check_switch(
            self.prompt,
            policy=self.policy,
            keep_sink=self.keep_sink,
            blend_frames=self.blend_frames,
            curve=self.curve,
        )


@dataclasses.dataclass(frozen=True)
class Story:
    """A first prompt and its switches, in rising order of their frames."""

    prompt: str
    switches: tuple[PromptSwitch, ...] = ()

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        object.__setattr__(self, "switches", tuple(self.switches))
        for earlier, later in zip(self.switches, self.switches[1:], strict=False):
            require(
                earlier.frame < later.frame,
                f"switch frames {earlier.frame}, {later.frame} must rise; put the prompts in order",
            )

    @property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt, the first one first."""
        return (self.prompt, *(switch.prompt for switch in self.switches))

    def prompt_at(self, frame: int, *, block_frames: int) -> str:
        """The prompt under which latent frame `frame` is generated."""
        block_start = frame - frame % block_frames
        due = [s.prompt for s in self.switches if effective_frame(s.frame, block_frames) <= block_start]
        return due[-1] if due else self.prompt


def as_stories(stories: str | Story | Sequence[str | Story]) -> tuple[Story, ...]:
    """One story per video, from anything a pipeline is called with; plain text is a first prompt."""
    items = [stories] if isinstance(stories, str | Story) else list(stories)
    require(len(items) > 0, "prompt: give at least one")
    return tuple(item if isinstance(item, Story) else Story(item) for item in items)


def check_switch(
    prompt: Any, *, policy: Any = None, keep_sink: Any = None, blend_frames: Any = None, curve: Any = "linear"
) -> None:
    """Refuses what no switch can be made of; the arguments are those of `PromptSwitch`."""
    _check_prompt(prompt)
    require(
        policy is None or policy in get_args(SwitchPolicy),
        f"policy={policy!r} must be one of {', '.join(get_args(SwitchPolicy))}",
    )
    require(
        keep_sink is None or isinstance(keep_sink, bool), f"keep_sink={keep_sink!r} must be true or false"
    )
    require(
        blend_frames is None or (_is_whole(blend_frames) and blend_frames >= 0),
        f"blend_frames={blend_frames!r} must be a whole number of latent frames, 0 or more",
    )
    require(
        curve in get_args(BlendCurve), f"curve={curve!r} must be one of {', '.join(get_args(BlendCurve))}"
    )


# --- frames, blocks and seconds ---------------------------------------------------------------------


def effective_frame(frame: int, block_frames: int) -> int:
    """Start of the first block that begins at `frame` or later: where a switch takes effect."""
    return -(-frame // block_frames) * block_frames


def blend_blocks(blend_frames: int | None, block_frames: int) -> int:
    """Blocks a blend takes; the last of them runs under the new prompt alone. 1 is a plain switch."""
    return max(-(-(blend_frames or 0) // block_frames), 1)


def check_schedule(story: Story, *, frames: int, block_frames: int) -> None:
    """Refuses a story whose prompts would not all be seen.

    Args:
      story: the story.
      frames: length of the video in latent frames.
      block_frames: latent frames generated together.

    Raises:
      UserError: a switch comes at or after the end, two take effect at the same block, or a blend is not
        over when the next prompt or the end comes.
    """
    starts = [effective_frame(switch.frame, block_frames) for switch in story.switches]
    for switch, start, following in zip(story.switches, starts, [*starts, None][1:], strict=True):
        require(
            start < frames,
            f"the switch at frame {switch.frame} takes effect at frame {start}, but the video has {frames} "
            "latent frames; switch earlier or ask for more frames",
        )
        require(
            start != following,
            f"the switch at frame {switch.frame} and the next one both take effect at frame {start} (blocks "
            f"have {block_frames} frames), so its prompt would not be seen; move one of them",
        )
        reached = start + (blend_blocks(switch.blend_frames, block_frames) - 1) * block_frames
        limit, what = (frames, "video ends") if following is None else (following, "next prompt begins")
        require(
            reached < limit,
            f"the blend of the switch at frame {switch.frame} reaches its prompt at frame {reached}, but the "
            f"{what} at frame {limit}; make it shorter",
        )


def frames_from_seconds(seconds: float, *, vae: VAEConfig, fps: int) -> int:
    """Fewest latent frames that last `seconds`; equally, the first latent frame starting by then.

    Latent frame 0 is one video frame and every later one is `vae.temporal_stride`, so this is not a
    fixed rate: at 16 frames per second and stride 4, one second takes 5 latents and two take 9.
    """
    require(
        math.isfinite(seconds) and seconds >= 0, f"seconds={seconds} must be a number that is not negative"
    )
    # Rounded first: 0.7 s at 10 frames per second is 7 video frames, not 7.000000000000001.
    return vae.latent_frames(math.ceil(round(seconds * fps, 6)))


def frames_lasting(seconds: float, *, vae: VAEConfig, fps: int) -> int:
    """Fewest latent frames, none of them the first of the video, that last `seconds`."""
    require(
        math.isfinite(seconds) and seconds >= 0, f"seconds={seconds} must be a number that is not negative"
    )
    return math.ceil(round(seconds * fps / vae.temporal_stride, 6))


def time_of(text: str) -> tuple[int | None, float | None]:
    """Reads a time as people write it: `40` is (40 latent frames, None), `2.5s` is (None, 2.5 seconds).

    Raises:
      UserError: it is neither.
    """
    number = re.fullmatch(r"(\d+)|(\d*\.?\d+)\s*s", text.strip())
    if number is None:
        raise UserError(f"{text!r} must be a latent frame (40) or seconds (10s)")
    return (int(number[1]), None) if number[1] is not None else (None, float(number[2]))


def frame_of(name: str, value: int | str, *, vae: VAEConfig, fps: int, is_duration: bool = False) -> int:
    """Latent frames from 40, "40" or "10s".

    Args:
      name: of the argument, for errors.
      value: the time.
      vae: gives video frames per latent.
      fps: video frames per second.
      is_duration: a length rather than a position; they differ as the first latent is one video frame.
    """
    try:
        require(_is_whole(value) or isinstance(value, str), f"{value!r} must be a latent frame (40) or '10s'")
        frames, seconds = time_of(str(value))
    except UserError as error:
        raise UserError(f"{name}={error}") from error
    if seconds is None:
        assert frames is not None
        return frames
    return (frames_lasting if is_duration else frames_from_seconds)(seconds, vae=vae, fps=fps)


def seconds_from_frames(frames: int, *, vae: VAEConfig, fps: int) -> float:
    """How long `frames` latent frames last; equally, when latent frame `frames` starts."""
    return vae.video_frames(frames) / fps


# --- reading ----------------------------------------------------------------------------------------


def story_from_prompts(prompts: Sequence[str], switch_frames: Sequence[int] = ()) -> Story:
    """A story of prompts in order, each after the first beginning at its entry of `switch_frames`.

    Raises:
      UserError: the numbers do not match, or frames do not rise.
    """
    require(len(prompts) > 0, "prompt: give at least one")
    require(
        len(prompts) == len(switch_frames) + 1,
        f"{len(prompts)} prompts need {len(prompts) - 1} switch frames, not {len(switch_frames)}; give "
        "--switch-at once for every prompt after the first (several videos come from --prompt-file)",
    )
    switches = [PromptSwitch(f, p) for f, p in zip(switch_frames, prompts[1:], strict=True)]
    return Story(prompts[0], tuple(switches))


def read_stories(
    path: str | pathlib.Path, *, vae: VAEConfig, fps: int, switch_frames: Sequence[int] = ()
) -> tuple[Story, ...]:
    """Reads a prompt file: one story, and so one video, per line. Blank lines are skipped.

    `.txt`: a prompt per line.

    `.jsonl`: an object per line, either of

        {"prompts": ["...", "...", "..."], "switch_frames": [40, 80]}
        {"segments": [{"prompt": "..."},
                      {"prompt": "...", "at_seconds": 5, "policy": "recache", "keep_sink": true},
                      {"prompt": "...", "at_frame": 40, "blend_seconds": 2, "curve": "spherical"}]}

    The first is the release's format. Its switch frames stand in the line, or are given apart, the same
    for every line that has none. In the second a segment after the first says when it begins, as
    `at_seconds` or `at_frame` (a latent frame), and may say what happens to the cache and how long the
    way from the prompt before takes (`blend_seconds` or `blend_frames`).

    Args:
      path: the file, in UTF-8.
      vae: gives the latent frames per second.
      fps: video frames per second.
      switch_frames: latent frames at which the second, third ... prompt of `{"prompts": ...}` lines begin.

    Raises:
      UserError: naming the file and the line.
    """
    path = pathlib.Path(path)
    require(path.suffix in (".txt", ".jsonl"), f"prompt file {path} must end in .txt or .jsonl")
    if path.suffix == ".txt":
        require(not switch_frames, f"{path} has one prompt per video; switches need a .jsonl file")
    stories = []
    for number, line in _lines(path):
        try:
            if path.suffix == ".txt":
                stories.append(Story(line))
            else:
                stories.append(_story_of(_json_object(line), vae=vae, fps=fps, switch_frames=switch_frames))
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    require(len(stories) > 0, f"{path} holds no prompts; write one per line")
    return tuple(stories)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read ({error.strerror})") from error
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8") from error
        if line:
            yield number, line


def _json_object(line: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON ({error}); a line is one object in braces") from error
    require(isinstance(value, dict), "a line must be one object in braces")
    return value


def _story_of(entry: Mapping[str, Any], *, vae: VAEConfig, fps: int, switch_frames: Sequence[int]) -> Story:
    require(
        set(entry) in ({"prompts"}, {"prompts", "switch_frames"}, {"segments"}),
        f'found {", ".join(map(repr, entry)) or "nothing"} where "prompts" or "segments" must stand alone '
        '("switch_frames" may go with "prompts")',
    )
    name = "prompts" if "prompts" in entry else "segments"
    items = entry[name]
    require(isinstance(items, list) and len(items) > 0, f'"{name}" must be a list with at least one entry')
    if name == "prompts":
        own = entry.get("switch_frames", switch_frames)
        require(isinstance(own, list | tuple), f'"switch_frames" must be a list, not {own!r}')
        return story_from_prompts(items, own)
    require(not switch_frames, '"segments" say themselves when they begin; leave --switch-at out')
    segments = [_segment(item, i, vae=vae, fps=fps) for i, item in enumerate(items)]
    return Story(segments[0]["prompt"], tuple(PromptSwitch(**segment) for segment in segments[1:]))


_HOW = ("policy", "keep_sink", "blend_frames", "curve")
_SEGMENT_NAMES = ("prompt", "at_seconds", "at_frame", "blend_seconds", *_HOW)


def _segment(item: Any, index: int, *, vae: VAEConfig, fps: int) -> dict[str, Any]:
    """Checks one entry of "segments"; returns the arguments of its PromptSwitch."""
    where = f"segment {index + 1}"
    require(isinstance(item, dict), f"{where} must be an object in braces")
    for name in item:
        require(
            name in _SEGMENT_NAMES, f"{where}: {name!r} is not known; choose from {', '.join(_SEGMENT_NAMES)}"
        )
    require("prompt" in item, f'{where} has no "prompt"')
    if index == 0:
        start = item.get("at_frame", item.get("at_seconds", 0))
        require(start == 0, f"{where} is the first, so it begins at 0, not {start}")
        for name in ("blend_seconds", *_HOW):
            require(name not in item, f'{where} is the first: there is no switch for "{name}" to decide on')
        return {"prompt": item["prompt"]}
    require(
        ("at_seconds" in item) != ("at_frame" in item),
        f'{where} needs one of "at_seconds" and "at_frame" to say when it begins',
    )
    for name in ("at_seconds", "blend_seconds"):
        value = item.get(name, 0)
        require(_is_number(value), f"{where}: {name}={value!r} must be a number")
    switch = {"prompt": item["prompt"]} | {name: item[name] for name in _HOW if name in item}
    if "blend_seconds" in item:
        require("blend_frames" not in item, f'{where} has both "blend_seconds" and "blend_frames"; give one')
        switch["blend_frames"] = frames_lasting(item["blend_seconds"], vae=vae, fps=fps)
    if "at_seconds" in item:
        return switch | {"frame": frames_from_seconds(item["at_seconds"], vae=vae, fps=fps)}
    return switch | {"frame": item["at_frame"]}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_prompt(prompt: Any) -> None:
    require(
        isinstance(prompt, str) and bool(prompt.strip()),
        f"prompt={prompt!r} must be text that is not blank",
    )


def _check_frame(frame: Any) -> None:
    require(
        _is_whole(frame) and frame > 0,
        f"switch frame {frame!r} must be a whole number of latent frames, 1 or more",
    )


# --- dictionaries -----------------------------------------------------------------------------------


def to_dict(story: Story) -> dict[str, Any]:
    """A JSON-ready copy, in the form of a `segments` line."""
    segments: list[dict[str, Any]] = [{"prompt": story.prompt}]
    for switch in story.switches:
        segment = {"prompt": switch.prompt, "at_frame": switch.frame}
        chosen = {name: getattr(switch, name) for name in _HOW}
        if not switch.blend_frames:
            del chosen["blend_frames"], chosen["curve"]
        segments.append(segment | {k: v for k, v in chosen.items() if v is not None})
    return {"segments": segments}


def from_dict(entry: Mapping[str, Any], *, vae: VAEConfig, fps: int) -> Story:
    """The inverse of `to_dict`; takes any line that `read_stories` takes."""
    return _story_of(entry, vae=vae, fps=fps, switch_frames=())
