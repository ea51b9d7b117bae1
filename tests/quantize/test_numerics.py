"""8-bit numbers: how far they are from what they stand for, and the products made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.quantize import numerics

X = np.random.default_rng(0).standard_normal((4, 6, 64), np.float32) * np.logspace(-3, 3, 6)[:, None]


def test_int8_by_hand():
    values, scale = numerics.quantize(jnp.asarray([[0.5, -1.27, 0.014], [0, 0, 0]]), "int8", axis=-1)
    np.testing.assert_array_equal(values, [[50, -127, 1], [0, 0, 0]])
    assert scale[0, 0] == pytest.approx(0.01)
    assert np.isfinite(np.asarray(scale)).all()


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.5 / 127), ("fp8", 16 / 448)])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.bfloat16])
def test_every_value_is_within_half_a_step_of_its_row(kind, share, scale_dtype):
    """Rows that differ a million times in size are equally well kept: each has its own scale."""
    values, scale = numerics.quantize(jnp.asarray(X), kind, axis=-1, scale_dtype=scale_dtype)
    assert (values.dtype, scale.dtype) == (numerics.dtype_of(kind), scale_dtype)
    assert scale.shape == (4, 6, 1)
    found = np.asarray(values, np.float32) * np.asarray(scale, np.float32)
    # A scale that is rounded down clips the largest value by as much.
    share += 2**-8 if scale_dtype == jnp.bfloat16 else 1e-6
    assert (np.abs(found - X) <= share * np.abs(X).max(-1, keepdims=True)).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_product_of_8_bit_numbers_is_exact_but_for_their_rounding(kind):
    random = np.random.default_rng(1)
    x, kernel = random.standard_normal((2, 5, 32), np.float32), random.standard_normal((32, 8), np.float32)
    bias = random.standard_normal(8, np.float32)
    values, scale = numerics.quantize(jnp.asarray(kernel), kind, axis=0)
    dense = np.asarray(values, np.float32) * np.asarray(scale)
    x_values, x_scale = numerics.quantize(jnp.asarray(x), kind, axis=-1)
    rounded = np.asarray(x_values, np.float32) * np.asarray(x_scale)
    for inputs, quantizes_input in ((rounded, True), (x, False)):
        found = numerics.linear(
            jnp.asarray(x),
            values,
            scale,
            bias=jnp.asarray(bias),
            quantizes_input=quantizes_input,
            dtype=jnp.float32,
        )
        np.testing.assert_allclose(found, inputs @ dense + bias, rtol=1e-4, atol=1e-4)


def test_rotating_input_and_kernel_changes_only_the_rounding_and_that_for_the_better():
    """With a channel that is much larger than the others, as real activations have some."""
    random = np.random.default_rng(3)
    x, kernel = random.standard_normal((16, 192), np.float32), random.standard_normal((192, 8), np.float32)
    x[:, 7] *= 100
    turned = np.asarray(numerics.rotate(jnp.asarray(x), axis=-1))
    np.testing.assert_allclose(numerics.rotate(jnp.asarray(turned), axis=-1), x, rtol=1e-4, atol=1e-4)
    turned_kernel = numerics.rotate(jnp.asarray(kernel), axis=0)
    np.testing.assert_allclose(turned @ turned_kernel, x @ kernel, rtol=1e-3, atol=1e-2)
    errors = {}
    for rotates, stored in ((False, kernel), (True, turned_kernel)):
        values, scale = numerics.quantize(jnp.asarray(stored), "int8", axis=0)
        options = {"bias": None, "quantizes_input": True, "dtype": jnp.float32, "rotates": rotates}
        errors[rotates] = np.abs(
            numerics.linear(jnp.asarray(x), values, scale, **options) - x @ kernel
        ).mean()
    assert errors[True] < 0.5 * errors[False]


def test_scales_of_another_shape_are_refused():
    """As if one scale had been made for all layers: (in, 1) in place of (1, out)."""
    kernel = jnp.zeros((32, 8), jnp.int8)
    with pytest.raises(ValueError, match=r"scale \(32, 1\); expected \(1, 8\)"):
        numerics.linear(
            jnp.zeros((1, 32)), kernel, jnp.ones((32, 1)), bias=None, quantizes_input=True, dtype=jnp.float32
        )


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_tokens_round_trip_and_centring_helps_where_channels_are_off_zero(kind):
    """Keys as real models have them: a few channels far from zero in every token."""
    random = np.random.default_rng(2)
    keys = random.standard_normal((2, 3, 16, 4, 32), np.float32)
    keys[..., :2] += 30
    errors = {}
    for centred in (False, True):
        found = numerics.quantize_tokens(jnp.asarray(keys), kind, centred=centred)
        assert found.shape == keys.shape
        assert found.scale.shape == (2, 3, 16, 4, 1)
        assert (None if found.centre is None else found.centre.shape) == (
            (2, 3, 1, 4, 32) if centred else None
        )
        empty = numerics.empty_tokens(keys.shape, kind, centred=centred)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), empty) == jax.tree.map(
            lambda x: (x.shape, x.dtype), found
        )
        error = np.asarray(found.dense(jnp.float32)) - keys
        # What attention sees of an error: the part that differs between tokens.
        error = error - error.mean(2, keepdims=True)
        errors[centred] = float(np.sqrt((error[..., 2:] ** 2).mean()))
    assert errors[True] < (0.2 if kind == "int8" else 1.1) * errors[False]
