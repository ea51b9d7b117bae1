"""Keys and values in 8 bits: half the memory, the same slots, errors that do not grow."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import cache as cache_lib
from longlive_jax import memory
from longlive_jax.config import PRESETS, WindowConfig
from longlive_jax.config_dict import override
from longlive_jax.inference import rollout
from longlive_jax.ops.windowed_attention import CachedContext, windowed_attention
from longlive_jax.quantize import numerics
from longlive_jax.quantize.numerics import Quantized
from tests.programs import compiled
from tests.quantize._models import CONFIG, begin, generator, random_params

KINDS = ("int8", "fp8")
NEAR = {"int8": 0.02, "fp8": 0.08}  # of the largest value of a token


@pytest.fixture(scope="module")
def params():
    return random_params()


def frames_written():
    """Keys and values of the 15 frames that `filled` writes."""
    shape, random = (CONFIG.num_layers, 2, 15, 4, CONFIG.num_heads, CONFIG.head_dim), np.random.default_rng(0)
    return cache_lib.BlockKV(*(jnp.asarray(random.standard_normal(shape, np.float32)) for _ in range(2)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def filled(storage, rope="absolute"):
    """A cache after five writes of three frames."""
    own = frames_written()
    cache = cache_lib.init(
        CONFIG, WindowConfig(9, 3, 3, rope), batch=2, frame_len=4, dtype=jnp.float32, storage=storage
    )
    for first in range(0, 15, 3):
        cache = cache_lib.write(cache, jax.tree.map(lambda x, f=first: x[:, :, f : f + 3], own), first)
    return cache


def assert_near(found, expected, kind):
    dense = found.dense(jnp.float32) if isinstance(found, Quantized) else found
    assert np.abs(dense - expected).max() < NEAR[kind] * np.abs(expected).max()


@pytest.mark.parametrize("kind", KINDS)
def test_the_caches_memory_halves(kind):
    """At full size, from shapes: bfloat16 keys and values against 8 bits and their scales."""
    config = PRESETS["wan_1_3b"]
    sizes = {}
    for storage in ("same", kind):
        sizes[storage] = memory.tree_bytes(
            jax.eval_shape(
                lambda storage=storage: cache_lib.init(
                    config.transformer,
                    config.window,
                    batch=1,
                    frame_len=1560,
                    dtype=jnp.bfloat16,
                    storage=storage,
                )
            )
        )
    assert 1.95 < sizes["same"] / sizes[kind] <= 2
    small = override(config, {"cache_dtype": kind})
    counters = sizes[kind] - memory.cache_bytes(small, "bfloat16", batch=1, frame_len=1560)
    assert 0 < counters <= 16


@pytest.mark.parametrize(("kind", "rope"), [("int8", "relative"), ("fp8", "absolute")])
def test_every_operation_does_to_8_bits_what_it_does_to_arrays(kind, rope):
    mask = np.asarray([True, False])
    operations = {
        "write": lambda cache: cache,
        "place_sink": lambda cache: cache_lib.place_sink(cache, cache.end + 3),
        "flush": lambda cache: cache_lib.flush(cache, mask, frames=2),
        "restart": lambda cache: cache_lib.restart(cache, 15),
        "grow": lambda cache: cache_lib.resize(cache, WindowConfig(12, 3, 3, rope)),
        "shrink": lambda cache: cache_lib.resize(cache, WindowConfig(8, 2, 3, rope)),
        "select": lambda cache: cache_lib.select(mask, cache, cache_lib.restart(cache, 15)),
    }

    @jax.jit
    def run(cache):
        return {name: operate(cache) for name, operate in operations.items()}, cache_lib.in_order(cache)

    (caches, frames), (plain, expected_frames) = run(filled(kind, rope)), run(filled("same", rope))
    for name, found in caches.items():
        expected = plain[name]
        assert isinstance(found.key, Quantized), name
        for counter in ("start", "ring_start", "end", "length"):
            np.testing.assert_array_equal(getattr(found, counter), getattr(expected, counter), err_msg=name)
        assert found.key.shape == expected.key.shape
        assert_near(found.key, expected.key, kind)
        assert_near(found.value, expected.value, kind)
        assert (found.sink_key is None) == (expected.sink_key is None)
    assert_near(frames.key, expected_frames.key, kind)
    assert_near(frames.value, expected_frames.value, kind)


def test_a_frame_in_the_cache_is_not_touched_again():
    """Sink and ring hold exactly what one rounding made of each frame, however many blocks later."""
    small = filled("int8")
    expected = jax.jit(lambda x: numerics.quantize_tokens(x, "int8", centred=True))(frames_written().key)
    where = jnp.asarray([0, 1, 2, 12, 13, 14])
    for found, made in zip(jax.tree.leaves(small.key), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(found, made[:, :, where])


@pytest.mark.parametrize("kind", KINDS)
def test_a_travelling_sink_is_turned_from_the_keys_as_they_were_written(kind):
    """Any number of moves gives the error of one."""
    small, place = filled(kind, "relative"), jax.jit(cache_lib.place_sink)
    pristine = jax.tree.map(np.asarray, small.sink_key)
    once = place(small, jnp.asarray([3000, 3000]))
    moved = small
    for end in (*range(15, 60, 3), 3000):
        moved = place(moved, jnp.asarray([end, end]))
    jax.tree.map(np.testing.assert_array_equal, moved.key, once.key)
    jax.tree.map(np.testing.assert_array_equal, moved.sink_key, pristine)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_over_8_bits_is_attention_over_what_they_stand_for(kind):
    whole = cache_lib.context(filled(kind))
    query = frames_written().key[0, :, :3].reshape(2, 12, CONFIG.num_heads, -1)
    context = jax.tree.map(lambda x: x[0], dataclasses.replace(whole, length=jnp.zeros((1, 2))))
    length = jnp.asarray([24, 12])
    tokens = [x.dense(jnp.float32).reshape(2, 24, CONFIG.num_heads, -1) for x in (context.key, context.value)]
    own_tokens = (query, query)
    attend = jax.jit(windowed_attention)
    found = attend(query, *own_tokens, context=CachedContext(context.key, context.value, length))
    expected = attend(query, *own_tokens, context=CachedContext(*tokens, length))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rope", "kinds"), [("absolute", KINDS), ("relative", ("int8",))])
def test_a_long_rollout_does_not_drift_because_of_the_cache(params, rope, kinds):
    """300 frames: the error against the unquantised rollout is as small in the end as in the beginning."""
    videos = {}
    for storage in ("same", *kinds):
        gen = generator(cache_dtype=storage, rope=rope)
        videos[storage] = np.asarray(rollout.rollout(gen, params, begin(gen, params), 100)[1])
    spread = np.abs(videos["same"]).mean()
    # The first block has no cache yet.
    np.testing.assert_allclose(videos["int8"][:, :3], videos["same"][:, :3], rtol=1e-4, atol=1e-5)
    for kind in kinds:
        bound = {"int8": 0.02, "fp8": 0.05}[kind]
        error = np.abs(videos[kind] - videos["same"]).mean((0, 2, 3, 4)) / spread  # [F]
        early, late = error[3:63].mean(), error[-60:].mean()
        assert 0 < early < bound, kind
        assert late < 1.5 * early, kind


@pytest.mark.parametrize("rope", ["absolute", "relative"])
def test_the_compiled_program_never_copies_the_cache_nor_makes_it_dense(params, rope):
    """Only the in-place writes make an array as large as the cache; a float one there is none."""
    gen = generator(cache_dtype="int8", rope=rope)
    state = begin(gen, params, batch=5)  # a number of elements that nothing else has
    size, made = state.cache.key.values.size, {}
    for line in compiled(rollout.step.lower(gen, params, state)).as_text().splitlines():
        found = re.match(r"\s*(?:ROOT )?%\S+ = (\w+)\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if found and np.prod([int(n) for n in found[2].split(",")]) == size:
            made.setdefault(found[3], []).append(line.strip())
            assert found[1] == "s8", line
    assert "scatter" in made  # the search sees what it is looking for
    assert not {"copy", "transpose", "concatenate", "gather", "select"} & set(made), made


def test_a_switch_works_over_an_8_bit_cache(params):
    """Recache and flush read and write the small form, and the rollout goes on near the plain one."""
    videos = {}
    text = np.random.default_rng(9).standard_normal((1, CONFIG.text_len, CONFIG.text_dim), np.float32)
    mask = np.ones(1, bool)
    for storage in ("same", "int8"):
        gen = generator(cache_dtype=storage)
        state, _ = rollout.rollout(gen, params, begin(gen, params), 5)
        state = rollout.recache(gen, params, state, text, mask, frames=9, keep_sink=True)
        state, first = rollout.step(gen, params, state)
        state = rollout.flush(gen, params, state, text, mask)
        _, second = rollout.step(gen, params, state)
        videos[storage] = np.concatenate([first, second], axis=1)
    error = np.abs(videos["int8"] - videos["same"]).mean() / np.abs(videos["same"]).mean()
    assert 0 < error < 0.02
