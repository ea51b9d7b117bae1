"""The umT5 text encoder: token ids to one embedding per token.

Pre-norm transformer encoder without biases, without attention scaling and with one table of
relative-position biases per layer (source: umT5, arXiv 2304.09151; Wan2.1 `wan/modules/t5.py`).

Precision. The release keeps weights, residual stream, normalised activations and attention logits
in one dtype: bfloat16 in inference (the whole pipeline is cast), float32 weights when training
starts from the same file. Here `param_dtype` is what is stored and `dtype` is what the residual
stream and the matrix products use; norm statistics and softmax are float32 in both. With bfloat16
we differ on purpose in one place: logits and position biases are summed in float32 before the
softmax, where the release rounds the logits, the biases and their sum to bfloat16. With float32
there is no difference.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import TextEncoderConfig
from longlive_jax.models.layers import RMSNorm, gelu_tanh
from longlive_jax.types import Array, ArrayLike, Params, PRNGKey


def relative_position_buckets(distance: np.ndarray, *, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each signed distance `key - query`: exact when near, logarithmic when far.

    Half of the buckets serve each direction. Within one, the first half are single distances and
    the rest grow geometrically up to `max_distance`, beyond which everything shares the last one.

    Args:
      distance: integers of any shape.
      num_buckets: a multiple of 4.
      max_distance: greater than `num_buckets // 4`.

    Returns:
      int32 of the same shape in [0, num_buckets).
    """
    per_side = num_buckets // 2
    exact = per_side // 2
    size = np.abs(distance)
    growth = np.log(np.maximum(size, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (growth * (per_side - exact)).astype(np.int64), per_side - 1)
    return (np.where(distance > 0, per_side, 0) + np.where(size < exact, size, far)).astype(np.int32)


class TextAttention(nn.Module):
    """Self-attention with an additive relative-position bias and no 1/sqrt(H)."""

    config: TextEncoderConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, buckets: np.ndarray, key_mask: Array | None) -> Array:
        """Attends within each prompt.

        Args:
          x: `[B, M, D]`.
          buckets: int32 `[M, M]`, query by key.
          key_mask: bool `[B, M]`, False for keys nobody may attend to; None attends to all.

        Returns:
          `[B, M, D]` in `dtype`.
        """
        c = self.config
        # Standard deviations of the T5 family: with these, unscaled logits start at order one.
        project = functools.partial(self._dense, width=c.attn_dim, fan=c.dim)
        q = _split_heads(project(fan=c.dim * c.head_dim, name="q")(x), c.num_heads)  # [B, M, N, H]
        k = _split_heads(project(name="k")(x), c.num_heads)
        v = _split_heads(project(name="v")(x), c.num_heads)
        table = self.param(
            "position", nn.initializers.normal(c.dim**-0.5), (c.num_buckets, c.num_heads), self.param_dtype
        )
        logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32)
        logits += table.astype(jnp.float32).T[:, buckets]  # [N, M, M]
        if key_mask is not None:
            logits = jnp.where(key_mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        out = jnp.einsum("bnqk,bknh->bqnh", weights, v)
        out = out.reshape(*x.shape[:2], c.attn_dim)  # [B, M, N * H]
        return self._dense(width=c.dim, fan=c.attn_dim, name="o")(out)

    def _dense(self, *, width: int, fan: int, name: str) -> nn.Dense:
        return _dense(width, fan=fan, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class TextFeedForward(nn.Module):
    """Gated feed-forward layer: fc2(fc1(x) * gelu(gate(x))), GELU in its tanh form."""

    config: TextEncoderConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[B, M, D]` to `[B, M, D]`."""
        c = self.config
        dense = functools.partial(_dense, dtype=self.dtype, param_dtype=self.param_dtype)
        gate = gelu_tanh(dense(c.ffn_dim, fan=c.dim, name="gate")(x))
        hidden = dense(c.ffn_dim, fan=c.dim, name="fc1")(x) * gate
        return dense(c.dim, fan=c.ffn_dim, name="fc2")(hidden)


class TextBlock(nn.Module):
    """One encoder layer; its signature is that of a scan body (carry in, carry and nothing out)."""

    config: TextEncoderConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, buckets: np.ndarray, key_mask: Array | None) -> tuple[Array, None]:
        c, dtype, param_dtype = self.config, self.dtype, self.param_dtype
        norm = functools.partial(RMSNorm, eps=c.eps, dtype=dtype, param_dtype=param_dtype)
        attention = TextAttention(c, dtype=dtype, param_dtype=param_dtype, name="attn")
        feed_forward = TextFeedForward(c, dtype=dtype, param_dtype=param_dtype, name="ffn")
        x = x + attention(norm(name="norm1")(x), buckets, key_mask)
        x = x + feed_forward(norm(name="norm2")(x))
        return x, None


class TextEncoder(nn.Module):
    """The encoder. Parameters of all layers are stacked: leaves `[L, ...]` under `blocks/`.

    Attributes:
      config: the shape.
      dtype: dtype of activations and matrix products, and of the output.
      param_dtype: dtype parameters are created in; given parameters are used in theirs.
    """

    config: TextEncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: ArrayLike, lengths: ArrayLike | None = None) -> Array:
        """Embeds tokens; rows at and beyond a prompt's length are meaningless (see `embed`).

        Args:
          ids: int32 `[B, M]` in [0, vocab_size); a larger id makes its prompt NaN.
          lengths: int32 `[B]`, tokens of each prompt; later ones are not attended to. None attends
            to every token.

        Returns:
          `[B, M, D]` in `dtype`.
        """
        c = self.config
        table = self.param(
            "token_embedding", nn.initializers.normal(1.0), (c.vocab_size, c.dim), self.param_dtype
        )
        # Look up first, convert after: converting 256384 rows to use 512 would be 4 GB of float32.
        x = jnp.take(table, jnp.asarray(ids), axis=0).astype(self.dtype)  # [B, M, D]
        key_mask = None if lengths is None else token_mask(lengths, ids.shape[1])
        position = np.arange(ids.shape[1])
        buckets = relative_position_buckets(
            position[None, :] - position[:, None], num_buckets=c.num_buckets, max_distance=c.max_distance
        )  # [M, M], the same for all layers; only the values they select differ
        blocks = nn.scan(
            TextBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )(c, dtype=self.dtype, param_dtype=self.param_dtype, name="blocks")
        x, _ = blocks(x, buckets, key_mask)
        return RMSNorm(eps=c.eps, dtype=self.dtype, param_dtype=self.param_dtype, name="norm")(x)


def init_params(module: TextEncoder, key: PRNGKey) -> Params:
    """Random parameters of `module` (T5's initial scales), in its `param_dtype`.

    Args:
      module: the encoder.
      key: a random key.
    """
    return module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]  # shapes do not depend on M


def token_mask(lengths: ArrayLike, text_len: int) -> Array:
    """True for the tokens of each prompt: int `[B]` to bool `[B, M]`."""
    return jnp.arange(text_len) < jnp.asarray(lengths)[:, None]


def zero_padding(embeddings: ArrayLike, lengths: ArrayLike) -> Array:
    """Replaces the rows at and beyond each prompt's length by exact zeros, whatever they held.

    Args:
      embeddings: `[B, M, D]`.
      lengths: int `[B]`.
    """
    mask = token_mask(lengths, embeddings.shape[1])[:, :, None]
    return jnp.where(mask, embeddings, jnp.zeros((), embeddings.dtype))


def embed(module: TextEncoder, params: Params, *, ids: ArrayLike, lengths: ArrayLike) -> Array:
    """Prompt embeddings as the transformer wants them: padding is zero.

    Source: `WanTextEncoder.forward` of the release.

    Args:
      module: the encoder.
      params: its parameters.
      ids: int32 `[B, M]`.
      lengths: int32 `[B]`, in [1, M].

    Returns:
      `[B, M, D]` in `module.dtype`, zeros from row `lengths` on.
    """
    raw: Array = module.apply({"params": params}, ids, lengths)  # type: ignore[assignment]
    return zero_padding(raw, lengths)


def _split_heads(x: Array, num_heads: int) -> Array:
    return x.reshape(*x.shape[:2], num_heads, -1)  # [B, M, N, H]


def _dense(width: int, *, fan: int, dtype: jnp.dtype, param_dtype: jnp.dtype, name: str) -> nn.Dense:
    """A bias-free linear layer whose initial weights have variance 1 / `fan`."""
    return nn.Dense(
        width,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=nn.initializers.normal(fan**-0.5),
        name=name,
    )
