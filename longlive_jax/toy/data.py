"""Toy clips and prompts as Grain data sets: shuffled, sharded by process, checkpointable, prefetched.

A batch is rendered as a whole, in Grain's reading threads, while the previous one trains. The *global*
batch decides which clips belong together, and a process takes its rows of it: two processes see
exactly the halves of what one would see.

The result is a `grain.IterDataset`; its iterator's `get_state` and `set_state` resume at the very next
batch, and `.mp_prefetch(...)` moves the rendering to other processes where threads are not enough.
"""

import dataclasses
from collections.abc import Callable, Sequence

import grain
import numpy as np

from longlive_jax.errors import require
from longlive_jax.toy.grammar import describe_codes, describe_scenes
from longlive_jax.toy.misshapen import draw_misshapen
from longlive_jax.toy.renderer import Drawing, render
from longlive_jax.toy.world import (
    MOTION,
    TEMPLATE_COUNT,
    Split,
    World,
    generator,
    sample_scenes,
    sample_switch,
)

Tokenizer = Callable[[list[str]], np.ndarray]
"""Turns B captions into token ids, int [B, M]; must be picklable for `mp_prefetch`."""

Batch = dict[str, np.ndarray]

_SWITCH_STREAM = 1  # keeps a pair's switch independent of its scene: (seed, index, 1) against (seed, index)
_STORY_STREAM = 2  # and whether and when a clip switches independent of both
_DRAWING_STREAM = 4  # and what is misshapen (3: the noise of `training.trajectories`)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which examples, in which order.

    Attributes:
      batch_size: examples per step over all processes.
      seed: names the data set and its order; the same seed is the same data.
      split: combinations of prompted attributes to draw from.
      examples: distinct examples; the order is shuffled anew in every pass over them.
      threads: threads that make batches.
      prefetch: batches kept ready.
    """

    batch_size: int = 8
    seed: int = 0
    split: Split = "train"
    examples: int = 1 << 20
    threads: int = 2
    prefetch: int = 4

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "prefetch"):
            value = getattr(self, name)
            require(value > 0, f"data.{name}={value} must be positive")
        require(0 <= self.seed < 1 << 31, f"data.seed={self.seed} must be in [0, 2**31)")
        require(
            self.examples >= self.batch_size,
            f"data.examples={self.examples} must be at least batch_size={self.batch_size}",
        )


@dataclasses.dataclass(frozen=True)
class _Clips:
    """Indices [B] -> rendered clips."""

    world: World
    seed: int
    split: Split
    frames: int
    tokenizer: Tokenizer | None

    def __call__(self, indices: np.ndarray) -> Batch:
        scenes = sample_scenes(self.world, seed=self.seed, indices=indices, split=self.split)
        batch = {"video": render(self.world, scenes, frames=self.frames), "attributes": scenes.codes}
        return batch | _text("caption", describe_scenes(scenes), self.tokenizer)


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """Indices [B] -> captions."""

    world: World
    seed: int
    split: Split
    tokenizer: Tokenizer | None

    def __call__(self, indices: np.ndarray) -> Batch:
        scenes = sample_scenes(self.world, seed=self.seed, indices=indices, split=self.split)
        return {"attributes": scenes.codes} | _text("caption", describe_scenes(scenes), self.tokenizer)


@dataclasses.dataclass(frozen=True)
class _PromptPairs:
    """Indices [B] -> a caption and the caption to switch to."""

    prompts: _Prompts

    def __call__(self, indices: np.ndarray) -> Batch:
        batch = self.prompts(indices)
        codes, templates = switches(
            batch["attributes"], seed=self.prompts.seed, indices=indices, split=self.prompts.split
        )
        after = describe_codes(codes, templates)
        return batch | {"switch_attributes": codes, "switch_caption": np.array(after)}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """This process's rows of a global batch of indices."""

    begin: int
    end: int

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        return indices[self.begin : self.end]


