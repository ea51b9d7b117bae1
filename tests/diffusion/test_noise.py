"""Noise depends on (seed, frame, step) and on nothing else, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longlive_jax.diffusion.noise import frame_noise, seed_array
from longlive_jax.errors import UserError

SHAPE = (4, 6, 16)
draw = jax.jit(frame_noise, static_argnums=3)


def test_neither_batch_nor_block_size_changes_a_bit():
    together = draw(jnp.asarray([3, 7, 11], jnp.uint32), jnp.arange(6), 2, SHAPE)
    for row, seed in enumerate((3, 7, 11)):
        for frame in range(6):
            alone = draw(jnp.asarray([seed], jnp.uint32), jnp.asarray([frame]), 2, SHAPE)
            np.testing.assert_array_equal(alone[0, 0], together[row, frame])


def test_the_number_of_devices_changes_no_bit():
    seeds = np.arange(8, dtype=np.uint32)
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",))
    spread = jax.device_put(seeds, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(draw(spread, jnp.arange(3), 1, SHAPE), draw(seeds, jnp.arange(3), 1, SHAPE))


def test_seed_frame_and_step_all_matter_and_the_law_is_normal():
    seeds = jnp.asarray([0, 1], jnp.uint32)
    steps = jnp.stack([draw(seeds, jnp.arange(8), step, (16, 16, 4)) for step in range(4)])
    flat = np.asarray(steps).reshape(4 * 2 * 8, -1)
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert abs(flat.mean()) < 0.01
    assert abs(flat.std() - 1) < 0.01
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.2


def test_seeds():
    np.testing.assert_array_equal(seed_array(5, 3), [5, 6, 7])
    np.testing.assert_array_equal(seed_array([9, 2], 2), [9, 2])
    with pytest.raises(UserError, match="3 seeds for 2"):
        seed_array([1, 2, 3], 2)
    with pytest.raises(UserError, match="seed=-1"):
        seed_array(-1, 1)
    with pytest.raises(UserError, match="seed=4294967296"):
        seed_array(2**32 - 1, 2)
