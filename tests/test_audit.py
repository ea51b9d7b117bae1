"""What the audit of compiled programs finds, and what it finds in the block step of wan_1_3b."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.audit import audit
from longlive_jax.config import WAN_1_3B, SamplerConfig, WindowConfig
from longlive_jax.inference import rollout
from longlive_jax.models.transformer import Transformer, init_params

S = jax.ShapeDtypeStruct
CACHE = S((4, 64, 32), jnp.float32)


def audited(function, *arguments, **options):
    program = jax.jit(function, **options).lower(*arguments).compile()
    return audit(program, large=CACHE.size)


def update(cache, new):
    return jax.lax.dynamic_update_slice(cache, new[None], (1, 0, 0)), jnp.sum(new)


def test_a_write_in_place_is_no_copy():
    found = audited(update, CACHE, S((64, 32), jnp.float32), donate_argnums=0)
    assert found.copies == ()
    assert found.host_transfers == ()


def test_without_donation_the_copy_is_seen():
    found = audited(update, CACHE, S((64, 32), jnp.float32))
    assert [x.op for x in found.copies] == ["copy"]
    assert found.copies[0].size == 4 * CACHE.size


def test_a_copy_behind_a_fusion_is_seen():
    found = audited(lambda cache: cache[:, ::-1], CACHE)
    assert [x.op for x in found.copies] == ["reverse"]


def test_a_callback_is_a_host_transfer():
    def call(cache):
        shape = S((), jnp.float32)
        return jax.pure_callback(lambda x: np.float32(x.sum()), shape, cache)

    assert len(audited(call, CACHE).host_transfers) >= 1


@pytest.fixture(scope="module", params=["absolute", "relative"])
def block_step(request):
    """The step at 832x480, compiled for this machine, with nothing allocated."""
    model = Transformer(WAN_1_3B, dtype=jnp.float32)  # a CPU computes bfloat16 in float32, by copies
    generator = rollout.Generator(model, WindowConfig(rope=request.param), SamplerConfig())
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    text, seeds = S((1, 512, 4096), jnp.float32), S((1,), jnp.uint32)
    state = jax.eval_shape(
        lambda p, t, s: generator.init(p, t, s, latent_size=(60, 104)), params, text, seeds
    )
    return audit(rollout.step.lower(generator, params, state).compile(), large=state.cache.key.size)


BUDGET = 3 << 30
"""Bytes of temporaries in float32: the new keys and values of a block for all layers, 0.8 GiB each, and what
one layer works with."""


def test_the_block_step_neither_copies_its_cache_nor_talks_to_the_host(block_step):
    assert block_step.copies == (), str(block_step)
    assert block_step.host_transfers == ()


def test_the_block_step_stays_within_its_budget(block_step):
    assert block_step.temporary_bytes < BUDGET, str(block_step)
