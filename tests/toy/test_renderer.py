"""Pixels: antialiasing, torus, motion, continuation."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.toy import VALUES, Attributes, Story, World, render, render_story, sample_scenes
from longlive_jax.toy.renderer import coverage, offsets, story_centres

WORLD = World()


def scenes_like(attributes: Attributes, count: int = 1, **changes):
    scenes = sample_scenes(WORLD, seed=2, indices=range(count))
    return dataclasses.replace(scenes, codes=np.array([attributes.codes] * count, np.int32), **changes)


@pytest.mark.parametrize("shape", range(3))
@pytest.mark.parametrize("size", [8.0, 11.0])
def test_antialiasing_is_the_true_coverage(shape, size):
    centre = np.array([[30.3, 33.8]])
    ours = coverage(shape, *offsets(WORLD, centre), size)[0]
    fine = 16  # sub-pixels per pixel and axis
    grid = (np.arange(64 * fine) + 0.5) / fine
    dx, dy = (grid - centre[0, axis] for axis in range(2))
    inside = coverage(shape, dx[None].astype(np.float32), dy[None].astype(np.float32), size)[0] > 0.5
    truth = inside.reshape(64, fine, 64, fine).mean((1, 3))
    # Pixels away from the edge are exact, pixels on it within a fraction; corners are the worst.
    assert np.abs(ours - truth).mean() < 1e-3
    assert np.abs(ours - truth).max() < 0.3
    assert ours.sum() == pytest.approx(np.pi * size**2, rel=0.01)  # equal area whatever the shape


@pytest.mark.parametrize("shape", range(3))
def test_sprites_are_drawn_around_their_centroid(shape):
    dx, dy = offsets(WORLD, np.array([[20.25, 41.5]]))
    alpha = coverage(shape, dx, dy, 10.0)[0]
    assert (alpha * dx[0][None, :]).sum() / alpha.sum() == pytest.approx(0, abs=0.05)
    assert (alpha * dy[0][:, None]).sum() / alpha.sum() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("shape", VALUES["shape"])
def test_what_leaves_on_one_side_returns_on_the_other(shape):
    attributes = Attributes(shape, "red", "still", "dark")
    flat = {"gradient": np.zeros((1, 2))}
    middle = render(WORLD, scenes_like(attributes, start=np.array([[32.25, 32.5]]), **flat), frames=1)
    corner = render(WORLD, scenes_like(attributes, start=np.array([[0.25, 0.5]]), **flat), frames=1)
    np.testing.assert_allclose(np.roll(middle, (32, 32), (2, 3)), corner, atol=1e-5)


def test_range_type_and_size():
    video = render(WORLD, sample_scenes(WORLD, seed=0, indices=range(40)), frames=3)
    assert video.shape == (40, 3, 64, 64, 3)
    assert video.dtype == np.float32
    assert -1 <= video.min() < -0.9
    assert 0.9 < video.max() <= 1


@pytest.mark.parametrize(
    ("motion", "shift"),
    [("left", (0, -8)), ("right", (0, 8)), ("up", (-8, 0)), ("down", (8, 0)), ("still", (0, 0))],
)
def test_a_motion_advances_one_latent_cell_per_latent_frame(motion, shift):
    scenes = scenes_like(Attributes("triangle", "green", motion, "gray"), gradient=np.zeros((1, 2)))
    video = render(WORLD, scenes, frames=5)[0]
    np.testing.assert_allclose(np.roll(video[0], shift, (0, 1)), video[4], atol=1e-5)


def test_same_scene_same_pixels_and_pieces_join():
    scenes = sample_scenes(WORLD, seed=9, indices=[5, 6])
    whole = render(WORLD, scenes, frames=60)
    pieces = [render(WORLD, scenes, frames=20, first_frame=at) for at in (0, 20, 40)]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    np.testing.assert_array_equal(render(WORLD, scenes[:1], frames=60), whole[:1])


def test_a_far_frame_is_exact():
    scenes = sample_scenes(WORLD, seed=9, indices=range(4))
    lap = 32  # frames around the torus
    far = render(WORLD, scenes, frames=2, first_frame=lap * 100_000 + 7)
    np.testing.assert_allclose(far, render(WORLD, scenes, frames=2, first_frame=7), atol=1e-4)


def test_a_story_changes_what_is_prompted_and_continues_the_rest():
    before, after = Attributes("ring", "red", "left", "dark"), Attributes("square", "blue", "down", "light")
    scenes = scenes_like(before)
    story = Story(starts=(0, 10), codes=np.array([[before.codes, after.codes]]))
    video = render_story(WORLD, scenes, story, frames=20)
    np.testing.assert_array_equal(video[:, :10], render(WORLD, scenes, frames=10))
    place = np.mod(scenes.start - [20, 0], 64)
    there = dataclasses.replace(scenes_like(after), start=place)
    np.testing.assert_allclose(video[:, 10:], render(WORLD, there, frames=10), atol=1e-5)
    late = render_story(WORLD, scenes, story, frames=8, first_frame=6)
    np.testing.assert_array_equal(late, video[:, 6:14])
    np.testing.assert_array_equal(story.at(2, first_frame=9)[0], [before.codes, after.codes])
    centres = story_centres(WORLD, scenes, story, frames=12)
    np.testing.assert_allclose(np.mod(centres[0, 11] - centres[0, 10], 64), [0, 2])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda s: render(WORLD, s, frames=0), "frames=0"),
        (lambda s: render(WORLD, s, frames=1, first_frame=-1), "first_frame=-1"),
        (lambda s: Story((0, 5, 5), np.zeros((2, 3, 4), int)), "story.starts"),
        (lambda s: Story((1,), np.zeros((2, 1, 4), int)), "story.starts"),
        (lambda s: Story((0,), np.zeros((2, 2, 4), int)), "story.codes"),
        (lambda s: render_story(WORLD, s, Story((0,), np.zeros((3, 1, 4), int)), frames=1), "story has 3"),
    ],
)
def test_bad_input_is_refused(make, named):
    with pytest.raises(UserError, match=named):
        make(sample_scenes(WORLD, seed=0, indices=range(2)))
