"""The flow-matching schedule against the release's tables and values (fixture E)."""

import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import SamplerConfig
from longlive_jax.diffusion.schedule import FlowSchedule, few_step_table
from longlive_jax.errors import UserError
from tests.fixtures import load

EXACT = {"rtol": 2e-6, "atol": 1e-7}
SINGLE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize("shift", [1, 5, 8])
def test_tables(shift):
    recorded, schedule = load("E"), FlowSchedule(float(shift))
    np.testing.assert_allclose(schedule.sigmas, recorded[f"shift{shift}/sigmas"], **EXACT)
    np.testing.assert_allclose(schedule.timesteps, recorded[f"shift{shift}/timesteps"], **EXACT)
    weights = recorded[f"shift{shift}/linear_timesteps_weights"]
    np.testing.assert_allclose(schedule.training_weights, weights, rtol=1e-4, atol=1e-5)
    warped = schedule.warp((1000, 750, 500, 250))
    np.testing.assert_allclose(warped, recorded[f"shift{shift}/warped_1000_750_500_250"], **EXACT)
    warped = schedule.warp((1000, 750, 500, 250, 0))
    np.testing.assert_allclose(warped, recorded[f"shift{shift}/warped_1000_750_500_250_0"], **EXACT)


def test_conversions_at_any_timestep():
    recorded, schedule = load("E"), FlowSchedule(5.0)
    t = jnp.asarray(recorded["ex/t"])
    clean, noise, flow = (recorded[f"ex/{k}"] for k in ("clean", "noise", "flow"))
    noisy = schedule.add_noise(clean, noise, t)
    np.testing.assert_array_equal(schedule.nearest_index(t), recorded["ex/nearest_index"])
    np.testing.assert_allclose(schedule.sigma(t), recorded["ex/sigma"], **EXACT)
    np.testing.assert_allclose(
        schedule.training_weight(t), recorded["ex/training_weight"], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(noisy, recorded["ex/add_noise"], **SINGLE)
    x0 = schedule.to_x0(noisy, flow, t)
    np.testing.assert_allclose(x0, recorded["ex/x0_from_flow"], **SINGLE)
    np.testing.assert_allclose(
        schedule.to_velocity(noisy, recorded["ex/x0_from_flow"], t),
        recorded["ex/flow_from_x0"],
        rtol=1e-4,
        atol=2e-4,
    )


def test_euler_step_takes_each_sample_to_its_own_next_entry():
    """The release takes a whole batch to sigma 0 once one sample is at the last entry, and the recorded
    batch holds such samples: they agree with ours, the others with a step to sigma 0 and not with ours."""
    recorded, schedule = load("E"), FlowSchedule(5.0)
    t, flow, noisy = jnp.asarray(recorded["ex/t"]), recorded["ex/flow"], recorded["ex/add_noise"]
    stepped = schedule.euler_step(noisy, flow, t)
    index, expected = recorded["ex/nearest_index"], recorded["ex/step_prev_sample"]
    last = index == 999
    assert last.sum() == 2
    np.testing.assert_allclose(stepped[last], expected[last], **SINGLE)
    np.testing.assert_allclose(schedule.to_x0(noisy, flow, t), expected, **SINGLE)
    following = schedule.sigmas[index[~last] + 1]
    literal = noisy[~last] + flow[~last] * (following - schedule.sigmas[index[~last]])[:, None, None, None]
    np.testing.assert_allclose(stepped[~last], literal, atol=1e-6)


def test_timestep_zero_keeps_the_last_entrys_sigma():
    assert float(FlowSchedule(5.0).sigma(jnp.zeros(()))) == pytest.approx(0.0049801, abs=1e-6)


def test_the_samplers_table_is_the_released_one():
    steps = few_step_table(SamplerConfig())
    np.testing.assert_allclose(steps.timesteps, [1000, 937.5, 833.3333, 625], rtol=1e-6)
    np.testing.assert_allclose(steps.sigmas, [1, 0.9375, 0.8333333, 0.625], rtol=1e-6)
    np.testing.assert_allclose(steps.next_sigmas, [0.9375, 0.8333333, 0.625, 0], rtol=1e-6)
    plain = few_step_table(SamplerConfig(steps=(900, 100), warp_steps=False))
    np.testing.assert_allclose(plain.timesteps, [900, 100])


@pytest.mark.parametrize("steps", [(), (500, 750), (1001,), (0,), (500, 500)])
def test_step_lists_that_make_no_sense_are_refused(steps):
    with pytest.raises(UserError, match=r"sampler\.steps="):
        SamplerConfig(steps=steps)
    if steps:
        with pytest.raises(UserError, match=r"sampler\.opening_steps="):
            SamplerConfig(opening_steps=steps)
