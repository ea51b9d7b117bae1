"""The Wan diffusion transformer: bidirectional and causal are the same weights and the same code.

What makes a call causal is an argument: `context`, the keys and values of earlier blocks. Without
it the frames of the call attend to each other and to nothing else, which is the bidirectional model
(teacher, critic) and equally the first block of a video. A `ClipContext` makes all blocks of a clip
run in one pass, each with its own part of the context: the graded pass of training.

The layers are scanned (stacked parameters), so compile time does not grow with depth. The context
is read-only; a call returns the keys and values of its own frames, and whoever holds the cache
decides whether to write them.

Source: Wan2.1 `wan/modules/model.py`, LongLive `wan/modules/causal_model.py` (release v1.0).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from longlive_jax.cache import BlockKV
from longlive_jax.config import AttentionImplementation, RematPolicy, TransformerConfig
from longlive_jax.diffusion.schedule import NUM_TIMESTEPS
from longlive_jax.models import rope
from longlive_jax.models.layers import (
    MLP,
    LayerNorm,
    RMSNorm,
    gelu_tanh,
    layer_norm,
    timestep_embedding,
)
from longlive_jax.ops.windowed_attention import (
    CachedContext,
    ClipContext,
    clip_attention,
    windowed_attention,
)
from longlive_jax.ops.windowed_attention.spread import Spread, spread_attention
from longlive_jax.types import Array, Params, PRNGKey, pytree


@pytree
class TextContext:
    """Cross-attention keys and values of a prompt, `[L, B, M, N, H]`; computed once per prompt."""

    key: Array
    value: Array


class Attention(nn.Module):
    """The four projections and the query/key norms of one attention.

    Queries and keys are normalised over the whole model width, all heads together, before the heads
    are split.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        dense = functools.partial(nn.Dense, self.config.dim, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = functools.partial(RMSNorm, self.config.eps, self.dtype, self.param_dtype)
        self.q, self.k, self.v, self.o = dense(), dense(), dense(), dense()
        self.norm_q, self.norm_k = norm(), norm()

    def query(self, x: Array) -> Array:
        """`[..., D]` to `[..., N, H]`."""
        return self._heads(self.norm_q(self.q(x)))

    def key_value(self, x: Array) -> tuple[Array, Array]:
        """`[..., D]` to keys and values `[..., N, H]`."""
        return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

    def output(self, x: Array) -> Array:
        """`[..., N, H]` to `[..., D]`."""
        return self.o(x.reshape(*x.shape[:-2], -1))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last under modulation."""

    config: TransformerConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    attention: AttentionImplementation
    batch_sharding: jax.sharding.Sharding | None = None
    rope_jitter: float = 0.0
    spread: Spread | None = None

    def setup(self) -> None:
        config, types = self.config, (self.dtype, self.param_dtype)
        self.self_attn = Attention(config, *types)
        self.cross_attn = Attention(config, *types)
        self.cross_norm = LayerNorm(config.eps, self.param_dtype)
        self.ffn = MLP(config.ffn_dim, config.dim, gelu_tanh, *types)
        self.modulation = self.param("modulation", _modulation_init, (6, config.dim), self.param_dtype)

    def __call__(
        self,
        x: Array,
        time: Array,
        rotation: rope.RopeTable,
        text: TextContext,
        context: CachedContext | ClipContext | None,
        cached: CachedContext | None = None,
        layer: Array | None = None,
    ) -> tuple[Array, BlockKV]:
        """Runs the block over the frames of one call.

        Args:
          x: `[B, F, P, D]`.
          time: `[B, F or 1, 6, D]`, the projected timestep.
          rotation: rotary table of the frames.
          text: this layer's cross-attention keys and values, `[B, M, N, H]`.
          context: this layer's cached keys and values: `[B, K, N, H]`, or a clip's `[B, A + F, P, N, H]`.
          cached: instead, those of all layers, `[L, B, K, N, H]`: a slice for the layer would be a copy.
          layer: int32 scalar, this layer's number; only with `cached`.

        Returns:
          The new `x` and this layer's keys and values, `[B, F, P, N, H]`. Of a spread model `x` is this
          device's tokens, and the keys and values are its part of the cache.
        """
        config = self.config
        if cached is not None:
            context = dataclasses.replace(cached, layer=layer)
        modulation = time + self.modulation.astype(self.dtype)  # [B, F, 6, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[:, :, None, i] for i in range(6))

        y = layer_norm(x, eps=config.eps) * (1 + scale1) + shift1
        query = rope.rotate(self.self_attn.query(y), rotation)
        key, value = self.self_attn.key_value(y)
        key = rope.rotate(key, rotation)
        if isinstance(context, ClipContext):
            y = clip_attention(query, key, value, context, implementation=self.attention)
        elif self.spread is not None:
            y, key, value = spread_attention(
                query, key, value, context, spread=self.spread, implementation=self.attention
            )
        else:
            y = windowed_attention(
                *(_tokens(a) for a in (query, key, value)),
                context=context,
                implementation=self.attention,
            )
        x = x + self.self_attn.output(y.reshape(query.shape)) * gate1

        query = self.cross_attn.query(self.cross_norm(x))
        y = windowed_attention(_tokens(query), text.key, text.value, implementation=self.attention)
        x = x + self.cross_attn.output(y.reshape(query.shape))

        y = layer_norm(x, eps=config.eps) * (1 + scale2) + shift2
        x = x + self.ffn(y) * gate2
        return _split(x, self.batch_sharding), BlockKV(key, value)

    def text_context(self, carry: None, text: Array) -> tuple[None, TextContext]:
        """This layer's cross-attention keys and values of `[B, M, D]` text (a scan body: no carry)."""
        return carry, TextContext(*self.cross_attn.key_value(text))


class Head(nn.Module):
    """Modulated norm and the projection of every token back to a patch of latent."""

    config: TransformerConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, time: Array) -> Array:
        """`[B, F, P, D]` tokens and `[B, F or 1, D]` timestep embeddings to `[B, F, P, patch_dim]`."""
        config = self.config
        modulation = self.param("modulation", _modulation_init, (2, config.dim), self.param_dtype)
        shift, scale = (time[:, :, None] + modulation[i].astype(self.dtype) for i in range(2))
        x = layer_norm(x, eps=config.eps) * (1 + scale) + shift
        return nn.Dense(config.patch_dim, dtype=self.dtype, param_dtype=self.param_dtype, name="proj")(x)


