"""The attention op against textbook softmax attention over a literal key set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.ops.windowed_attention import CachedContext, reference, windowed_attention


def textbook(query, key, value):
    """Softmax attention in float64, `[T, N, H]` to `[T, N, H]`."""
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    logits = np.einsum("tnh,knh->ntk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("ntk,knh->tnh", weights, value)


def random(shape, seed, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("length", [0, 1, 7, 24])
def test_attends_to_its_own_keys_and_the_valid_prefix(length, dtype, bound):
    query, key, value = (random((2, 10, 3, 16), i, dtype) for i in range(3))
    cached = [random((2, 24, 3, 16), i, dtype) for i in (3, 4)]
    lengths = jnp.asarray([length, 5])
    out = windowed_attention(query, key, value, context=CachedContext(*cached, lengths))
    assert out.dtype == dtype
    for b, n in enumerate(lengths):
        keys = np.concatenate([cached[0][b, :n], key[b]])
        values = np.concatenate([cached[1][b, :n], value[b]])
        np.testing.assert_allclose(
            np.asarray(out[b], np.float32), textbook(query[b], keys, values), atol=bound
        )


def test_what_lies_beyond_the_length_has_no_effect():
    query, key, value = (random((1, 4, 2, 8), i) for i in range(3))
    cached = random((1, 6, 2, 8), 5)
    spoiled = cached.at[:, 3:].set(1e9)
    clean = windowed_attention(query, key, value, context=CachedContext(cached, cached, jnp.asarray([3])))
    again = windowed_attention(query, key, value, context=CachedContext(spoiled, spoiled, jnp.asarray([3])))
    np.testing.assert_array_equal(clean, again)


@pytest.mark.parametrize(
    "budget", [1, 2 * 22 * 5, 2 * 22 * 13, 2 * 22 * 13 * 2]
)  # by query, by head, in pairs
@pytest.mark.parametrize("with_context", [False, True])
def test_pieces_change_neither_values_nor_gradients(monkeypatch, with_context, budget):
    query, key, value = (random((2, 13, 4, 8), i) for i in range(3))
    cached = random((2, 9, 4, 8), 7)

    def loss(query, key, value, cached):
        extra = {}
        if with_context:
            extra = {"cached_key": cached, "cached_value": 2 * cached, "cached_len": jnp.asarray([9, 4])}
        return jnp.sum(jnp.sin(reference.attend(query, key, value, **extra)))

    measure = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    whole = measure(query, key, value, cached)
    monkeypatch.setattr(reference, "CPU_LOGITS", budget)
    jax.clear_caches()
    pieces = measure(query, key, value, cached)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), whole, pieces)


def test_cudnn_is_refused_where_it_cannot_run():
    query = random((1, 4, 2, 8), 0, jnp.bfloat16)
    with pytest.raises(UserError, match="attention='cudnn' cannot run here"):
        windowed_attention(query, query, query, implementation="cudnn")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [0, 4680, 9360, 14040, 3001])
def test_cudnn_agrees_with_the_reference_at_full_shape(length):
    query, key, value = (random((1, 4680, 12, 128), i, jnp.bfloat16) for i in range(3))
    cached = [random((1, 14040, 12, 128), i, jnp.bfloat16) for i in (3, 4)]
    context = CachedContext(*cached, jnp.asarray([length]))
    ours, expected = (
        windowed_attention(query, key, value, context=context, implementation=name)
        for name in ("cudnn", "reference")
    )
    np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(expected, np.float32), atol=2e-2)
