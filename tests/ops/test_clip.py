"""The training attention, one dense call per block, against one masked attention over the whole clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import WindowConfig
from longlive_jax.ops.windowed_attention import ClipContext, clip_attention

FRAMES, FRAME_LEN, HEADS, HEAD_DIM = 21, 4, 2, 8


def mask_of(window: WindowConfig) -> np.ndarray:
    """`[F, F]`, which frames each frame attends to, from the words of the paper: its own block, the sink, and
    the latest frames before the block that the window has room for."""
    mask = np.zeros((FRAMES, FRAMES), bool)
    for frame in range(FRAMES):
        start = frame // window.block_frames * window.block_frames
        room = window.window_frames - window.block_frames - window.sink_frames
        for other in range(start + window.block_frames):
            mask[frame, other] = other >= start or other < window.sink_frames or other >= start - room
    return mask


def masked(query, key, value, mask):
    """Softmax attention of `[B, F, P, N, H]` under a mask of frames."""
    query, key, value = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (query, key, value))
    logits = jnp.einsum("btnh,bknh->bntk", query, key) / np.sqrt(HEAD_DIM)
    tokens = np.repeat(np.repeat(mask, FRAME_LEN, 0), FRAME_LEN, 1)
    return jnp.einsum("bntk,bknh->btnh", jax.nn.softmax(jnp.where(tokens, logits, -jnp.inf)), value)


@pytest.mark.parametrize("window", [WindowConfig(12, 3, 3), WindowConfig(9, 0, 3), WindowConfig(6, 3, 3)])
def test_values_and_gradients(window):
    shape = (2, FRAMES, FRAME_LEN, HEADS, HEAD_DIM)
    arrays = [jax.random.normal(jax.random.key(i), shape) for i in range(3)]
    weights = jax.random.normal(jax.random.key(3), shape)

    def by_blocks(query, key, value):
        out = clip_attention(query, key, value, ClipContext(key, value, None, window))
        return jnp.sum(out * weights), out

    def at_once(query, key, value):
        out = masked(query, key, value, mask_of(window)).reshape(shape)
        return jnp.sum(out * weights), out

    (found, expected) = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True))(*arrays) for f in (by_blocks, at_once)
    )
    np.testing.assert_allclose(found[0][1], expected[0][1], atol=2e-6)
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
