"""One suite for every implementation of the attention: values, log-sum-exp and gradients.

The reference runs here; the others need a GPU (`make test-gpu`). What can be said of them without one is in
`test_lowering` and `test_interpreted`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.ops.windowed_attention import (
    CachedContext,
    windowed_attention,
    windowed_attention_lse,
)

ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cudnn", "pallas_mosaic_gpu")]
IMPLEMENTATIONS = ["reference", *ON_GPU]
WITH_LSE = ["reference", ON_GPU[1]]

# (batch, queries, own keys, cache, valid lengths, heads, head size)
TINY = [
    (1, 64, 1, 0, (0,), 1, 64),
    (1, 60, 1, 64, (1,), 1, 64),
    (2, 100, 70, 200, (130, 7), 2, 64),
    (2, 129, 128, 256, (0, 256), 3, 128),
    (1, 300, 65, 136, (129,), 2, 128),
]
BOUNDS = {jnp.bfloat16: 2e-2, jnp.float32: 5e-6}


def draw(seed, *shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def problem(shape, dtype):
    batch, queries, own, slots, lengths, heads, head_dim = shape
    query = draw(0, batch, queries, heads, head_dim, dtype=dtype)
    key, value = (draw(i, batch, own, heads, head_dim, dtype=dtype) for i in (1, 2))
    cached = [draw(i, batch, slots, heads, head_dim, dtype=dtype) for i in (3, 4)]
    return query, key, value, *cached, jnp.asarray(lengths, jnp.int32)


def attend(
    query, key, value, cached_key, cached_value, length, *, implementation, function=windowed_attention
):
    context = CachedContext(cached_key, cached_value, length) if cached_key.shape[1] else None
    return function(query, key, value, context=context, implementation=implementation)


def textbook(query, key, value, cached_key, cached_value, length):
    """Softmax attention and log-sum-exp in float64, over the literal key set of each sample."""
    outs, lses = [], []
    for b, valid in enumerate(np.asarray(length)):
        keys, values = (
            np.concatenate([np.asarray(c[b, :valid], np.float64), np.asarray(x[b], np.float64)])
            for c, x in ((cached_key, key), (cached_value, value))
        )
        logits = np.einsum("tnh,knh->ntk", np.asarray(query[b], np.float64), keys) / np.sqrt(query.shape[-1])
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        outs.append(np.einsum("ntk,knh->tnh", weights / total, values))
        lses.append((top + np.log(total))[..., 0])
    return np.stack(outs), np.stack(lses)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values(implementation, shape, dtype):
    if implementation != "reference" and dtype == jnp.float32:
        dtype = jnp.float16
    arguments = problem(shape, dtype)
    out = attend(*arguments, implementation=implementation)
    assert out.dtype == dtype
    expected = textbook(*arguments)[0]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=BOUNDS.get(dtype, 4e-3))


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("implementation", WITH_LSE)
def test_log_sum_exp(implementation, shape):
    arguments = problem(shape, jnp.bfloat16)
    out, lse = attend(*arguments, implementation=implementation, function=windowed_attention_lse)
    expected_out, expected = textbook(*arguments)
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected, atol=1e-3)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected_out, atol=2e-2)


@pytest.mark.parametrize("implementation", WITH_LSE)
def test_results_for_two_sets_of_keys_join_to_that_of_both(implementation):
    query, key, value, cached_key, cached_value, _ = problem((1, 100, 70, 128, (128,), 2, 64), jnp.bfloat16)
    parts = [
        windowed_attention_lse(query, k, v, implementation=implementation)
        for k, v in ((key, value), (cached_key, cached_value))
    ]
    share = jax.nn.softmax(jnp.stack([lse for _, lse in parts]), axis=0)
    joined = sum(s[..., None] * jnp.moveaxis(out, 2, 1) for s, (out, _) in zip(share, parts, strict=True))
    whole = attend(
        query, key, value, cached_key, cached_value, jnp.asarray([128]), implementation=implementation
    )
    np.testing.assert_allclose(jnp.moveaxis(joined, 1, 2), np.asarray(whole, np.float32), atol=2e-2)


@pytest.mark.parametrize("shape", TINY)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(implementation, shape):
    """Against autodiff of plain attention in float32; cached keys beyond the length get none."""
    query, key, value, cached_key, cached_value, length = problem(shape, jnp.bfloat16)
    arrays = (query, key, value, cached_key, cached_value)

    def loss(*arrays):
        return jnp.sum(jnp.sin(attend(*arrays, length, implementation=implementation).astype(jnp.float32)))

    def plain(query, key, value, cached_key, cached_value):
        keys, values = jnp.concatenate([key, cached_key], 1), jnp.concatenate([value, cached_value], 1)
        logits = jnp.einsum("btnh,bknh->bntk", query, keys) / np.sqrt(query.shape[-1])
        own = key.shape[1]
        is_valid = jnp.arange(keys.shape[1]) < own + length[:, None]
        logits = jnp.where(is_valid[:, None, None], logits, -jnp.inf)
        return jnp.sum(jnp.sin(jnp.einsum("bntk,bknh->btnh", jax.nn.softmax(logits), values)))

    found = jax.grad(loss, argnums=range(5))(*arrays)
    wide = [x.astype(jnp.float32) for x in arrays]
    expected = jax.grad(plain, argnums=range(5))(*wide)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), b, atol=2e-2 * max(1.0, float(jnp.abs(b).max(initial=0)))
        )
    for gradient in found[3:]:
        for sample, valid in zip(gradient, length, strict=True):
            assert not np.asarray(sample[valid:], np.float32).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_layer_of_a_stacked_cache(implementation):
    query, key, value, cached_key, cached_value, length = problem(
        (2, 64, 64, 128, (128, 70), 1, 64), jnp.bfloat16
    )
    stack = [jnp.stack([x * 0 + 5, x, x * 0 - 5]) for x in (cached_key, cached_value)]
    context = CachedContext(*stack, length, jnp.int32(1))
    found = windowed_attention(query, key, value, context=context, implementation=implementation)
    expected = attend(query, key, value, cached_key, cached_value, length, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 4680, 9360, 14040, 3001])
@pytest.mark.parametrize("implementation", ["cudnn", "pallas_mosaic_gpu"])
def test_values_at_the_shape_of_wan_1_3b(implementation, length):
    query, key, value, *cached, length = problem((1, 4680, 4680, 14040, (length,), 12, 128), jnp.bfloat16)
    found = attend(query, key, value, *cached, length, implementation=implementation)
    wide = [x.astype(jnp.float32) for x in (query, key, value, *cached)]
    with jax.default_matmul_precision("highest"):
        expected = attend(*wide, length, implementation="reference")
    error = jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert float(error) < 6e-3


@pytest.mark.gpu
def test_gradients_at_the_shape_of_wan_1_3b():
    query, key, value, *_ = problem((1, 4680, 18720, 0, (0,), 12, 128), jnp.bfloat16)

    def loss(query, key, value, implementation):
        out = windowed_attention(query, key, value, implementation=implementation)
        return jnp.sum(jnp.sin(8 * out.astype(jnp.float32)))

    ours, cudnn = (
        jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)(query, key, value, name)
        for name in ("pallas_mosaic_gpu", "cudnn")
    )
    for a, b in zip(ours, cudnn, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) / np.linalg.norm(b) < 2e-2


@pytest.mark.parametrize("implementation", ["cudnn", "pallas_mosaic_gpu"])
def test_an_implementation_that_cannot_run_is_refused(implementation):
    query = draw(0, 1, 4, 2, 64, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match=f"attention='{implementation}' cannot run here .*; use 'reference'"):
        windowed_attention(query, query, query, implementation=implementation)


def test_cudnn_gives_no_log_sum_exp():
    query = draw(0, 1, 4, 2, 64, dtype=jnp.bfloat16)
    with pytest.raises(UserError, match="gives no log-sum-exp"):
        windowed_attention_lse(query, query, query, implementation="cudnn")
