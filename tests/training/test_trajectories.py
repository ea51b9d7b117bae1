"""ODE regression: what is kept of the teacher's trajectories, and what the student is asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import sharding
from longlive_jax.cache import BlockKV
from longlive_jax.config import SamplerConfig
from longlive_jax.diffusion.schedule import few_step_table
from longlive_jax.training import flow, sampling, stored, trajectories
from tests.training._runs import only_one_device, smoke

SAMPLER = SamplerConfig()


class SmoothField:
    """Stands for a generator whose velocity is known: x itself, whatever the prompt."""

    sampler = SAMPLER

    def encode_text(self, params, text):
        return text

    def noise(self, seeds, positions, step, shape):
        return jax.random.normal(jax.random.key(0), (len(seeds), len(positions), *shape))

    def velocity(self, params, latents, timestep, text, positions, context):
        return latents, None


def test_kept_states_are_on_the_way_of_the_solver():
    solver = sampling.Solver(steps=7, shift=3.0)
    given = (SmoothField(), None, sampling.Prompts(jnp.zeros((2, 1, 1)), None), jnp.arange(2))
    states = sampling.trajectories(*given, shape=(3, 2, 2, 4), solver=solver)  # [B, F, K + 1, h, w, C]
    way = [np.asarray(given[0].noise(given[3], range(3), 0, (2, 2, 4)))]
    for sigma, following in zip(solver.sigmas[:-1], solver.sigmas[1:], strict=True):
        way.append(way[-1] * (1 + following - sigma))
    falling = np.interp(few_step_table(SAMPLER).sigmas, solver.sigmas[::-1], np.arange(8)[::-1])
    for k, place in enumerate(falling):  # between two steps the way is straight
        low, share = int(place), place - int(place)
        expected = way[low] if share == 0 else (1 - share) * way[low] + share * way[low + 1]
        np.testing.assert_allclose(states[:, :, k], expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(
        states[:, :, -1], sampling.bidirectional(*given, shape=(3, 2, 2, 4), solver=solver)
    )


@pytest.fixture(scope="module")
def solved(base, tmp_path_factory, fast_programs):
    """(config, frozen, clips) of a smoke run; its trajectories are on disk."""
    config = smoke("causal_ode", base, tmp_path_factory.mktemp("ode") / "run", flow__guidance=2.0)
    with only_one_device():
        frozen = flow.load_frozen(config, sharding.make_mesh(data=1, fsdp=1))
        return config, frozen, flow.trajectories(config, frozen)


def test_trajectories_end_where_the_teacher_samples(solved):
    config, frozen, clips = solved
    indices = np.array([5, 2])
    rows = clips.rows(indices)
    assert set(rows) == {"states", "caption"}
    captions, seeds = np.asarray(frozen.captions), trajectories.noise_seeds(config.data, indices)
    prompts = flow.solver(config).prompts(captions[rows["caption"]], captions[-1])
    shape = (config.data.frames, *frozen.latent_shape)
    sampled = sampling.bidirectional(
        frozen.local_generator, frozen.start, prompts, seeds, shape=shape, solver=flow.solver(config)
    )
    states = rows["states"]  # [B, F, K + 1, h, w, C]
    assert states.shape == (2, shape[0], 5, *shape[1:])
    np.testing.assert_allclose(states[:, :, -1], sampled, rtol=2e-3, atol=2e-3)  # float16
    noise = frozen.generator.noise(seeds, jnp.arange(shape[0]), 0, shape[1:])
    np.testing.assert_array_equal(states[:, :, 0], np.asarray(noise, np.float16))
    assert np.abs(states[:, :, 1] - states[:, :, -1]).mean() > 0.01


def test_what_is_there_is_not_made_again_and_never_stale(solved, monkeypatch):
    config, frozen, clips = solved
    made = []
    solve = trajectories._solve
    monkeypatch.setattr(trajectories, "_solve", lambda *a, **k: made.append(1) or solve(*a, **k))
    assert flow.trajectories(config, frozen).folder == clips.folder
    assert not made
    [shard] = clips.folder.iterdir()
    before = shard.read_bytes()
    shard.unlink()
    flow.trajectories(config, frozen)
    assert len(made) == stored.SHARD_CLIPS // trajectories._SOLVED_TOGETHER
    assert shard.read_bytes() == before

    monkeypatch.setattr(stored.StoredClips, "complete", lambda self, *_, **__: self)
    base, run = config.base, config.run.folder
    others = [
        smoke("causal_ode", base, run),
        smoke("causal_ode", base, run, flow__guidance=2.0, flow__sample_steps=3),
        smoke("causal_ode", base, run, flow__guidance=2.0, data__seed=1),
    ]
    names = {flow.trajectories(other, frozen).folder.name for other in others}
    assert len(names - {clips.folder.name}) == 3


def loss_of(solved, monkeypatch, distance):
    """The loss of a student whose x0 is off by `distance` everywhere, its batch, and what the student saw."""
    config, frozen, clips = solved
    batch = {name: jnp.asarray(values) for name, values in clips.rows(np.arange(4)).items()}
    end, seen = batch["states"][:, :, -1], {}

    def velocity(generator, params, noisy, sigma, text, context):
        seen.update(noisy=noisy, sigma=sigma)
        return (noisy - end - distance) / sigma[:, :, None, None, None]

    def clean_pass(generator, params, text, latents):
        seen.update(past=latents)
        return BlockKV(None, None)  # `velocity` does without

    monkeypatch.setattr(flow, "velocity", velocity)
    monkeypatch.setattr(flow, "clean_pass", clean_pass)
    given = (config, frozen.generator, frozen.captions, frozen.start, batch)
    return float(flow.loss_fn(*given, jax.random.key(0))[0]), batch, seen


def test_the_loss_is_the_mean_square_of_x0(solved, monkeypatch):
    assert loss_of(solved, monkeypatch, 0.0)[0] == 0
    assert loss_of(solved, monkeypatch, 0.5)[0] == pytest.approx(0.25, rel=1e-5)


def test_every_block_sees_one_state_at_its_own_level_after_a_past_of_ends(solved, monkeypatch):
    config, frozen, _ = solved
    config = dataclasses.replace(config, flow=dataclasses.replace(config.flow, past_noise=0.0))
    _, batch, seen = loss_of((config, frozen, solved[2]), monkeypatch, 0.0)
    sigmas = few_step_table(frozen.generator.sampler).sigmas
    block, steps = config.model.window.block_frames, set()
    for b in range(4):
        for first in range(0, config.data.frames, block):
            frames = slice(first, first + block)
            [step] = {int(np.flatnonzero(sigmas == s).item()) for s in np.asarray(seen["sigma"][b, frames])}
            np.testing.assert_array_equal(seen["noisy"][b, frames], batch["states"][b, frames, step])
            steps.add(step)
    assert len(steps) > 1
    np.testing.assert_array_equal(seen["past"], batch["states"][:, :, -1])