class Transformer(nn.Module):
    """Predicts the flow-matching velocity `noise - x0` of latent frames.

    Attributes:
      config: shape of the model.
      dtype: precision of activations and matrix products. Norm statistics, softmax, rotary angles
        and the returned velocity are float32 in every case.
      param_dtype: precision parameters are created in; loaded parameters keep their own.
      attention: implementation of the attention.
      remat: what the backward pass recomputes.
      batch_sharding: where the batch of the activations lives; None leaves it to the compiler. With weights
        that are split over the devices of the batch it has to be said: the compiler might gather the batch
        instead of the weights.
      rope_jitter: spread of the heads' temporal rotary bases, see `rope.jittered_frame_angles`; 0 is the
        model as it was trained.
      spread: None, or how the devices of a `jax.shard_map` share each video: inputs and the velocity are
        whole on each, the context and the returned keys and values are its part.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attention: AttentionImplementation = "auto"
    remat: RematPolicy = "none"
    batch_sharding: jax.sharding.Sharding | None = None
    rope_jitter: float = 0.0
    spread: Spread | None = None

    def setup(self) -> None:
        config, types = self.config, (self.dtype, self.param_dtype)
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        self.patch_embed = dense(config.dim)
        self.text_embed = MLP(config.dim, config.dim, gelu_tanh, *types)
        self.time_embed = MLP(config.dim, config.dim, nn.silu, *types)
        self.time_proj = dense(6 * config.dim)
        self.blocks = _scanned_block(config.num_layers, self.remat)(
            config, *types, self.attention, self.batch_sharding, spread=self.spread
        )
        self.head = Head(config, *types)

    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        text: TextContext,
        *,
        positions: Array | None = None,
        context: CachedContext | ClipContext | None = None,
    ) -> tuple[Array, BlockKV]:
        """Runs the transformer over F frames.

        Args:
          latents: `[B, F, h, w, C]` noisy latents.
          timesteps: float32 `[B, F]`, or `[B, 1]` for one timestep per video, in [0, 1000].
          text: result of `text_context`.
          positions: int32 `[F]` or `[B, F]` frame positions; default 0..F-1.
          context: cached keys and values with a leading layer axis, `[L, B, K, N, H]`, length `[B]`; or
            those of a clip whose blocks all run in this call, `[L, B, A + F, P, N, H]`.

        Returns:
          velocity float32 `[B, F, h, w, C]`, and the keys and values of the frames (`BlockKV`).
        """
        config = self.config
        _, rows, columns = config.patch
        height, width = latents.shape[2] // rows, latents.shape[3] // columns
        if positions is None:
            positions = jnp.arange(latents.shape[1], dtype=jnp.int32)
        rotation = rope.table(
            positions, height, width, config.head_dim, heads=config.num_heads, jitter=self.rope_jitter
        )
        patches = rearrange(latents, "b f (h q) (w r) c -> b f (h w) (q r c)", q=rows, r=columns)
        if self.spread is not None:
            patches, rotation = self.spread.share((patches, rotation), axis=2)
        x = _split(self.patch_embed(patches.astype(self.dtype)), self.batch_sharding)  # [B, F, P, D]
        embedding = timestep_embedding(timesteps, config.freq_dim).astype(self.dtype)
        time = self.time_embed(embedding)  # [B, F, D]
        projected = self.time_proj(nn.silu(time)).reshape(*time.shape[:2], 6, config.dim)
        cached = None
        if isinstance(context, CachedContext):
            cached = _of_all_layers(context)
            context = None
        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        of_layer = _per_layer(context, config.num_layers)
        x, own = self.blocks(x, projected, rotation, text, of_layer, cached, layers)
        patches = self.head(x, time).astype(jnp.float32)
        if self.spread is not None:
            patches = self.spread.whole(patches, axis=2)
        output = rearrange(patches, "b f (h w) (q r c) -> b f (h q) (w r) c", h=height, q=rows, r=columns)
        return self._velocity(output, latents, timesteps), own

    def _velocity(self, output: Array, latents: Array, timesteps: Array) -> Array:
        """The velocity that the network's output stands for."""
        if self.config.prediction == "v":
            return output
        sigma = jnp.maximum(timesteps / NUM_TIMESTEPS, _X0_MIN_SIGMA)[:, :, None, None, None]
        return (latents.astype(jnp.float32) - output) / sigma

    def text_context(self, text: Array) -> TextContext:
        """Cross-attention keys and values of a prompt.

        Args:
          text: `[B, M, text_dim]` text embeddings, exact zeros beyond the prompt. All M positions are
            attended to: the padding passes the text MLP and contributes, as in the release.
        """
        return self.blocks.text_context(None, self.text_embed(text.astype(self.dtype)))[1]

    def create(self, latents: Array, timesteps: Array, text: Array) -> Array:
        """Touches every parameter; the method to pass to `init`."""
        return self(latents, timesteps, self.text_context(text))[0]