def clips(
    world: World,
    config: DataConfig,
    *,
    frames: int,
    tokenizer: Tokenizer | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.IterDataset[Batch]:
    """Endless batches of rendered clips.

    Args:
      world: geometry.
      config: which clips, in which order.
      frames: video frames V per clip, 4 (F - 1) + 1 for F latents.
      tokenizer: adds "caption_tokens"; without it there is only text.
      shard: this process's share, for example `grain.sharding.ShardByJaxProcess()`; default: everything.

    Returns:
      Batches {"video": float32 [b, V, Y, X, 3] in [-1, 1], "caption": str [b], "attributes": int32 [b, 4]}
      with b = batch_size / number of shards.

    Raises:
      UserError: no frames, or a batch size that the shards do not divide.
    """
    require(frames > 0, f"frames={frames} must be positive")
    return stream(config, shard, _Clips(world, config.seed, config.split, frames, tokenizer))


def prompts(
    world: World,
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    shard: grain.sharding.ShardOptions | None = None,
) -> grain.IterDataset[Batch]:
    """Endless batches of captions without video, as `clips`: what distillation trains on."""
    return stream(config, shard, _Prompts(world, config.seed, config.split, tokenizer))


def switches(
    codes: np.ndarray, *, seed: int, indices: Sequence[int] | np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray]:
    """Draws what to switch to: 1 to 4 other attributes, each number equally often.

    Args:
      codes: attributes before, int [B, 4].
      seed: names the data set.
      indices: of the clips, [B]; row i depends on `seed`, `indices[i]` and row i of the codes only.
      split: which combinations to draw from.

    Returns:
      Attributes after, int32 [B, 4], and the phrasing of their caption, int [B].
    """
    after, templates = [], []
    for index, before in zip(indices, codes, strict=True):
        stream = generator(seed, int(index), _SWITCH_STREAM)
        after.append(sample_switch(before, stream=stream, split=split))
        templates.append(stream.integers(TEMPLATE_COUNT))
    return np.array(after), np.array(templates)


def switch_places(
    choices: Sequence[int], *, share: float, seed: int, indices: Sequence[int] | np.ndarray
) -> np.ndarray:
    """Draws where clips switch, int32 [B]: one of the choices in a share of them, 0 (nowhere) in the others.

    Args:
      choices: positive integers.
      share: of the clips that switch, in [0, 1].
      seed: names the data set.
      indices: of the clips, [B].
    """
    places = []
    for index in indices:
        stream = generator(seed, int(index), _STORY_STREAM)
        places.append(stream.choice(choices) if stream.random() < share else 0)
    return np.array(places, np.int32)


def drawings(
    codes: np.ndarray, *, share: float, seed: int, indices: Sequence[int] | np.ndarray
) -> list[Drawing | None]:
    """Draws which clips show a misshapen sprite, and what; None for the others.

    Args:
      codes: attributes of the clips, int [B, 4].
      share: of the clips that are misshapen, in [0, 1].
      seed: names the data set.
      indices: of the clips, [B].
    """
    if not share:
        return [None] * len(codes)
    drawn: list[Drawing | None] = []
    for index, row in zip(indices, codes, strict=True):
        stream = generator(seed, int(index), _DRAWING_STREAM)
        is_misshapen = stream.random() < share
        drawn.append(draw_misshapen(int(row[MOTION]), stream=stream) if is_misshapen else None)
    return drawn


def prompt_maker(
    world: World, *, seed: int, split: Split, with_switch: bool
) -> Callable[[np.ndarray], Batch]:
    """The rows of `prompts` as a function of their numbers, for `stream`.

    Args:
      world: geometry.
      seed: names the data set.
      split: which combinations of attributes to draw from.
      with_switch: adds "switch_caption" and "switch_attributes", a caption to switch to. The two differ in 1
        to 4 attributes, each number equally often.
    """
    made = _Prompts(world, seed, split, None)
    return _PromptPairs(made) if with_switch else made


def _text(name: str, texts: list[str], tokenizer: Tokenizer | None) -> Batch:
    batch = {name: np.array(texts)}
    if tokenizer is not None:
        batch[f"{name}_tokens"] = np.asarray(tokenizer(texts))
    return batch


def stream(
    config: DataConfig, shard: grain.sharding.ShardOptions | None, make: Callable[[np.ndarray], Batch]
) -> grain.IterDataset[Batch]:
    """Endless batches of anything that has a number, in an order that the number of shards does not change.

    Args:
      config: how many examples, in which order.
      shard: this process's share.
      make: numbers `[b]` to a batch of b rows.
    """
    shard = shard or grain.sharding.NoSharding()
    require(
        config.batch_size % shard.shard_count == 0,
        f"data.batch_size={config.batch_size} must be a multiple of the {shard.shard_count} processes",
    )
    rows = config.batch_size // shard.shard_count
    begin = rows * shard.shard_index
    # Shuffling indices and batching them costs nothing; only this process's rows are ever rendered.
    dataset = grain.MapDataset.range(config.examples).shuffle(seed=config.seed).repeat()
    dataset = dataset.batch(config.batch_size, drop_remainder=True)
    dataset = dataset.map(_Rows(begin, begin + rows)).map(make)
    return dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    )
