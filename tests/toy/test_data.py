"""Grain streams: order, shards, resumption."""

import dataclasses
import pickle

import grain
import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.toy import World, combinations, parse, read
from longlive_jax.toy.data import DataConfig, _Clips, clips, prompt_maker, prompts, stream, switch_places

WORLD = World()
CONFIG = DataConfig(batch_size=4, seed=7, examples=1000)


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def prompt_pairs(world, config):
    return stream(config, None, prompt_maker(world, seed=config.seed, split=config.split, with_switch=True))


def word_ids(texts):
    """A stand-in for a tokenizer: lengths of the first eight words."""
    return np.array([[len(word) for word in text.split()[:8]] for text in texts], np.int32)


def test_a_batch_of_clips():
    (batch,) = take(clips(WORLD, CONFIG, frames=9, tokenizer=word_ids), 1)
    assert batch["video"].shape == (4, 9, 64, 64, 3)
    assert batch["video"].dtype == np.float32
    assert batch["attributes"].dtype == np.int32
    assert batch["caption_tokens"].shape == (4, 8)
    said = np.array([parse(str(text)).codes for text in batch["caption"]])
    np.testing.assert_array_equal(said, batch["attributes"])
    seen = read(WORLD, batch["video"])
    np.testing.assert_array_equal(seen.codes, np.repeat(said[:, None], 9, axis=1))


def test_the_same_seed_is_the_same_stream_whatever_the_threads():
    one = take(clips(WORLD, CONFIG, frames=2), 4)
    other = take(clips(WORLD, dataclasses.replace(CONFIG, threads=1, prefetch=1), frames=2), 4)
    for left, right in zip(one, other, strict=True):
        assert_same(left, right)
    different = take(clips(WORLD, dataclasses.replace(CONFIG, seed=8), frames=2), 1)[0]
    assert not np.array_equal(different["video"], one[0]["video"])


@pytest.mark.parametrize("make", [prompts, prompt_pairs, lambda w, c: clips(w, c, frames=2)])
def test_a_restored_iterator_continues_with_the_very_next_batch(make):
    iterator = iter(make(WORLD, CONFIG))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    fresh = iter(make(WORLD, CONFIG))
    fresh.set_state(pickle.loads(pickle.dumps(state)))
    for batch in expected:
        assert_same(next(fresh), batch)
    iterator.set_state(state)  # backwards in the same iterator
    assert_same(next(iterator), expected[0])


def test_two_processes_see_the_halves_of_what_one_sees():
    whole = take(clips(WORLD, CONFIG, frames=1), 3)
    shards = [
        take(clips(WORLD, CONFIG, frames=1, shard=grain.sharding.ShardOptions(index, 2)), 3)
        for index in range(2)
    ]
    for step, batch in enumerate(whole):
        joined = {name: np.concatenate([shard[step][name] for shard in shards]) for name in batch}
        assert_same(joined, batch)


def test_a_pass_shows_every_example_once_and_the_next_in_another_order():
    config = DataConfig(batch_size=8, examples=64)
    batches = take(clips(WORLD, config, frames=1), 16)
    rows = [row.tobytes() for batch in batches for row in batch["video"]]
    first, second = rows[:64], rows[64:]
    assert len(set(first)) == 64
    assert set(first) == set(second)
    assert first != second


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_splits_are_respected(split):
    allowed = {tuple(row) for row in combinations(split).tolist()}
    config = DataConfig(batch_size=64, split=split)
    for batch in take(prompt_pairs(WORLD, config), 3):
        for name in ("attributes", "switch_attributes"):
            assert {tuple(row) for row in batch[name].tolist()} <= allowed


def test_pairs_differ_in_one_to_four_attributes():
    batches = take(prompt_pairs(WORLD, DataConfig(batch_size=100)), 3)
    difference = np.concatenate([(b["attributes"] != b["switch_attributes"]).sum(1) for b in batches])
    assert set(difference.tolist()) == {1, 2, 3, 4}
    for batch in batches:
        after = np.array([parse(str(text)).codes for text in batch["switch_caption"]])
        np.testing.assert_array_equal(after, batch["switch_attributes"])
        assert len(after) == len(batch["caption"]) == 100


def test_clips_switch_as_often_as_asked_for_and_where():
    indices = np.arange(2000)
    places = switch_places((3, 6), share=0.25, seed=7, indices=indices)
    assert set(places) == {0, 3, 6}
    assert np.mean(places > 0) == pytest.approx(0.25, abs=0.03)
    assert np.mean(places == 3) == pytest.approx(0.125, abs=0.03)
    # Each clip's place is its own, whatever else is drawn.
    np.testing.assert_array_equal(
        switch_places((3, 6), share=0.25, seed=7, indices=indices[9:12]), places[9:12]
    )
    assert (switch_places((3, 6), share=1.0, seed=7, indices=indices[:50]) > 0).all()


def test_making_a_batch_can_move_to_another_process():
    make = _Clips(WORLD, seed=7, split="train", frames=2, tokenizer=word_ids)
    assert_same(pickle.loads(pickle.dumps(make))(np.arange(2)), make(np.arange(2)))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DataConfig(batch_size=0), "data.batch_size=0"),
        (lambda: DataConfig(batch_size=8, examples=4), "data.examples=4"),
        (lambda: DataConfig(seed=-1), "data.seed=-1"),
        (lambda: clips(WORLD, CONFIG, frames=0), "frames=0"),
        (lambda: prompts(WORLD, CONFIG, shard=grain.sharding.ShardOptions(0, 3)), "data.batch_size=4"),
    ],
)
def test_bad_input_is_refused_at_once(make, named):
    with pytest.raises(UserError, match=named):
        make()
