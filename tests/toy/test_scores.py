"""Each score falls for its own fault and stays for the others."""

import dataclasses
import warnings

import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.toy import (
    FIELDS,
    IDENTITY,
    Story,
    read,
    render,
    render_story,
    score,
    score_switch,
    summarise,
)
from tests.toy.broken import FRAMES, HALF, WORLD, breakages, scenes

CLIPS = 12


@pytest.fixture(scope="module")
def reports():
    """Mean scores of the broken half of every kind of breakage, as flat dictionaries."""
    clips = scenes(CLIPS)
    result = {}
    for name, video in breakages(clips).items():
        scores = score(WORLD, read(WORLD, video), clips.codes, window_frames=HALF)
        means = {key: interval.mean[1] for key, interval in summarise(scores, resamples=50).items()}
        adherence, identity = means.pop("adherence"), means.pop("identity")
        means |= dict(zip(FIELDS, adherence, strict=True)) | dict(zip(IDENTITY, identity, strict=True))
        result[name] = means
    return result


# Scores where high is good, with the value below which a clip counts as broken; then those where low is.
GOOD_ABOVE = {
    **dict.fromkeys(FIELDS, 0.99),
    "present": 0.99,
    "iou": 0.95,
    "size": 0.9,
    "shade": 0.9,
    "gradient": 0.95,
    "lane": 0.95,
    "sharpness": 0.85,
    "contrast": 0.8,
}
GOOD_BELOW = {"sprite_drift": 0.05, "background_drift": 0.05, "flicker": 0.004, "residual": 0.012}

GONE = {"shape", "colour", "motion", "present", "iou", "size", "shade", "lane", "sharpness", "contrast",
        "sprite_drift"}  # fmt: skip

# What each breakage must move. Side effects that are real are listed: a sprite that took another way has
# left its lane, a brighter sprite has another shade, a blurred one another area.
EXPECTED = {
    "clean": set(),
    "colour": {"colour", "sprite_drift"},
    "shape": {"shape"},
    "motion": {"motion", "lane"},
    "background": {"background", "background_drift"},
    "frozen": {"motion"},
    "vanished": GONE,
    "noise": {"flicker", "residual"},
    "blurred": {"iou", "sharpness", "sprite_drift", "size", "shade", "flicker", "residual"},
    "brighter": {"background_drift", "sprite_drift", "shade"},
    "flicker": {"flicker"},
    "size": {"size"},
    "shade": {"shade", "sprite_drift"},
    "gradient": {"gradient"},
    "lane": {"lane"},
    "fragments": {"shape", "iou", "residual", "flicker"},
}

