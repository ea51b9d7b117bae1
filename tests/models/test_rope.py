"""The rotation against complex multiplication, its gradient against the transposed rotation."""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.models import rope


def test_rotation_and_its_gradient_are_complex_products():
    table = rope.table(jnp.array([5, 131], jnp.int32), 2, 3, 16)
    x, seen = (
        np.asarray(jax.random.normal(jax.random.key(i), (1, 2, 6, 4, 16)), np.float64) for i in range(2)
    )
    turn = (np.asarray(table.cos) + 1j * np.asarray(table.sin))[..., None, :]

    def turned(values: np.ndarray, by: np.ndarray) -> np.ndarray:
        product = (values[..., 0::2] + 1j * values[..., 1::2]) * by
        return np.stack([product.real, product.imag], axis=-1).reshape(values.shape)

    result, pull = jax.vjp(lambda x: rope.rotate(x, table), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(result, turned(x, turn), atol=1e-5)
    np.testing.assert_allclose(pull(jnp.asarray(seen, jnp.float32))[0], turned(seen, turn.conj()), atol=1e-5)
