"""One video over several devices is the video of one device, and its cache stays where it is."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import sharding
from longlive_jax.audit import audit
from longlive_jax.config import WAN_1_3B, SamplerConfig, WindowConfig, preset
from longlive_jax.errors import UserError
from longlive_jax.inference import parallel, rollout
from longlive_jax.models.transformer import Transformer, init_params
from longlive_jax.ops.windowed_attention.spread import Spread

CONFIG = dataclasses.replace(preset("tiny").transformer, dim=96, num_heads=12, num_layers=3, ffn_dim=64)
SIZE = (8, 8)  # 16 tokens
ROUNDING = {"rtol": 1e-4, "atol": 5e-5}


@functools.cache
def weights():
    return jax.jit(functools.partial(init_params, Transformer(CONFIG)))(jax.random.key(0))


def generator(rope="absolute", cache_dtype="same"):
    model = Transformer(CONFIG, rope_jitter=0.8 if rope == "jittered" else 0.0)
    sampler = SamplerConfig(steps=(1000, 500))
    return rollout.Generator(model, WindowConfig(9, 3, 3, rope), sampler, cache_dtype=cache_dtype)


def spread(plain, devices):
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    return parallel.SpreadGenerator(**fields, devices=parallel.available(devices))


def begin(gen, batch, params=None, size=SIZE):
    text, seeds = (
        jax.random.normal(jax.random.key(1), (batch, CONFIG.text_len, CONFIG.text_dim)),
        np.arange(batch, dtype=np.uint32),
    )
    return rollout.init(gen, weights() if params is None else params, text, seeds, latent_size=size)


def play(gen, batch, blocks=4, *, devices=None):
    """Enough blocks for the ring to turn over, the last one after whatever the schedule holds."""
    params = weights() if devices is None else parallel.replicate(weights(), devices)
    state, latents = begin(gen, batch, params), []
    for _ in range(blocks):
        state, block = rollout.step(gen, params, state)
        latents.append(np.asarray(block))
    return state, np.concatenate(latents, axis=1)


@functools.cache
def expected(rope, batch):
    return play(generator(rope), batch)[1]


@pytest.mark.parametrize(
    ("devices", "batch", "rope", "layout"),
    [
        (2, 1, "absolute", (1, 1, 2)),
        (4, 1, "absolute", (1, 1, 4)),
        (8, 1, "absolute", (1, 2, 4)),  # 8 does not divide 12 heads
        (8, 1, "jittered", (1, 8, 1)),  # heads that differ stay together
        (8, 2, "absolute", (2, 1, 4)),
    ],
)
def test_several_devices_make_the_video_of_one(devices, batch, rope, layout):
    gen = spread(generator(rope), devices)
    state, latents = play(gen, batch, devices=gen.devices)
    found = gen.layout(state)
    assert (found.batch, found.spread.tokens, found.spread.heads) == layout
    np.testing.assert_allclose(latents, expected(rope, batch), **ROUNDING)
    # Each device holds its part of the cache and no more.
    for held in (state.cache.key, state.cache.value):
        assert len(held.addressable_shards) == devices
        assert {s.data.size for s in held.addressable_shards} == {held.size // devices}


def test_prompt_switches_do_the_same_on_eight_devices():
    text, mask = jax.random.normal(jax.random.key(7), (1, CONFIG.text_len, CONFIG.text_dim)), np.ones(1, bool)

    def switched(gen, params):
        state, latents = begin(gen, 1, params), []
        for policy in (None, None, None, rollout.recache, rollout.cut):
            options = {"frames": 9, "keep_sink": True} if policy is rollout.recache else {}
            if policy is not None:
                state = policy(gen, params, state, text, mask, **options)
            state, block = rollout.step(gen, params, state)
            latents.append(np.asarray(block))
        return np.concatenate(latents, axis=1)

    gen = spread(generator("relative"), 8)
    params = parallel.replicate(weights(), gen.devices)
    np.testing.assert_allclose(switched(gen, params), switched(generator("relative"), weights()), **ROUNDING)


@pytest.mark.parametrize("policy", ["keep", "clear", "flush"])
def test_what_else_a_switch_does_leaves_every_part_of_the_state_where_it_was(policy):
    gen = spread(generator("relative"), 8)
    state = jax.eval_shape(functools.partial(begin, gen, 2), weights())
    arguments = (jnp.zeros((2, CONFIG.text_len, CONFIG.text_dim)), jnp.ones(2, bool))
    after = jax.eval_shape(functools.partial(getattr(rollout, policy), gen), weights(), state, *arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_an_8_bit_cache_is_split_by_heads_and_never_by_tokens():
    plain = generator(cache_dtype="int8")
    gen = spread(plain, 4)
    np.testing.assert_allclose(play(gen, 1, devices=gen.devices)[1], play(plain, 1)[1], rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match="cache_dtype='int8': devices=8 splits the tokens"):
        begin(spread(plain, 8), 1)


def test_another_window_keeps_the_split_of_the_cache():
    wide = dataclasses.replace(generator(), window=WindowConfig(12, 3, 3))
    results = []
    for gen, larger, devices in (
        (generator(), wide, None),
        (spread(generator(), 8), spread(wide, 8), parallel.available(8)),
    ):
        state, _ = play(gen, 1, 2, devices=devices)
        state = rollout.resize(larger, state)
        params = weights() if devices is None else parallel.replicate(weights(), devices)
        results.append(np.asarray(rollout.step(larger, params, state)[1]))
    np.testing.assert_allclose(results[1], results[0], **ROUNDING)


def test_each_part_of_the_cache_is_updated_in_place():
    gen = spread(generator(), 4)
    params = parallel.replicate(weights(), gen.devices)
    state, _ = rollout.step(gen, params, begin(gen, 1, params))
    before = state.cache.key
    addresses = [s.data.unsafe_buffer_pointer() for s in before.addressable_shards]
    state, _ = rollout.step(gen, params, state)
    assert before.is_deleted()
    assert [s.data.unsafe_buffer_pointer() for s in state.cache.key.addressable_shards] == addresses


def test_the_released_size_on_eight_devices_neither_copies_nor_gathers_the_cache():
    """The program of one device at 832x480, compiled with nothing allocated."""
    gen = spread(rollout.Generator(Transformer(WAN_1_3B), WindowConfig(), SamplerConfig()), 8)
    params = jax.eval_shape(functools.partial(init_params, gen.transformer), jax.random.key(0))
    text, seeds = jax.ShapeDtypeStruct((1, 512, 4096), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.uint32)
    state = jax.eval_shape(functools.partial(gen.init, latent_size=(60, 104)), params, text, seeds)
    mesh = gen.layout(state).mesh(gen.devices)

    def at(tree, places):
        return jax.tree.map(lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p), tree, places)

    whole = jax.tree.map(lambda _: sharding.replicated(mesh), params)
    state = at(state, sharding.shardings(state, mesh, parallel.RULES))
    program = rollout.step.lower(gen, at(params, whole), state).compile()
    found = audit(program, large=state.cache.key.size // 8)  # what a device holds of it
    assert found.copies == (), str(found)
    assert found.host_transfers == ()
    assert {x.op for x in found.collectives} == {"all-gather", "all-to-all"}
    # The largest exchange is the queries of one block and layer, those of a device's heads.
    assert max(x.elements for x in found.collectives) == 3 * 1560 * 3 * 128


@pytest.mark.parametrize(
    ("devices", "batch", "rope"), [(8, 1, "absolute"), (8, 1, "jittered"), (4, 2, "absolute")]
)
def test_the_traffic_is_what_the_program_exchanges(devices, batch, rope):
    """Against the operands of the collectives in the traced program, times the loops around them."""
    gen = spread(generator(rope), devices)
    state = jax.eval_shape(functools.partial(begin, gen, batch), weights())
    layout = gen.layout(state)
    traced = jax.make_jaxpr(functools.partial(one_step, gen))(weights(), state)
    config = dataclasses.replace(
        preset("tiny"),
        transformer=CONFIG,
        window=gen.window,
        sampler=gen.sampler,
        dtype="float32",
    )
    told = parallel.traffic(config, layout, batch=batch, latent_size=SIZE)
    velocity = (layout.spread.devices - 1) * batch // layout.batch * 3 * 16 // layout.spread.devices
    # Before compilation the clean pass still gathers a velocity that nobody reads.
    assert received(traced.jaxpr, layout) == told + velocity * CONFIG.patch_dim * 4


def one_step(gen, params, state):
    return gen.step(params, state)


def received(jaxpr, layout, times=1):
    """Bytes that one device receives in a traced program."""
    sizes = {"tokens": layout.spread.tokens, "heads": layout.spread.heads}
    total = 0
    for eqn in jaxpr.eqns:
        names = eqn.params.get("axis_name", ())
        group = math.prod(sizes[name] for name in (names if isinstance(names, tuple) else (names,)))
        held = sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.invars if hasattr(v, "aval"))
        if eqn.primitive.name == "all_gather":
            total += times * held * (group - 1)
        elif eqn.primitive.name == "all_to_all":
            total += times * held * (group - 1) // group
        else:
            loops = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += received(inner, layout, loops)
    return total


def test_devices_go_to_the_batch_first_then_to_heads_then_to_tokens():
    choose = functools.partial(parallel.choose_layout, frame_len=1560)
    assert choose(8, batch=1, heads=12) == parallel.Layout(1, Spread(2, 4))
    assert choose(8, batch=1, heads=40) == parallel.Layout(1, Spread(1, 8))
    assert choose(8, batch=4, heads=12) == parallel.Layout(4, Spread(1, 2))
    assert choose(8, batch=16, heads=12) == parallel.Layout(8, Spread(1, 1))
    with pytest.raises(UserError, match="devices=7: the 1560 tokens of a frame cannot be split 7 ways"):
        choose(7, batch=1, heads=12)
    with pytest.raises(UserError, match="devices=99: this process has"):
        parallel.available(99)


def test_a_batch_of_its_own_on_each_device_exchanges_nothing():
    gen = spread(generator(), 2)
    params = parallel.replicate(weights(), gen.devices)
    program = rollout.step.lower(gen, params, begin(gen, 2, params)).compile()
    assert audit(program, large=1 << 20).collectives == ()