# Consequences whose size depends on the clip: neither required nor forbidden.
OPEN = {
    "flicker": {"shade", "sprite_drift", "background_drift"},
    "brighter": {"background", "gradient", "contrast", "flicker"},
    "background": {"contrast"},
    "blurred": {"contrast"},
    "lane": {"motion"},  # the jump itself is within the span of nine frames
    "fragments": {"gradient", "lane", "motion"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_relevant_scores_fall_and_the_others_do_not(reports, name):
    report = reports[name]
    fallen = {key for key, limit in GOOD_ABOVE.items() if report[key] < limit}
    fallen |= {key for key, limit in GOOD_BELOW.items() if report[key] > limit}
    assert fallen - OPEN.get(name, set()) == EXPECTED[name], report


def test_a_vanished_sprite_scores_nothing(reports):
    report = reports["vanished"]
    for key in GONE - {"sprite_drift"}:
        assert report[key] == pytest.approx(0, abs=1e-9), key
    assert report["sprite_drift"] == 1
    assert report["background"] == 1


def test_a_sprite_that_never_was_has_no_identity():
    clips = scenes(1)
    video = render(WORLD, dataclasses.replace(clips, size=np.array([1e-3])), frames=FRAMES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = score(WORLD, read(WORLD, video), clips.codes, window_frames=HALF)
    np.testing.assert_array_equal(result.identity[..., [0, 1, 3]], 0)
    np.testing.assert_array_equal(result.sharpness, 0)
    np.testing.assert_array_equal(result.adherence_all, 0)


def test_half_wrong_is_half_a_score():
    clips = scenes(4)
    video = breakages(clips)["colour"]
    result = score(WORLD, read(WORLD, video), clips.codes, window_frames=FRAMES)
    np.testing.assert_allclose(result.adherence[:, 0, 1], 0.5)
    np.testing.assert_allclose(result.adherence_all[:, 0], 0.5)


def test_remaining_frames_join_the_last_window():
    clips = scenes(2)
    result = score(WORLD, read(WORLD, breakages(clips)["colour"]), clips.codes, window_frames=30)
    assert result.adherence.shape == (2, 2, 4)  # 30 and 42 frames
    np.testing.assert_allclose(result.adherence[:, 1, 1], 6 / 42)


# --- switches -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def switched():
    clips = scenes(12, seed=3)
    after = scenes(12, seed=4).codes
    differs = (after != clips.codes).any(1)
    clips, after = clips[differs], after[differs]
    story = Story((0, HALF), np.stack([clips.codes, after], axis=1))
    return clips, after, story, render_story(WORLD, clips, story, frames=FRAMES)


def judge(clips, after, video):
    return score_switch(WORLD, read(WORLD, video), old=clips.codes, new=after, frame=HALF)


def test_a_perfect_switch(switched):
    clips, after, story, video = switched
    result = judge(clips, after, video)
    np.testing.assert_array_equal(result.new, 1)
    np.testing.assert_array_equal(result.old, 0)
    assert np.nanmin(result.unchanged) == 1
    assert result.held.all()
    assert result.identity.min() > 0.75
    assert result.place.max() < 0.6
    # The whole clip adheres to its story, and keeps what the story does not name.
    scores = score(WORLD, read(WORLD, video), story.at(FRAMES), window_frames=HALF)
    np.testing.assert_array_equal(scores.adherence, 1)
    assert scores.identity.min() > 0.75
    assert scores.background_drift.max() < 0.05
    assert scores.sprite_drift.max() < 0.1


def test_an_ignored_switch(switched):
    clips, after, _, _ = switched
    result = judge(clips, after, render(WORLD, clips, frames=FRAMES))
    np.testing.assert_array_equal(result.new, 0)
    np.testing.assert_array_equal(result.old, 1)
    assert not result.held.any()
    assert result.jump.max() < 1.5


def test_a_late_switch_is_held_only_within_the_grace(switched):
    clips, after, _, _ = switched
    for delay, held in ((12, True), (30, False)):
        story = Story((0, HALF + delay), np.stack([clips.codes, after], axis=1))
        result = judge(clips, after, render_story(WORLD, clips, story, frames=FRAMES))
        assert (result.held == held).all(), delay
        assert result.new[:, 0].max() < 0.5
        assert result.old[:, 0].min() > 0.5


def test_starting_over_breaks_the_continuity(switched):
    clips, after, _, video = switched
    anew = dataclasses.replace(
        clips, codes=after, start=clips.start + 24, size=19 - clips.size, gradient=-clips.gradient
    )
    broken = np.concatenate([video[:, :HALF], render(WORLD, anew, frames=FRAMES - HALF)], axis=1)
    result, good = judge(clips, after, broken), judge(clips, after, video)
    np.testing.assert_array_equal(result.new[:, 1:], 1)
    assert result.place.min() > 4
    assert result.identity[..., 0].mean() < good.identity[..., 0].mean() - 0.2
    assert result.identity[..., 2].mean() < good.identity[..., 2].mean() - 0.2


def test_the_boundary_jump_is_relative_to_the_clip():
    clips = scenes(4)
    clips = dataclasses.replace(clips, codes=np.array([[0, 0, 1, 0]] * 4, np.int32))
    brighter = np.array([[0, 0, 1, 2]] * 4, np.int32)
    story = Story((0, HALF), np.stack([clips.codes, brighter], axis=1))
    result = judge(clips, brighter, render_story(WORLD, clips, story, frames=FRAMES))
    assert result.jump.min() > 10


# --- summaries ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Values:
    values: np.ndarray


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(300):
        interval = summarise(_Values(rng.normal(0.3, 1, (40, 1))), level=0.9, resamples=400, seed=trial)[
            "values"
        ]
        covered.append(interval.low[0] <= 0.3 <= interval.high[0])
    assert 0.83 < np.mean(covered) < 0.95


def test_intervals_have_the_shape_of_the_score_and_shrink_with_clips():
    rng = np.random.default_rng(0)
    values = rng.random((400, 2, 3))
    few, many = (summarise(_Values(values[:n]))["values"] for n in (20, 400))
    assert few.mean.shape == few.low.shape == few.high.shape == (2, 3)
    np.testing.assert_allclose(many.mean, values.mean(0))
    assert (few.low < few.mean).all()
    assert (few.mean < few.high).all()
    assert ((many.high - many.low) < (few.high - few.low) / 3).all()


def test_what_does_not_apply_is_left_out_of_the_mean():
    values = np.array([[1.0, np.nan], [np.nan, np.nan], [0.0, np.nan], [1.0, np.nan]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        interval = summarise(_Values(values))["values"]
    assert interval.mean[0] == pytest.approx(2 / 3)
    assert 0 <= interval.low[0] <= interval.high[0] <= 1
    assert np.isnan(interval.mean[1])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"window_frames": 4}, "window_frames=4"),
        ({"window_frames": 200}, "window_frames=200"),
        ({"targets": np.zeros((3, 4), int)}, "targets has shape"),
    ],
)
def test_bad_scores_are_refused(change, named):
    readings = read(WORLD, render(WORLD, scenes(2), frames=20))
    arguments = {"targets": np.zeros((2, 4), int), "window_frames": 10} | change
    with pytest.raises(UserError, match=named):
        score(WORLD, readings, **arguments)


@pytest.mark.parametrize(
    ("new", "frame", "named"),
    [((0, 0, 0, 0), 36, "must differ"), ((0, 0, 0, 1), 60, "frame=60"), ((1, 0, 0, 0), 2, "frame=2")],
)
def test_bad_switches_are_refused(new, frame, named):
    readings = read(WORLD, render(WORLD, scenes(1), frames=FRAMES))
    with pytest.raises(UserError, match=named):
        score_switch(WORLD, readings, old=np.zeros((1, 4), int), new=np.array([new]), frame=frame)
