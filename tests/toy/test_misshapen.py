"""Sprites that are no shape: always the same for a seed, and not taken for a clean one by the measurement."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.toy import UNKNOWN, World, measure, misshapen, render, sample_scenes
from longlive_jax.toy import data as toy_data
from longlive_jax.toy.world import MOTION, SHAPE

WORLD = World()
SCENES = sample_scenes(WORLD, seed=4, indices=range(40), split="all")


def drawn(kind, scene, seed=0):
    drawing = kind(np.random.default_rng(seed), int(scene.codes[0, MOTION]))
    return render(WORLD, scene, frames=1, drawings=[drawing])


@pytest.mark.parametrize("kind", misshapen._KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_is_something_else_than_the_shape(kind):
    overlaps = []
    for row in range(12):
        scene = SCENES[row : row + 1]
        first, again = (drawn(kind, scene, seed=row) for _ in range(2))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first).max() <= 1
        assert np.abs(first - render(WORLD, scene, frames=1)).max() > 0.05
        overlaps.append(measure.read(WORLD, first).iou[0, 0])
    clean = measure.read(WORLD, render(WORLD, SCENES[:12], frames=1)).iou
    assert np.mean(overlaps) < clean.mean() - 0.1


def test_a_clip_keeps_what_it_is_and_moves():
    clips = dataclasses.replace(SCENES[:1], codes=np.array([[2, 0, 1, 0]], np.int32))  # a ring moving right
    video = render(WORLD, clips, frames=2, drawings=[misshapen._double(np.random.default_rng(1), 1)])
    moved = np.roll(video[0, 0], int(WORLD.speed), axis=1)
    sprite = np.abs(video[0, 1] - video[0, 1, :1, :1]).max(-1) > 0.3  # away from the background's gradient
    np.testing.assert_allclose(moved[sprite], video[0, 1][sprite], atol=0.05)


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 60, 140), (1.0, 200, 200)])
def test_shares(share, low, high):
    codes = np.zeros((200, 4), np.int32)
    found = toy_data.drawings(codes, share=share, seed=1, indices=np.arange(200))
    assert low <= sum(d is not None for d in found) <= high
    tail = toy_data.drawings(codes[:50], share=share, seed=1, indices=np.arange(150, 200))
    assert [d is None for d in tail] == [d is None for d in found[150:]]


def test_none_draws_the_shape():
    np.testing.assert_array_equal(
        render(WORLD, SCENES[:2], frames=3, drawings=[None, None]), render(WORLD, SCENES[:2], frames=3)
    )
    assert (measure.read(WORLD, render(WORLD, SCENES[:2], frames=1)).codes[..., SHAPE] != UNKNOWN).all()
