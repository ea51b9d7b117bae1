"""What a video is asked to show: a first prompt and the prompts that replace it on the way.

A story counts in latent frames. It comes from prompts on the command line, from a text file with a
prompt per line, or from a JSONL file with a story per line; `read_stories` says what a line may hold.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from longlive_jax.config import SwitchPolicy, VAEConfig
from longlive_jax.errors import UserError, require


@dataclasses.dataclass(frozen=True)
class PromptSwitch:
    """A new prompt from a frame on.

    Attributes:
      frame: latent frame at which the prompt is asked for, at least 1. It takes effect at the first
        block that starts there or later, see `effective_frame`.
      prompt: the text.
      policy: what happens to the cache; None is the config's `switch.policy`.
      keep_sink: whether a recache leaves the sink alone; None is the config's `switch.keep_sink`.
    """

    frame: int
    prompt: str
    policy: SwitchPolicy | None = None
    keep_sink: bool | None = None

    def __post_init__(self) -> None:
        _check_frame(self.frame)
        _check_prompt(self.prompt)
        require(
            self.policy is None or self.policy in get_args(SwitchPolicy),
            f"policy={self.policy!r} must be one of {', '.join(get_args(SwitchPolicy))}",
        )
        require(
            self.keep_sink is None or isinstance(self.keep_sink, bool),
            f"keep_sink={self.keep_sink!r} must be true or false",
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


# --- frames, blocks and seconds ---------------------------------------------------------------------


def effective_frame(frame: int, block_frames: int) -> int:
    """Start of the first block that begins at `frame` or later: where a switch takes effect."""
    return -(-frame // block_frames) * block_frames


def check_schedule(story: Story, *, frames: int, block_frames: int) -> None:
    """Refuses a story whose prompts would not all be seen.

    Args:
      story: the story.
      frames: length of the video in latent frames.
      block_frames: latent frames generated together.

    Raises:
      UserError: a switch comes at or after the end, or two take effect at the same block.
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

        {"prompts": ["...", "...", "..."]}
        {"segments": [{"prompt": "..."},
                      {"prompt": "...", "at_seconds": 5, "policy": "recache", "keep_sink": true}]}

    The first is the release's format; its switch frames are given apart, the same for every line. In
    the second a segment after the first says when it begins, as `at_seconds` or `at_frame` (a latent
    frame), and may say what happens to the cache.

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
        list(entry) in (["prompts"], ["segments"]),
        f'found {", ".join(map(repr, entry)) or "nothing"} where "prompts" or "segments" must stand alone',
    )
    [(name, items)] = entry.items()
    require(isinstance(items, list) and len(items) > 0, f'"{name}" must be a list with at least one entry')
    if name == "prompts":
        return story_from_prompts(items, switch_frames)
    require(not switch_frames, '"segments" say themselves when they begin; leave --switch-at out')
    segments = [_segment(item, i, vae=vae, fps=fps) for i, item in enumerate(items)]
    return Story(segments[0]["prompt"], tuple(PromptSwitch(**segment) for segment in segments[1:]))


_SEGMENT_NAMES = ("prompt", "at_seconds", "at_frame", "policy", "keep_sink")


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
        for name in ("policy", "keep_sink"):
            require(name not in item, f'{where} is the first: there is no switch for "{name}" to decide on')
        return {"prompt": item["prompt"]}
    require(
        ("at_seconds" in item) != ("at_frame" in item),
        f'{where} needs one of "at_seconds" and "at_frame" to say when it begins',
    )
    if "at_seconds" in item:
        seconds = item["at_seconds"]
        require(_is_number(seconds), f"{where}: at_seconds={seconds!r} must be a number")
        frame = frames_from_seconds(seconds, vae=vae, fps=fps)
    else:
        frame = item["at_frame"]
    switch = {"frame": frame, "prompt": item["prompt"]}
    return switch | {name: item[name] for name in ("policy", "keep_sink") if name in item}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_prompt(prompt: Any) -> None:
    require(
        isinstance(prompt, str) and bool(prompt.strip()),
        f"prompt={prompt!r} must be text that is not blank",
    )


def _check_frame(frame: Any) -> None:
    require(
        isinstance(frame, int) and not isinstance(frame, bool) and frame > 0,
        f"switch frame {frame!r} must be a whole number of latent frames, 1 or more",
    )


# --- dictionaries -----------------------------------------------------------------------------------


def to_dict(story: Story) -> dict[str, Any]:
    """A JSON-ready copy, in the form of a `segments` line."""
    segments: list[dict[str, Any]] = [{"prompt": story.prompt}]
    for switch in story.switches:
        segment = {"prompt": switch.prompt, "at_frame": switch.frame}
        chosen = {"policy": switch.policy, "keep_sink": switch.keep_sink}
        segments.append(segment | {k: v for k, v in chosen.items() if v is not None})
    return {"segments": segments}


def from_dict(entry: Mapping[str, Any], *, vae: VAEConfig, fps: int) -> Story:
    """The inverse of `to_dict`; takes any line that `read_stories` takes."""
    return _story_of(entry, vae=vae, fps=fps, switch_frames=())
