"""Self-forcing rollouts and the generator's gradients against the release's numbers (fixture H2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.training import losses
from longlive_jax.training.losses import DMDConfig
from longlive_jax.training.rollout import SelfForcing
from tests.fixtures import load
from tests.training._recorded import (
    assert_gradients,
    channels_last,
    generator,
    params_of,
    quick_jit,
    score,
    table_noise,
)

CHAINED = {"rtol": 1e-4, "atol": 1e-4}

# name of the recording, cache_gradient, text_gradient
MODES = [
    ("ckpt", "straight_through", "full"),
    ("ckpt_cachedetached", "none", "full"),
    ("nockpt", "straight_through", "none"),
]


def forcing_of(initial, drawn, exits, **settings):
    return SelfForcing(generator(table_noise(initial, drawn, exits)), **settings)


def roll_out(forcing, params, exits):
    text = load("H2")["cond"]
    sequence = forcing.begin(text, np.zeros(1, np.uint32), latent_size=(4, 6), history_frames=21)
    step = quick_jit(functools.partial(forcing.roll_out, opening=True, keep_context=True))
    return step(params, sequence, jnp.asarray(exits, jnp.int32))


@pytest.mark.parametrize("case", ["exit0", "exit3", "mixed"])
def test_rollouts_with_each_exit_step(case):
    recorded, params = load("H2"), params_of("H2", "w_generator/")
    exits = recorded[f"rollout_{case}/exit_flags"]
    forcing = forcing_of(
        recorded[f"rollout_{case}/noise"], recorded[f"rollout_{case}/renoise_in_call_order"], exits
    )
    after, rollout = roll_out(forcing, params, exits)
    theirs = channels_last(recorded[f"rollout_{case}/out"])
    np.testing.assert_allclose(rollout.latents, theirs, **CHAINED)
    np.testing.assert_allclose(after.history, theirs, **CHAINED)
    assert int(after.frame) == 21
    np.testing.assert_allclose(quick_jit(forcing.latents)(params, rollout), theirs, **CHAINED)


@pytest.mark.parametrize(("name", "cache_gradient", "text_gradient"), MODES)
def test_generator_loss_and_gradients(name, cache_gradient, text_gradient):
    recorded, params = load("H2"), params_of("H2", "w_generator/")
    exits = np.full(7, recorded["exit_step"])
    forcing = forcing_of(
        recorded["rng01_randn"][0],
        recorded["rng02_randn_like"],
        exits,
        cache_gradient=cache_gradient,
        text_gradient=text_gradient,
    )
    _, rollout = roll_out(forcing, params, exits)
    np.testing.assert_allclose(rollout.latents, channels_last(recorded["rollout"]), **CHAINED)
    real, fake = params_of("H2", "w_real/"), params_of("H2", "w_fake/")
    config = DMDConfig()
    timesteps = losses.timestep_law(config, recorded["rng03_randint"].reshape(1))
    np.testing.assert_allclose(timesteps, recorded["timestep"][:, 0], rtol=1e-6)

    def loss(params):
        return losses.dmd_loss(
            config,
            forcing.latents(params, rollout),
            timesteps,
            channels_last(recorded["rng04_randn_like"][0]),
            critic=score(fake, recorded["cond"]),
            teacher=score(real, recorded["cond"]),
            teacher_uncond=score(real, recorded["uncond"]),
        )[0]

    value, gradients = quick_jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, recorded[f"{name}/loss"], rtol=1e-4)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(norm, recorded[f"{name}/grad_norm"], rtol=1e-3)
    assert_gradients(gradients, "H2", f"{name}/grad/")
