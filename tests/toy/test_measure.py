"""The readings are right on ground truth, also after what a lossy VAE does to it."""

import dataclasses

import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.toy import UNKNOWN, combinations, is_held_out, motion_codes, read, render, sample_scenes
from longlive_jax.toy.renderer import Story, story_centres, wrap
from tests.toy.broken import WORLD, blur, noise, scenes

CLIPS, FRAMES = 200, 9


@pytest.fixture(scope="module")
def truth():
    clips = scenes(CLIPS, seed=11)
    return clips, render(WORLD, clips, frames=FRAMES, first_frame=30)


@pytest.mark.parametrize(
    "degrade",
    [
        lambda video: video,
        lambda video: blur(video, 1.0),
        lambda video: blur(video, 2.0),
        lambda video: noise(video, 0.1),
        lambda video: noise(blur(video, 1.0), 0.06),
    ],
    ids=["clean", "blur 1", "blur 2", "noise", "blur and noise"],
)
def test_every_attribute_is_read(truth, degrade):
    clips, video = truth
    right = read(WORLD, degrade(video)).codes == clips.codes[:, None]
    assert (right.mean((0, 1)) >= 0.99).all(), right.mean((0, 1))
    assert sum(is_held_out(codes) for codes in clips.codes.tolist()) >= 10


def test_every_combination_is_read():
    clips = sample_scenes(WORLD, seed=1, indices=range(180))
    clips = dataclasses.replace(clips, codes=combinations("all"))
    found = read(WORLD, render(WORLD, clips, frames=9))
    np.testing.assert_array_equal(found.codes, np.repeat(clips.codes[:, None], 9, axis=1))


def test_unprompted_attributes_are_read(truth):
    clips, video = truth
    found = read(WORLD, video)
    story = Story((0,), clips.codes[:, None])
    centres = story_centres(WORLD, clips, story, frames=FRAMES, first_frame=30)
    assert np.abs(wrap(found.centre - centres, 64)).max() < 0.3
    assert np.abs(found.size - clips.size[:, None]).max() < 0.5
    assert np.abs(found.shade - clips.shade[:, None]).max() < 0.05
    assert np.abs(found.gradient - clips.gradient[:, None]).max() < 0.01
    assert found.present.all()
    assert found.iou.mean() > 0.98
    assert found.residual.max() < 0.035


def test_sharpness_falls_with_blur_and_not_with_contrast(truth):
    _, video = truth
    video = video[:60]
    sharp, soft, pale = (read(WORLD, v).sharpness.mean() for v in (video, blur(video, 1.0), video * 0.8))
    assert soft < 0.7 * sharp
    assert pale == pytest.approx(sharp, rel=0.03)


def test_motion_explains_the_change_between_frames(truth):
    clips, video = truth[0][:60], truth[1][:60]
    found = read(WORLD, video)
    moving = clips.codes[:, 2] != 4
    assert found.change.shape == found.flicker.shape == (60, FRAMES - 1)
    assert found.flicker[moving].mean() < 0.15 * found.change[moving].mean()
    blink = video.copy()
    blink[:, ::2] *= 0.9
    assert read(WORLD, blink).flicker.mean() > 10 * found.flicker.mean()


def test_an_empty_scene_is_a_failure_and_not_a_gap():
    video = np.full((12, 64, 64, 3), -0.7, np.float32)
    found = read(WORLD, video)
    assert not found.present.any()
    assert (found.codes[..., :3] == UNKNOWN).all()
    assert (found.codes[..., 3] == 0).all()  # the background is still there
    for name in ("iou", "sharpness", "contrast"):
        assert (getattr(found, name) == 0).all(), name
    assert all(np.isfinite(getattr(found, name)).all() for name in ("centre", "size", "shade", "residual"))


def test_pure_noise_shows_nothing():
    video = np.random.default_rng(0).uniform(-1, 1, (4, 12, 64, 64, 3)).astype(np.float32)
    found = read(WORLD, video)
    assert (found.codes[..., 0] == UNKNOWN).mean() > 0.95
    assert (found.codes[..., 2] == UNKNOWN).mean() > 0.8
    assert found.residual.mean() > 0.2


def test_a_colour_outside_the_palette_has_no_name():
    clips = scenes(1)
    video = render(WORLD, clips, frames=1)
    clean = read(WORLD, video)
    sprite = np.linalg.norm(video - (clean.sprite_rgb * 2 - 1)[:, :, None, None], axis=-1) < 0.1
    video[sprite] = (0.6, -0.8, 0.7)  # purple
    found = read(WORLD, video)
    assert found.codes[0, 0, 1] == UNKNOWN
    assert found.codes[0, 0, 0] == clips.codes[0, 0]


def test_readings_do_not_depend_on_the_batch():
    video = render(WORLD, scenes(3), frames=40)
    together, alone = read(WORLD, video), read(WORLD, video[1])
    for name in ("codes", "centre", "iou", "flicker", "residual"):
        np.testing.assert_allclose(
            getattr(together, name)[1:2], getattr(alone, name), atol=1e-6, err_msg=name
        )


def test_motion_is_not_read_across_a_cut():
    step = np.concatenate([np.tile([2.0, 0], (12, 1)), np.tile([0, 2.0], (12, 1))])
    centre = np.mod(60 + np.cumsum(step, axis=0), 64)[None]
    present = np.ones((1, 24), bool)
    right, down = 1, 3
    split = motion_codes(WORLD, centre, present, cuts=[12])
    assert split.tolist() == [[right] * 12 + [down] * 12]
    blurred = motion_codes(WORLD, centre, present)
    assert (blurred[0, :8] == right).all()
    assert (blurred[0, -8:] == down).all()
    assert UNKNOWN in blurred[0, 8:16]


def test_motion_needs_a_visible_sprite_at_the_right_speed():
    frames = np.arange(24.0)
    present = np.ones((1, 24), bool)
    still, right = 4, 1

    def at(speed):
        return np.mod(np.stack([speed * frames, 0 * frames], axis=1), 64)[None]

    for speed, code in ((0.2, still), (1.6, right), (2.6, right), (0.8, UNKNOWN), (4.0, UNKNOWN)):
        assert (motion_codes(WORLD, at(speed), present) == code).all(), speed
    oblique = np.mod(np.stack([1.4 * frames, 1.4 * frames], axis=1), 64)[None]
    assert (motion_codes(WORLD, oblique, present) == UNKNOWN).all()
    present[0, 10:14] = False
    hidden = motion_codes(WORLD, at(2.0), present)
    assert (hidden[0, 9:15] == UNKNOWN).all()
    assert (hidden[0, :4] == right).all()


@pytest.mark.parametrize(
    ("video", "named"),
    [
        (np.zeros((4, 32, 64, 3)), "video has shape"),
        (np.zeros((64, 64, 3)), "video has shape"),
        (np.zeros((0, 64, 64, 3)), "video has shape"),
        (np.full((1, 64, 64, 3), np.nan), "not finite"),
    ],
)
def test_bad_videos_are_refused(video, named):
    with pytest.raises(UserError, match=named):
        read(WORLD, video)
