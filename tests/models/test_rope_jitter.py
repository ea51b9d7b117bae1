"""Per-head jitter of the temporal rotary bases: off it is nothing, on it keeps what rotations must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import preset
from longlive_jax.config_dict import override
from longlive_jax.inference import parts
from longlive_jax.models import rope, transformer

HEADS, HEAD_DIM = 12, 128
JITTER = rope.JITTER


def angles_of(position, jitter=JITTER):
    return np.asarray(
        rope.jittered_frame_angles(jnp.int32(position), HEAD_DIM, heads=HEADS, jitter=jitter), np.float64
    )


def test_without_spread_every_head_is_the_plain_one():
    plain = np.asarray(rope.frame_angles(jnp.int32(201), HEAD_DIM))
    np.testing.assert_array_equal(angles_of(201, jitter=0.0), np.broadcast_to(plain, (HEADS, 22)))


def test_angles_are_exact_far_out():
    """Against float64 powers, at a distance where float32 products are off by whole turns."""
    spread = np.random.Generator(np.random.Philox(2601_16914)).uniform(-1, 1, HEADS)
    bases = 10_000 * (1 + JITTER * spread)
    frequencies = bases[:, None] ** (-np.arange(22) / 22)
    for position in (1, 1050, 100_000):
        error = np.exp(1j * angles_of(position)) - np.exp(1j * position * frequencies)
        assert np.abs(error).max() < 1e-5
    assert len(np.unique(bases)) == HEADS


def test_only_time_differs_between_heads():
    table = rope.table(jnp.arange(3), 2, 3, HEAD_DIM, heads=HEADS, jitter=JITTER)
    plain = rope.table(jnp.arange(3), 2, 3, HEAD_DIM)
    assert table.cos.shape == (1, 3, 6, HEADS, HEAD_DIM // 2)
    for head in range(HEADS):
        np.testing.assert_array_equal(table.cos[..., head, 22:], plain.cos[..., 22:])
        assert not np.allclose(table.cos[0, 1:, :, head, 1:22], plain.cos[0, 1:, :, 1:22])


def test_attention_depends_on_distances_alone_and_shifts_compose():
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.normal(size=(1, 1, 4, HEADS, HEAD_DIM)), jnp.float32) for _ in range(2))

    def turned(x, at):
        table = rope.table(jnp.asarray([at]), 2, 2, HEAD_DIM, heads=HEADS, jitter=JITTER)
        return rope.rotate(x, table)

    near = (turned(query, 5) * turned(key, 2)).sum(-1)
    far = (turned(query, 905) * turned(key, 902)).sum(-1)
    np.testing.assert_allclose(near, far, atol=2e-3)
    moved = rope.shift_frames(turned(key, 2)[None], jnp.asarray([40]), jitter=JITTER)[0]
    np.testing.assert_allclose(moved, turned(key, 42), atol=1e-4)


def test_the_heads_no_longer_agree_about_distances():
    """How near each head comes to its phases at distance 0, by distance: alike in all without jitter."""
    distances = jnp.arange(100, 400)
    angles = rope.jittered_frame_angles(distances, HEAD_DIM, heads=HEADS, jitter=JITTER)  # [D, N, K]
    returns = np.abs(np.exp(1j * np.asarray(angles, np.float64)).mean(2))  # [D, N]
    agreement = np.corrcoef(returns.T)
    assert agreement[~np.eye(HEADS, dtype=bool)].mean() < 0.4


def test_the_setting_reaches_the_model_and_nothing_else():
    config = preset("toy")
    assert parts.transformer_of(config).rope_jitter == 0
    jittered = override(config, {"window.rope": "jittered"})
    module = parts.transformer_of(jittered)
    assert module.rope_jitter == JITTER
    assert dataclasses.replace(module, rope_jitter=0.0) == parts.transformer_of(config)


@pytest.mark.parametrize("jitter", [0.0, JITTER])
def test_the_first_frame_is_untouched_and_later_ones_are_not(jitter):
    config = preset("tiny").transformer
    plain, module = (transformer.Transformer(config, rope_jitter=j) for j in (0.0, jitter))
    params = transformer.init_params(plain, jax.random.key(0))
    latents = jax.random.normal(jax.random.key(1), (1, 2, 2, 2, 16))
    text = jnp.zeros((1, config.text_len, config.text_dim))
    run = [
        m.apply({"params": params}, latents, jnp.full((1, 1), 500.0), text, method="create")
        for m in (plain, module)
    ]
    alone = [
        m.apply({"params": params}, latents[:, :1], jnp.full((1, 1), 500.0), text, method="create")
        for m in (plain, module)
    ]
    np.testing.assert_array_equal(alone[0], alone[1])  # frame 0 is turned by nothing
    assert (np.abs(run[0] - run[1]).max() > 1e-6) == bool(jitter)
