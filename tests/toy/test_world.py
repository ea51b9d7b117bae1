"""Combinations, held-out set, and reproducible scenes."""

import dataclasses
import itertools

import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.toy import FIELDS, VALUES, Attributes, World, combinations, sample_scenes, sample_switch
from longlive_jax.toy.world import generator

WORLD = World()

# Drawn once; a change here changes every data set and every recorded result.
CODES = [[0, 1, 3, 1], [1, 3, 4, 0], [0, 2, 0, 2], [1, 2, 3, 0]]
SIZES = [9.0807758225, 10.436690513, 10.4535642229, 11.5488256858]


def test_splits_partition_the_full_cross_product():
    every, train, held_out = (
        {tuple(codes) for codes in combinations(split).tolist()} for split in ("all", "train", "held_out")
    )
    assert len(every) == 3 * 4 * 5 * 3
    assert train | held_out == every
    assert not train & held_out
    assert len(held_out) == 20


def test_training_shows_every_pair_of_values():
    train = combinations("train")
    for a, b in itertools.combinations(range(4), 2):
        pairs = {tuple(row) for row in train[:, [a, b]].tolist()}
        assert len(pairs) == len(VALUES[FIELDS[a]]) * len(VALUES[FIELDS[b]])


def test_every_value_is_also_held_out_somewhere():
    held_out = combinations("held_out")
    for column, field in enumerate(FIELDS):
        assert set(held_out[:, column].tolist()) == set(range(len(VALUES[field])))


def test_scenes_are_these_on_every_machine():
    scenes = sample_scenes(WORLD, seed=0, indices=range(4))
    assert scenes.codes.tolist() == CODES
    np.testing.assert_allclose(scenes.size, SIZES, rtol=0, atol=1e-9)


def test_a_scene_depends_on_its_own_index_only():
    many = sample_scenes(WORLD, seed=3, indices=range(20))
    few = sample_scenes(WORLD, seed=3, indices=[17, 4])
    for field in dataclasses.fields(many):
        np.testing.assert_array_equal(
            getattr(few, field.name), getattr(many, field.name)[[17, 4]], err_msg=field.name
        )
    assert not np.array_equal(sample_scenes(WORLD, seed=4, indices=[17]).start, few.start[:1])


def test_scenes_stay_in_their_ranges_and_split():
    scenes = sample_scenes(WORLD, seed=1, indices=range(500), split="held_out")
    assert {tuple(row) for row in scenes.codes.tolist()} == {
        tuple(row) for row in combinations("held_out").tolist()
    }
    strength = np.linalg.norm(scenes.gradient, axis=1)
    for values, (low, high) in (
        (scenes.size, WORLD.size_range),
        (scenes.shade, WORLD.shade_range),
        (strength, WORLD.gradient_range),
    ):
        assert low <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high


def test_lane_margin_keeps_sprites_off_the_edges_they_do_not_move_towards():
    scenes = sample_scenes(World(lane_margin=16), seed=1, indices=range(300))
    moves_across = np.isin(scenes.codes[:, 2], [0, 1])
    moves_down = np.isin(scenes.codes[:, 2], [2, 3])
    still = ~(moves_across | moves_down)
    inside = (scenes.start >= 16) & (scenes.start <= 48)
    assert inside[moves_across, 1].all()
    assert inside[moves_down, 0].all()
    assert inside[still].all()
    assert not inside[moves_across, 0].all()  # along the motion anywhere is fine


def test_switches_differ_in_one_to_four_attributes_and_stay_in_the_split():
    train = {tuple(row) for row in combinations("train").tolist()}
    counts = np.zeros(5, int)
    for index in range(800):
        stream = generator(0, index)
        before = combinations("train")[index % 160]
        after = sample_switch(before, stream=stream)
        assert tuple(after.tolist()) in train
        counts[(after != before).sum()] += 1
    assert counts[0] == 0
    assert counts[1:].min() > 150  # each of the four about 200 times


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: World(size_range=(8, 20)), "world.size_range"),
        (lambda: World(shade_range=(1.0, 0.5)), "world.shade_range"),
        (lambda: World(speed=9.0), "world.speed"),
        (lambda: World(lane_margin=40), "world.lane_margin"),
        (lambda: Attributes("square", "mauve", "left", "dark"), "colour='mauve'"),
        (lambda: combinations("test"), "split='test'"),
        (lambda: sample_scenes(WORLD, seed=-1, indices=[0]), "seed=-1"),
        (lambda: sample_switch(combinations("held_out")[0], stream=generator(0)), "not in the split 'train'"),
    ],
)
def test_bad_input_is_one_line_that_names_the_field(make, named):
    with pytest.raises(UserError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


def test_attributes_and_codes_are_inverse():
    for codes in combinations("all").tolist():
        assert list(Attributes.from_codes(codes).codes) == codes