def init_params(transformer: Transformer, key: PRNGKey) -> Params:
    """Random parameters (the `params` collection). Use under `jax.eval_shape` for shapes alone."""
    config = transformer.config
    latents = jnp.zeros((1, 1, config.patch[1], config.patch[2], config.latent_channels))
    text = jnp.zeros((1, config.text_len, config.text_dim))
    return transformer.init(key, latents, jnp.zeros((1, 1)), text, method="create")["params"]


# Below this noise level an error of x0 would make a larger and larger one of the velocity.
_X0_MIN_SIGMA = 0.25

_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _scanned_block(layers: int, remat: RematPolicy) -> Any:
    """The block scanned over layers, for both of its methods."""
    block: Any = Block
    if remat != "none":
        block = nn.remat(
            Block,
            methods={"__call__": {"prevent_cse": False, "policy": _REMAT_POLICIES[remat]}},
        )
    stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": layers}
    broadcast = nn.broadcast
    return nn.scan(
        block,
        methods={
            "__call__": stacked | {"in_axes": (broadcast, broadcast, 0, 0, broadcast, 0), "out_axes": 0},
            "text_context": stacked | {"in_axes": broadcast, "out_axes": 0},
        },
    )


def _per_layer(context: ClipContext | None, layers: int) -> ClipContext | None:
    """Gives what all layers share a layer axis so that the whole context can be scanned."""
    if context is None or context.through is None:
        return context
    return dataclasses.replace(
        context, through=jnp.broadcast_to(context.through, (layers, *context.through.shape))
    )


def _of_all_layers(context: CachedContext) -> CachedContext:
    """The context as the layer scan takes it: a batch of one loses its axis.

    XLA's CPU compiler would put that axis elsewhere, and copy all keys and values to do so.
    """
    if context.length.shape[0] != 1:
        return context
    key, value = jax.tree.map(lambda x: x.reshape(x.shape[0], *x.shape[2:]), (context.key, context.value))
    return dataclasses.replace(context, key=key, value=value)


def _split(x: Array, sharding: jax.sharding.Sharding | None) -> Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _tokens(x: Array) -> Array:
    """`[B, F, P, N, H]` to `[B, T, N, H]`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _modulation_init(key: PRNGKey, shape: tuple[int, ...], dtype: Any) -> Array:
    return (jax.random.normal(key, shape) / shape[-1] ** 0.5).astype(dtype)
