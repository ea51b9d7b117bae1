"""Arrays kept per clip: several threads leave what one leaves, and a failure leaves whole shards only."""

import threading
import time

import numpy as np
import pytest

from longlive_jax import toy
from longlive_jax.training.config import ClipsConfig
from longlive_jax.training.stored import SHARD_CLIPS, StoredClips

SHARDS = 5
TOGETHER = SHARD_CLIPS // 4


def clips_in(folder, *, threads, shards=SHARDS):
    # The last shard is not full of clips that are used.
    settings = ClipsConfig(batch_size=8, frames=2, examples=shards * SHARD_CLIPS - 7, threads=threads)
    return StoredClips(folder, toy.World(), settings, "arrays")


def arrays_of(indices, scenes):
    """Three frames `[b, 3, 4]` that name the clip and what it shows."""
    frames = np.arange(3)[:, None] + np.asarray(scenes.codes)[:, None, :4]
    return frames + indices[:, None, None]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory):
    """The shards that one thread makes, by name."""
    clips = clips_in(tmp_path_factory.mktemp("one") / "clips", threads=1)
    assert clips.complete(arrays_of, together=TOGETHER) is clips
    return contents(clips.folder)


def test_several_threads_leave_the_same_shards(one_by_one, tmp_path):
    both = threading.Barrier(2)

    def make(indices, scenes):
        if indices[0] < 2 * SHARD_CLIPS:
            both.wait(timeout=60)  # the first two shards are at work at the same time
        return arrays_of(indices, scenes)

    clips = clips_in(tmp_path / "clips", threads=2).complete(make, together=TOGETHER)
    assert contents(clips.folder) == one_by_one
    assert sorted(one_by_one) == [f"{index:05d}.npy" for index in range(SHARDS)]
    indices = np.array([3, 130, SHARDS * SHARD_CLIPS - 8])
    expected = arrays_of(indices, clips.scenes(indices))[:, :2].astype(np.float16)
    np.testing.assert_array_equal(clips.rows(indices)["arrays"], expected)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failure_ends_it_and_leaves_whole_shards_only(threads, one_by_one, tmp_path):
    """What is missing is made by the next one, and nothing else."""

    def broken(indices, scenes):
        if indices[0] == SHARD_CLIPS + TOGETHER:  # the second shard, in the middle
            raise BrokenError
        return arrays_of(indices, scenes)

    clips, made = clips_in(tmp_path / "clips", threads=threads), []
    with pytest.raises(BrokenError):
        clips.complete(broken, together=TOGETHER)
    left = contents(clips.folder)
    assert "00001.npy" not in left
    assert left.items() <= one_by_one.items()  # whole, and no temporary file among them

    def counted(indices, scenes):
        made.append(indices[0] // SHARD_CLIPS)
        return arrays_of(indices, scenes)

    clips.complete(counted, together=TOGETHER)
    assert contents(clips.folder) == one_by_one
    assert {f"{index:05d}.npy" for index in made} == one_by_one.keys() - left.keys()


def test_a_failure_while_a_shard_is_written_leaves_no_file(tmp_path, monkeypatch):
    """A full disk, for one: the half-written file goes."""

    def half(file, array):
        file.write(array.tobytes()[:100])
        raise BrokenError

    monkeypatch.setattr(np, "save", half)
    clips = clips_in(tmp_path / "clips", threads=2)
    with pytest.raises(BrokenError):
        clips.complete(arrays_of, together=TOGETHER)
    assert contents(clips.folder) == {}


def test_a_failure_keeps_the_rest_from_being_begun(tmp_path):
    """What is at work when it is noticed may still end; the many others are not begun."""
    begun = []

    def broken(indices, scenes):
        begun.append(indices[0] // SHARD_CLIPS)
        if len(begun) > 1:
            time.sleep(0.2)
        raise BrokenError

    with pytest.raises(BrokenError):
        clips_in(tmp_path / "clips", threads=1, shards=50).complete(broken, together=TOGETHER)
    assert len(begun) < 50
