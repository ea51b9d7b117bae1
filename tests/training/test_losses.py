"""The losses against the release's numbers (fixtures E and H1)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.training import losses
from longlive_jax.training.losses import DMDConfig
from tests.fixtures import load
from tests.training._recorded import assert_gradients, channels_last, params_of, quick_jit, score

SINGLE = {"rtol": 1e-4, "atol": 2e-5}
CONFIGS = {"": DMDConfig(), "_scoreshift5": DMDConfig(score_shift=5.0)}


def test_timestep_law():
    recorded = load("E")
    raw = jnp.asarray(recorded["dmd_timestep/raw"])
    np.testing.assert_allclose(
        losses.timestep_law(DMDConfig(), raw), recorded["dmd_timestep/shifted5_clamped_20_980"], rtol=1e-6
    )
    free = DMDConfig(min_timestep=0, max_timestep=1000)
    np.testing.assert_allclose(
        losses.timestep_law(free, raw), recorded["dmd_timestep/shifted5"], rtol=1e-6, atol=1e-6
    )


def test_drawn_timesteps_keep_the_bounds_and_lean_towards_noise():
    drawn = losses.draw_timesteps(DMDConfig(), jax.random.key(0), 4096)
    assert drawn.shape == (4096,)
    assert drawn.min() >= 20
    assert drawn.max() <= 980
    assert 740 < np.mean(drawn) < 765  # the shifted uniform law has mean 747


@pytest.mark.parametrize("case", ["dmd", "dmd_masked", "dmd_scoreshift5"])
def test_dmd(case):
    recorded = load("H1")
    config = DMDConfig(score_shift=5.0 if case.endswith("5") else 8.0)
    clip = jnp.asarray(channels_last(recorded["latent"]))
    timesteps = losses.timestep_law(config, recorded[f"{case}/raw_randint"][:, 0])
    np.testing.assert_allclose(timesteps, recorded[f"{case}/timestep"][:, 0], rtol=1e-6)
    mask = None
    if case == "dmd_masked":
        mask = jnp.asarray(recorded[f"{case}/gradient_mask"][:, :, 0, 0, 0])
        assert not mask.all()
    real, fake = params_of("H1", "w_real/"), params_of("H1", "w_fake/")

    def loss(clip):
        return losses.dmd_loss(
            config,
            clip,
            timesteps,
            channels_last(recorded[f"{case}/noise"]),
            critic=score(fake, recorded["cond"]),
            teacher=score(real, recorded["cond"]),
            teacher_uncond=score(real, recorded["uncond"]),
            mask=mask,
        )

    (value, report), gradient = quick_jit(jax.value_and_grad(loss, has_aux=True))(clip)
    np.testing.assert_allclose(value, recorded[f"{case}/loss"], rtol=1e-4)
    np.testing.assert_allclose(report.normalizer, recorded[f"{case}/normalizer"].reshape(-1), rtol=1e-4)
    np.testing.assert_allclose(report.gradient, channels_last(recorded[f"{case}/grad"]), **SINGLE)
    np.testing.assert_allclose(
        jnp.abs(report.gradient).mean(), recorded[f"{case}/gradient_norm_log"], rtol=1e-4
    )
    theirs = channels_last(recorded[f"{case}/dloss_dlatent"])
    assert np.linalg.norm(gradient - theirs) < 1e-4 * np.linalg.norm(theirs)


def test_dmd_gradient_is_zero_where_it_is_no_number():
    same = jnp.ones((2, 3, 2, 2, 4))
    report = losses.dmd_gradient(same, fake=same.at[1].add(1.0), real=same.at[1].add(2.0))
    np.testing.assert_array_equal(report.gradient[0], 0.0)
    np.testing.assert_allclose(report.gradient[1], -0.5)


@pytest.mark.parametrize("case", ["critic", "critic_scoreshift5"])
def test_critic(case):
    recorded = load("H1")
    config = DMDConfig(score_shift=5.0 if case.endswith("5") else 8.0)
    clip = jnp.asarray(channels_last(recorded["latent"]))
    timesteps = losses.timestep_law(config, recorded[f"{case}/raw_randint"][:, 0])
    noise = channels_last(recorded[f"{case}/noise"])

    def loss(params, config):
        critic = score(params, recorded["cond"])
        return losses.critic_loss(config, clip, timesteps, noise, critic=critic)

    params = params_of("H1", "w_fake/")
    value, gradients = quick_jit(jax.value_and_grad(loss), static_argnums=1)(params, config)
    np.testing.assert_allclose(value, recorded[f"{case}/loss"], rtol=1e-4)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(norm, recorded[f"{case}/grad_norm"], rtol=1e-3)
    if case == "critic":
        assert_gradients(gradients, "H1", "critic/grad/")
    plain = loss(params, dataclasses.replace(config, critic_flow="plain"))
    np.testing.assert_allclose(plain, recorded[f"{case}/loss_if_plain_flow_mse"], rtol=1e-4)


def test_masked_frames_do_not_count():
    x0, noise = (jax.random.normal(jax.random.key(i), (2, 4, 2, 2, 3)) for i in range(2))
    wrong = noise - x0
    wrong = wrong.at[:, 1].add(2.0).at[0, 3].add(100.0)
    mask = jnp.ones((2, 4), bool).at[0, 3].set(False)
    np.testing.assert_allclose(losses.flow_matching_loss(wrong, x0, noise, mask=mask), 4.0 * 2 / 7, rtol=1e-5)
    weight = jnp.asarray([[0.0, 3.0, 1.0, 0.0]])
    np.testing.assert_allclose(
        losses.flow_matching_loss(wrong, x0, noise, weight=weight), 4.0 * 3 / 4, rtol=1e-5
    )


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="min_timestep=990"):
        DMDConfig(min_timestep=990)
    with pytest.raises(UserError, match=r"score_shift=0"):
        DMDConfig(score_shift=0)


@pytest.mark.parametrize("masked", [False, True])
def test_frames_count_for_the_generator_by_their_weight(masked):
    """Weight 3 on a frame is that frame three times; a masked frame stays out whatever its weight."""
    keys = jax.random.split(jax.random.key(0), 3)
    clip, noise = (jax.random.normal(key, (2, 4, 2, 2, 3)) for key in keys[:2])
    mask = jnp.array([False, True, True, True]) if masked else None
    timesteps = jnp.array([500.0, 900.0])

    def score_of(scale):
        return lambda noisy, timesteps: scale * noisy

    def found(weight):
        scores = {"critic": score_of(0.3), "teacher": score_of(0.8), "teacher_uncond": score_of(0.5)}

        def loss(clip):
            config = DMDConfig()
            return losses.dmd_loss(config, clip, timesteps, noise, **scores, mask=mask, weight=weight)[0]

        value, gradient = jax.value_and_grad(loss)(clip)
        return float(value), np.asarray(gradient)

    plain, plain_gradient = found(None)
    same, same_gradient = found(jnp.ones(4))
    assert same == pytest.approx(plain, rel=1e-6)
    np.testing.assert_allclose(same_gradient, plain_gradient, rtol=1e-6, atol=1e-9)
    value, gradient = found(jnp.array([5.0, 3.0, 1.0, 1.0]))
    total, count = (5.0, 3) if masked else (10.0, 4)
    shares = np.array([0.0 if masked else 5.0, 3.0, 1.0, 1.0]) * count / total
    np.testing.assert_allclose(gradient, plain_gradient * shares[:, None, None, None], rtol=1e-5, atol=1e-9)
    assert value != pytest.approx(plain, rel=1e-3)
