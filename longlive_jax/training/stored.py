"""Arrays made once per clip and kept on disk, however many passes training makes over them.

    <folder>/00000.npy ...   float16 [SHARD_CLIPS, F, ...], clips in the order of their index

The folder's name holds a key that stands for everything the arrays depend on, so a folder can be shared by
runs, and what is there is never stale. A shard appears complete or not at all; interrupted work goes on
with the first one missing.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
from grain.sharding import ShardOptions

from longlive_jax import storage, toy
from longlive_jax.toy import data as toy_data
from longlive_jax.training import processes
from longlive_jax.training import world as worlds
from longlive_jax.training.config import ClipsConfig
from longlive_jax.training.metrics import say

SHARD_CLIPS = 64

Make = Callable[[np.ndarray, toy.Scenes], np.ndarray]
"""`(indices [b], their scenes) -> arrays [b, F, ...]`."""


@dataclasses.dataclass(frozen=True)
class StoredClips:
    """What is kept of the clips of a data set.

    Attributes:
      folder: of the shards.
      world: of the clips.
      clips: which clips, how many, how much of each is used.
      name: of the arrays in a batch.
      switches: which of them switch their attributes, and where; None for none.
    """

    folder: pathlib.Path
    world: toy.World
    clips: ClipsConfig
    name: str
    switches: worlds.Switches | None = None

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of clips.

        Returns:
          `{name: float32 [B, F, ...], "caption": int32 [B], rows of world.caption_table()}`. Where clips
          switch, the caption is that of the last attributes and "begin", int32 [B], the frame from which on
          they hold.
        """
        used = slice(self.clips.frames)
        found = [_shard(self.folder, int(i) // SHARD_CLIPS)[int(i) % SHARD_CLIPS, used] for i in indices]
        scenes = self.scenes(indices)
        batch = {self.name: np.stack(found).astype(np.float32)}
        if self.switches is None:
            return batch | {"caption": worlds.caption_rows(scenes.codes, scenes.template)}
        ends = self.switches.of(self.clips, indices, scenes)
        return batch | {"caption": worlds.caption_rows(ends.codes, ends.template), "begin": ends.begin}

    def batches(self, shard: ShardOptions) -> "grain.IterDataset[dict[str, np.ndarray]]":
        """Endless batches; see `toy.data.stream`."""
        return toy_data.stream(worlds.stream_config(self.clips), shard, self.rows)

    def scenes(self, indices: np.ndarray) -> toy.Scenes:
        """What the clips show."""
        return toy.sample_scenes(self.world, seed=self.clips.seed, indices=indices, split=self.clips.split)

    def complete(self, make: Make, *, together: int) -> "StoredClips":
        """Makes the shards that are not on disk yet; processes share the work.

        Args:
          make: makes the arrays of some clips.
          together: clips it makes at once; divides `SHARD_CLIPS`.

        Returns:
          Itself, with every shard in its place.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = -(-self.clips.examples // SHARD_CLIPS)
        missing = [i for i in range(shards) if not _file(self.folder, i).exists()]
        mine = missing[jax.process_index() :: jax.process_count()]
        with concurrent.futures.ThreadPoolExecutor(self.clips.threads) as pool:
            made = pool.map(functools.partial(self._make_shard, make=make, together=together), mine)
            try:
                for count, _ in enumerate(made, 1):
                    if count % 8 == 0:
                        say(f"{self.name} of clips into {self.folder}: {count}/{len(mine)} shards")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        processes.sync(self.name)
        return self

    def _make_shard(self, index: int, *, make: Make, together: int) -> None:
        parts = []
        for at in range(index * SHARD_CLIPS, (index + 1) * SHARD_CLIPS, together):
            indices = np.arange(at, at + together)
            parts.append(np.asarray(make(indices, self.scenes(indices)), np.float16))
        with storage.new_file(_file(self.folder, index)) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(parts))


def digest(content: Mapping[str, Any]) -> str:
    """The key of what arrays depend on, given as JSON."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(folder: pathlib.Path, index: int) -> pathlib.Path:
    return folder / f"{index:05d}.npy"


@functools.lru_cache(maxsize=4096)
def _shard(folder: pathlib.Path, index: int) -> np.ndarray:
    return np.load(_file(folder, index), mmap_mode="r")
