"""What a study generates: prompts and their switches, drawn anew for every seed.

A task of the toy world knows what its prompts ask for, so its videos can be read back and scored; a prompt
file says nothing but its text. `Work` is what a task asks for with one seed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from longlive_jax import toy
from longlive_jax.config import PipelineConfig
from longlive_jax.config_dict import to_dict
from longlive_jax.errors import require
from longlive_jax.inference import story as stories_lib
from longlive_jax.inference.story import PromptSwitch, Story
from longlive_jax.toy import evaluation
from longlive_jax.toy.world import Split
from longlive_jax.training.world import world_of

SEED_STRIDE = 100_000
"""Noise seeds of the clips of one seed."""

_SEGMENT_STRIDE = 40_000  # seeds of the later switches of a story, clear of those of the studies


@dataclasses.dataclass(frozen=True)
class Work:
    """What one condition generates with one seed.

    Attributes:
      stories: one per clip.
      seeds: of the noise, one per clip.
      codes: what every prompt of a clip asks for in the toy world, int `[B, prompts, 4]`; None elsewhere.
      starts: latent frames at which the prompts begin, the first at 0; the same for all clips, or None.
    """

    stories: tuple[Story, ...]
    seeds: tuple[int, ...]
    codes: np.ndarray | None = None
    starts: tuple[int, ...] | None = None

    def rows(self, first: int, count: int) -> "Work":
        """The work of some clips."""
        end = first + count
        codes = None if self.codes is None else self.codes[first:end]
        return dataclasses.replace(
            self, stories=self.stories[first:end], seeds=self.seeds[first:end], codes=codes
        )


def _check_frames(frames: int) -> None:
    require(frames > 0, f"task.frames={frames} must be at least 1")


def _noise_seeds(seed: int, clips: int) -> tuple[int, ...]:
    return tuple(SEED_STRIDE * seed + i for i in range(clips))


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Scenes of the toy world, one prompt each.

    Attributes:
      frames: latent frames.
      split: combinations of attributes to draw from; "held_out" are those that training never showed.
    """

    frames: int = 60
    split: Split = "held_out"

    def __post_init__(self) -> None:
        _check_frames(self.frames)

    def work(self, config: PipelineConfig, *, clips: int, seed: int) -> Work:
        """Draws the scenes of one seed."""
        scenes = toy.sample_scenes(world_of(config), seed=seed, indices=np.arange(clips), split=self.split)
        stories = tuple(Story(caption) for caption in toy.describe_scenes(scenes))
        return Work(stories, _noise_seeds(seed, clips), scenes.codes[:, None], (0,))


@dataclasses.dataclass(frozen=True)
class Segments:
    """Stories of the toy world: scenes whose prompt changes every so many frames.

    The switches do to the cache what the config says (`switch.policy`, `switch.keep_sink`).

    Attributes:
      segments: prompts.
      segment_frames: latent frames of each.
      changes: attributes that change at a switch, in turn over the clips.
      split: combinations of attributes the first prompt is drawn from.
    """

    segments: int = 6
    segment_frames: int = 40
    changes: tuple[int, ...] = evaluation.CHANGES
    split: Split = "held_out"

    def __post_init__(self) -> None:
        require(self.segments > 1, f"task.segments={self.segments} must be at least 2")
        require(self.segment_frames > 0, f"task.segment_frames={self.segment_frames} must be at least 1")
        require(
            len(self.changes) > 0 and all(1 <= n <= len(toy.FIELDS) for n in self.changes),
            f"task.changes={self.changes} must be in [1, {len(toy.FIELDS)}]",
        )

    @property
    def frames(self) -> int:
        """Latent frames of a story."""
        return self.segments * self.segment_frames

    def work(self, config: PipelineConfig, *, clips: int, seed: int) -> Work:
        """Draws the stories of one seed."""
        indices = np.arange(clips)
        scenes = toy.sample_scenes(world_of(config), seed=seed, indices=indices, split=self.split)
        changes = [self.changes[i % len(self.changes)] for i in indices]
        codes, captions = [scenes.codes], [toy.describe_scenes(scenes)]
        for segment in range(1, self.segments):
            after, templates = evaluation.sample_switches(
                codes[-1], changes=changes, seed=seed + _SEGMENT_STRIDE * (segment - 1), indices=indices
            )
            codes.append(after)
            captions.append(toy.grammar.describe_codes(after, templates))
        # A switch takes effect with the next block; asking for that frame makes what is scored exact.
        block = config.window.block_frames
        asked = [self.segment_frames * i for i in range(1, self.segments)]
        starts = [stories_lib.effective_frame(frame, block) for frame in asked]
        stories = tuple(
            Story(texts[0], tuple(PromptSwitch(at, text) for at, text in zip(starts, texts[1:], strict=True)))
            for texts in zip(*captions, strict=True)
        )
        return Work(stories, _noise_seeds(seed, clips), np.stack(codes, axis=1), (0, *starts))


@dataclasses.dataclass(frozen=True)
class Switch:
    """Scenes of the toy world with one prompt switch halfway.

    Attributes:
      frames: latent frames.
      changes: attributes that change, in turn over the clips.
    """

    frames: int = 48
    changes: tuple[int, ...] = evaluation.CHANGES

    def __post_init__(self) -> None:
        _check_frames(self.frames)

    def work(self, config: PipelineConfig, *, clips: int, seed: int) -> Work:
        """Draws the scenes and switches of one seed."""
        block = config.window.block_frames
        half = self.frames // block // 2 * block
        require(half > 0, f"task.frames={self.frames} has no room for a switch; use at least {2 * block}")
        return Segments(2, half, self.changes).work(config, clips=clips, seed=seed)


@dataclasses.dataclass(frozen=True)
class PromptFile:
    """Prompts or stories of a file, in its order; every seed takes other noise, not other prompts.

    Attributes:
      path: .txt or .jsonl, see `inference.story.read_stories`.
      frames: latent frames.
      switch_frames: where the later prompts of `{"prompts": ...}` lines begin.
    """

    path: str
    frames: int = 21
    switch_frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_frames(self.frames)

    def work(self, config: PipelineConfig, *, clips: int, seed: int) -> Work:
        """Reads the file; it must hold enough prompts."""
        found = stories_lib.read_stories(
            self.path, vae=config.vae, fps=config.video.fps, switch_frames=self.switch_frames
        )
        require(len(found) >= clips, f"{self.path} holds {len(found)} prompts; clips={clips} needs as many")
        return Work(found[:clips], _noise_seeds(seed, clips))


Task: TypeAlias = Scenes | Segments | Switch | PromptFile


def task_key(task: Task, work: Sequence[Work]) -> dict[str, Any]:
    """What of a task a result depends on: its settings, and the content of a prompt file."""
    values = {"kind": type(task).__name__, **to_dict(task)}
    if isinstance(task, PromptFile):
        stories = [stories_lib.to_dict(story) for one in work for story in one.stories]
        del values["path"]
        values["stories"] = hashlib.blake2b(json.dumps(stories).encode(), digest_size=8).hexdigest()
    return values
