"""What the evaluation says of videos whose truth is known: rendered scenes, whole and broken."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.config import preset
from longlive_jax.errors import UserError
from longlive_jax.toy import (
    FIELDS,
    IDENTITY,
    Story,
    evaluation,
    is_held_out,
    render,
    render_story,
    sample_scenes,
)
from longlive_jax.toy.world import SHAPES
from tests.toy.broken import WORLD

VAE = preset("toy").vae
CLIPS, FRAMES, SWITCH = 6, 36, 15


def pixels(video):
    return np.round((video + 1) * 127.5).astype(np.uint8)


def measured(video, codes, **options):
    readings = evaluation.read_pixels(WORLD, pixels(video))
    return evaluation.measure_clips(WORLD, readings, codes, vae=VAE, frames=FRAMES, **options)


@pytest.fixture(scope="module")
def held_out():
    return sample_scenes(WORLD, seed=7, indices=range(CLIPS), split="held_out")


@pytest.fixture(scope="module")
def clips(held_out):
    return render(WORLD, held_out, frames=VAE.video_frames(FRAMES))


# --- clips ------------------------------------------------------------------------------------------


def test_a_perfect_video_scores_everything(held_out, clips):
    table = measured(clips, held_out.codes)
    for name in (*FIELDS, "all", "present", "first.all", "last.all"):
        np.testing.assert_array_equal(table[name], 1, err_msg=name)
    for name in ("fall.all", "vanished"):
        np.testing.assert_array_equal(table[name], 0, err_msg=name)
    for name in IDENTITY:
        assert table[f"identity.{name}"].min() > 0.85, name
    assert table["windows.all"].shape == (CLIPS, 3)
    assert table["flicker"].max() < 0.004
    assert table["drift.sprite"].max() < 0.06


def test_a_shape_that_is_lost_shows(held_out, clips):
    """Every clip is asked for a ring: those that show another shape count for the ring, and for it alone."""
    rings = held_out.codes.copy()
    rings[:, FIELDS.index("shape")] = SHAPES.index("ring")
    table = measured(clips, rings)
    is_ring = held_out.codes[:, FIELDS.index("shape")] == SHAPES.index("ring")
    assert 0 < is_ring.sum() < CLIPS
    np.testing.assert_array_equal(table["shape.ring"], is_ring)
    for other in ("square", "triangle"):
        assert np.isnan(table[f"shape.{other}"]).all()


def test_only_the_last_frames_are_wrong(held_out, clips):
    """The sprite vanishes with latent frame 15: half of the end, none of the beginning."""
    begin = VAE.video_frames(24)
    empty = render(WORLD, dataclasses.replace(held_out, size=np.full(CLIPS, 1e-3)), frames=1)
    video = np.concatenate([clips[:, :begin], np.repeat(empty, clips.shape[1] - begin, axis=1)], axis=1)
    table = measured(video, held_out.codes, window_frames=12, end_frames=12)
    np.testing.assert_array_equal(table["windows.present"], np.tile([1.0, 1.0, 0.0], (CLIPS, 1)))
    np.testing.assert_array_equal(table["vanished"], 1)
    np.testing.assert_array_equal(table["first.all"], 1)
    np.testing.assert_array_equal(table["last.all"], 0)
    np.testing.assert_array_equal(table["fall.all"], 1)
    np.testing.assert_allclose(table["present"], begin / clips.shape[1])


def test_windows_count_the_video_frames_of_a_causal_vae():
    assert evaluation.latent_windows(36, 12) == [(0, 12), (12, 24), (24, 36)]
    assert evaluation.latent_windows(40, 12) == [(0, 12), (12, 24), (24, 40)]
    assert evaluation.latent_windows(5, 12) == [(0, 5)]
    assert [evaluation.video_span(VAE, *w) for w in ((0, 12), (12, 24))] == [(0, 45), (45, 93)]


# --- switches ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def switches(held_out):
    changes = [evaluation.CHANGES[i % 3] for i in range(CLIPS)]
    new, _ = evaluation.sample_switches(held_out.codes, changes=changes, seed=1, indices=range(CLIPS))
    return new


def judge(held_out, new, *, at=None, after=None):
    """Measures a switch that is asked for at latent frame `SWITCH` and happens at video frame `at`."""
    at = VAE.video_frames(SWITCH) if at is None else at
    story = Story((0, at), np.stack([held_out.codes, new if after is None else after], axis=1))
    video = render_story(WORLD, held_out, story, frames=VAE.video_frames(FRAMES))
    return evaluation.measure_switches(
        WORLD,
        evaluation.read_pixels(WORLD, pixels(video)),
        old=held_out.codes,
        new=new,
        vae=VAE,
        frames=FRAMES,
        switch_frame=SWITCH,
    )


def test_switches_change_as_many_attributes_as_asked_for_and_prefer_held_out_ones(held_out):
    codes = np.repeat(held_out.codes, 20, axis=0)
    changes = np.arange(len(codes)) % 4 + 1
    new, template = evaluation.sample_switches(codes, changes=changes, seed=0, indices=range(len(codes)))
    np.testing.assert_array_equal((codes != new).sum(1), changes)
    # Every attribute changes now and then, shape alone included, where no held-out combination exists.
    assert (codes != new)[changes == 1].any(0).all()
    assert all(is_held_out(row) for row in new[changes == 3])
    assert np.mean([is_held_out(row) for row in new[changes == 4]]) > 0.5  # not every combination has one
    again, _ = evaluation.sample_switches(
        codes[5:], changes=changes[5:], seed=0, indices=range(5, len(codes))
    )
    np.testing.assert_array_equal(new[5:], again)
    assert set(template) == {0, 1, 2, 3}


def test_a_perfect_switch_scores_everything(held_out, switches):
    table = judge(held_out, switches)
    count = (held_out.codes != switches).sum(1)
    for name in ("before", "held", "obeyed"):
        np.testing.assert_array_equal(table[name], 1, err_msg=name)
    np.testing.assert_array_equal(table["stays"], np.where(count == 4, np.nan, 1))
    for number in evaluation.CHANGES:
        np.testing.assert_array_equal(table[f"held.{number}"], np.where(count == number, 1, np.nan))
    changed = held_out.codes != switches
    for i, name in enumerate(("shape", "colour", "motion", "background")):
        np.testing.assert_array_equal(table[f"held.{name}"], np.where(changed[:, i], 1, np.nan))
    rings = changed[:, 0] & (switches[:, 0] == 2)
    np.testing.assert_array_equal(table["held.shape.ring"], np.where(rings, 1, np.nan))
    assert table["blocks.new"].shape == (CLIPS, 7)
    np.testing.assert_array_equal(table["blocks.new"], 1)
    np.testing.assert_array_equal(table["blocks.old"], 0)
    assert table["jump.place"].max() < 0.6
    assert table["jump.size"].max() < 0.25
    assert table["jump.gradient"].max() < 0.1


def test_a_switch_that_is_ignored_scores_nothing(held_out, switches):
    table = judge(held_out, switches, after=held_out.codes)
    np.testing.assert_array_equal(table["held"], 0)
    np.testing.assert_array_equal(table["obeyed"], 0)
    np.testing.assert_array_equal(table["blocks.new"], 0)
    np.testing.assert_array_equal(table["blocks.old"], 1)
    kept = (held_out.codes != switches).sum(1) < 4
    np.testing.assert_array_equal(table["stays"][kept], 1)
    assert np.nanmax(table["jump"]) < 1.6


def test_a_switch_must_come_within_two_blocks(held_out, switches):
    start = VAE.video_frames(SWITCH)
    np.testing.assert_array_equal(judge(held_out, switches, at=start + 24)["held"], 1)
    late = judge(held_out, switches, at=start + 60)
    np.testing.assert_array_equal(late["held"], 0)
    np.testing.assert_array_equal(late["blocks.new"][:, :4], 0)
    np.testing.assert_array_equal(late["blocks.new"][:, 6:], 1)


def test_a_switch_that_is_half_obeyed_holds_by_attribute(held_out):
    """The prompt changes shape and colour, the video the colour alone."""
    new = held_out.codes.copy()
    new[:, 0], new[:, 1] = 2, (new[:, 1] + 1) % 4
    asked = new[:, 0] != held_out.codes[:, 0]
    after = np.where(np.arange(4) == 0, held_out.codes, new)
    table = judge(held_out, new, after=after)
    np.testing.assert_array_equal(table["held"], ~asked)
    np.testing.assert_array_equal(table["held.colour"], 1)
    np.testing.assert_array_equal(table["held.shape"], np.where(asked, 0, np.nan))
    np.testing.assert_array_equal(table["held.shape.ring"], np.where(asked, 0, np.nan))
    np.testing.assert_array_equal(table["held.shape.square"], np.nan)
    np.testing.assert_array_equal(table["held.motion"], np.nan)


def test_what_should_have_stayed_did_not(held_out):
    """The prompt changes the colour alone, the video changes the shape with it."""
    new, wrong = held_out.codes.copy(), held_out.codes.copy()
    new[:, 1] = wrong[:, 1] = (new[:, 1] + 1) % 4
    wrong[:, 0] = (wrong[:, 0] + 1) % 3
    table = judge(held_out, new, after=wrong)
    np.testing.assert_array_equal(table["held"], 1)
    np.testing.assert_array_equal(table["stays"], 0)
    np.testing.assert_array_equal(table["obeyed"], 0)


def test_a_switch_near_the_end_is_refused(held_out, switches):
    readings = evaluation.read_pixels(WORLD, np.zeros((CLIPS, VAE.video_frames(18), 64, 64, 3), np.uint8))
    for at in (12, 4):
        with pytest.raises(UserError, match=f"switch_frame={at}"):
            evaluation.measure_switches(
                WORLD, readings, old=held_out.codes, new=switches, vae=VAE, frames=18, switch_frame=at
            )


# --- over clips -------------------------------------------------------------------------------------


def test_yes_or_no_has_wilsons_interval():
    found = evaluation.estimate(np.array([1.0] * 30 + [np.nan] * 2))
    assert found.clips == 30
    assert found.mean == found.high == 1
    assert found.low == pytest.approx(0.886, abs=1e-3)  # 1 / (1 + 1.96**2 / 30)
    half = evaluation.estimate(np.array([[1.0], [0.0]] * 50))
    assert (half.low[0], half.high[0]) == pytest.approx((0.404, 0.596), abs=1e-3)


def test_other_measures_have_a_bootstrap_interval():
    found = evaluation.estimate(np.random.default_rng(0).random(100))
    assert 0.05 < found.high - found.low < 0.15
    assert found.low < found.mean < found.high


def test_pairs_find_what_unpaired_means_would_not():
    random = np.random.default_rng(0)
    clips = random.random(40)  # clips differ far more than conditions do
    better, alike = clips + 0.05 + 0.01 * random.normal(size=40), clips + 0.01 * random.normal(size=40)
    assert evaluation.compare(better, clips).differs
    assert evaluation.compare(better, clips).difference == pytest.approx(0.05, abs=0.01)
    assert evaluation.compare(clips, clips) == evaluation.Difference(
        clips.mean(), clips.mean(), 0.0, 0.0, 0.0, clips=40
    )
    assert not evaluation.compare(clips, clips).differs
    assert not evaluation.compare(better[:7], clips[:7]).differs  # too few to say
    found = evaluation.compare(alike, clips)
    assert found.low < found.difference < found.high


def test_pairs_leave_out_what_does_not_apply():
    found = evaluation.compare(np.array([1.0, np.nan, 3.0]), np.array([0.5, 1.0, np.nan]))
    assert (found.first, found.second, found.clips) == (1.0, 0.5, 1)
    nothing = evaluation.compare(np.array([np.nan]), np.array([1.0]))
    assert nothing.clips == 0
    assert not nothing.differs
    with pytest.raises(UserError, match="same clips"):
        evaluation.compare(np.zeros(2), np.zeros(3))
