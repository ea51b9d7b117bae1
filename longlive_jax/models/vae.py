"""The causal video VAE of Wan2.1, coding a video piece by piece with an explicit state.

The first latent frame stands for the first video frame, each later one for the next
`VAEConfig.temporal_stride` frames. Coding runs one latent at a time in every case: a whole video is a scan
of the same step that a stream calls, so a streamed video equals the one decoded at once bit for bit, and the
working memory does not depend on the length.

    vae = WanVAE(config.vae, dtype=jnp.bfloat16)
    latents = vae.apply({"params": params}, video, method="encode")
    video = vae.apply({"params": params}, latents, method="decode")

    step = jax.jit(functools.partial(vae.apply, method="decode_step"))
    state = vae.init_decode_state(batch, height=60, width=104)
    for latents in stream:
        video, state = step({"params": params}, state, latents)

Source: Wan2.1 `wan/modules/vae.py` (Encoder3d, Decoder3d, WanVAE_).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from longlive_jax.config import VAEConfig
from longlive_jax.models import vae_layers as layers
from longlive_jax.models.vae_stream import (
    StreamingVAE,
    along_frames,
    check_frames,
    check_latents,
    check_sizes,
)
from longlive_jax.models.vae_tiling import tiled
from longlive_jax.types import Array, Params, PRNGKey

State: TypeAlias = Any
"""Nested dict, by layer, of the input frames each temporal layer looks back to.

Its shapes depend on the frame size only. `None` in place of a temporal resampler's frames says that the video
has not begun; `jax.jit` therefore compiles a stream's first piece and its later pieces separately.
"""


@dataclasses.dataclass(frozen=True)
class Level:
    """One resolution of the encoder or decoder.

    Attributes:
      in_features: channels it receives.
      features: channels of its residual blocks.
      blocks: residual blocks.
      resamples: whether a resampler follows (all levels but the last).
      temporal: whether that resampler changes the frame rate too.
    """

    in_features: int
    features: int
    blocks: int
    resamples: bool
    temporal: bool

    def widths(self) -> list[tuple[int, int]]:
        """(input, output) channels of each residual block."""
        return [(self.in_features if i == 0 else self.features, self.features) for i in range(self.blocks)]


def encoder_levels(config: VAEConfig) -> tuple[Level, ...]:
    """The encoder's levels, from pixels to latents."""
    widths = [config.dim * m for m in (1, *config.dim_mult)]
    temporal = (*config.temporal_downsample, False)
    last = len(config.dim_mult) - 1
    return tuple(
        Level(widths[i], widths[i + 1], config.num_res_blocks, i < last, temporal[i]) for i in range(last + 1)
    )


def decoder_levels(config: VAEConfig) -> tuple[Level, ...]:
    """The decoder's levels, from latents to pixels."""
    widths = [config.dim * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
    temporal = (*config.temporal_downsample[::-1], False)
    last = len(config.dim_mult) - 1
    return tuple(
        # An upsampler halves the channels on the way to the next level.
        Level(
            widths[i] if i == 0 else widths[i] // 2,
            widths[i + 1],
            config.num_res_blocks + 1,
            i < last,
            temporal[i],
        )
        for i in range(last + 1)
    )


class WanVAE(StreamingVAE):
    """Encoder and decoder between videos in [-1, 1] and normalised latents.

    Attributes:
      config: shapes and latent statistics.
      tile: rows and columns of activations that a layer of the decoder works on at once; 0 for whole frames.
        It changes the memory and the order of sums only, see `vae_tiling`.
      dtype: of the computation; results are float32 in any case.
      param_dtype: of the parameters.
    """

    tile: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = Encoder(self.config, **dtypes)
        self.quant = nn.Dense(2 * self.config.z_dim, **dtypes)
        self.post_quant = nn.Dense(self.config.z_dim, **dtypes)
        self.decoder = Decoder(self.config, self.tile, **dtypes)

    def encode(self, video: Array) -> Array:
        """Encodes a video to the means of its latent distribution.

        Args:
          video: [B, V, Y, X, 3] floats in [-1, 1]; Y and X multiples of `config.spatial_stride`. Frames after
            the first are taken in groups of `config.temporal_stride`; like the release, trailing
            frames that do not fill a group are dropped (with stride 4, 7 frames give the latents of 5).

        Returns:
          [B, (V - 1) // stride + 1, Y / 8, X / 8, C] float32, normalised per channel.

        Raises:
          UserError: if the shape does not fit.
        """
        check_frames(self.config, video)
        batch, length, *_ = video.shape
        group = self.config.temporal_stride
        groups = (length - 1) // group
        state = init_encoder_state(
            self.config, batch, height=video.shape[2], width=video.shape[3], dtype=self.dtype
        )
        state, latents = _encode_chunk(self, state, video[:, :1])
        if groups == 0:
            return latents
        chunks = video[:, 1 : 1 + groups * group]
        chunks = chunks.reshape(batch, groups, group, *video.shape[2:])  # [B, groups, stride, Y, X, 3]
        _, later = along_frames(_encode_chunk)(self, state, chunks)  # [B, groups, 1, h, w, C]
        return jnp.concatenate([latents, later[:, :, 0]], axis=1)

    def init_decode_state(self, batch: int, *, height: int, width: int) -> State:
        """The state before the first latent of a video; needs no parameters.

        Args:
          batch: videos decoded side by side.
          height: latent rows h.
          width: latent columns w.

        Raises:
          UserError: if a size is not positive.
        """
        check_sizes(batch=batch, height=height, width=width)
        return init_decoder_state(self.config, batch, height=height, width=width, dtype=self.dtype)

    def decode_step(self, state: State, latents: Array) -> tuple[Array, State]:
        """Decodes the next latents of a stream.

        Args:
          state: from `init_decode_state` or the previous call.
          latents: [B, n, h, w, C], normalised; any n >= 1.

        Returns:
          (video [B, V, 8 h, 8 w, 3] float32 in [-1, 1], the next state). V = stride * n, except for the
          first piece of a video: stride * (n - 1) + 1.

        Raises:
          UserError: if the shape does not fit, or is not the one the state was made for.
        """
        check_latents(self.config, latents, state["conv_in"].shape)
        pieces = []
        if self._has_not_begun(state):
            state, first = _decode_latent(self, state, latents[:, 0])
            pieces.append(first)
            latents = latents[:, 1:]
        if latents.shape[1]:
            state, later = along_frames(_decode_latent)(self, state, latents)  # [B, n, stride, Y, X, 3]
            pieces.append(later.reshape(later.shape[0], -1, *later.shape[3:]))
        video = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)
        return video, state

    def _has_not_begun(self, state: State) -> bool:
        levels = enumerate(decoder_levels(self.config))
        return any(level.temporal and state[f"up_{i}"]["resample"] is None for i, level in levels)


class Encoder(nn.Module):
    """Video frames to the moments of the latents, one chunk at a time."""

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, state: State) -> tuple[Array, State]:
        """Maps [B, T, Y, X, 3] to ([B, 1, h, w, 2 C], next state); T is 1 at first, then the stride."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        levels = encoder_levels(self.config)
        new: State = {}
        x, new["conv_in"] = layers.CausalConv(self.config.dim, name="conv_in", **dtypes)(x, state["conv_in"])
        for i, level in enumerate(levels):
            stage = Stage(level, layers.Downsample, name=f"down_{i}", **dtypes)
            x, new[f"down_{i}"] = stage(x, state[f"down_{i}"])
        x, new["mid"] = layers.Middle(levels[-1].features, name="mid", **dtypes)(x, state["mid"])
        x = nn.silu(layers.ChannelNorm(name="norm_out", **dtypes)(x))
        conv_out = layers.CausalConv(2 * self.config.z_dim, name="conv_out", **dtypes)
        x, new["conv_out"] = conv_out(x, state["conv_out"])
        return x, new


class Decoder(nn.Module):
    """One latent frame to video frames."""

    config: VAEConfig
    tile: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, state: State) -> tuple[Array, State]:
        """Maps [B, 1, h, w, C] to ([B, T, Y, X, 3], next state); T is 1 at first, then the stride."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        levels = decoder_levels(self.config)
        new: State = {}
        conv_in = layers.CausalConv(levels[0].in_features, name="conv_in", **dtypes)
        x, new["conv_in"] = tiled(conv_in, x, state["conv_in"], tile=self.tile, halo=conv_in.HALO)
        middle = layers.Middle(levels[0].in_features, self.tile, name="mid", **dtypes)
        x, new["mid"] = middle(x, state["mid"])
        for i, level in enumerate(levels):
            stage = Stage(level, layers.Upsample, self.tile, name=f"up_{i}", **dtypes)
            x, new[f"up_{i}"] = stage(x, state[f"up_{i}"])
        x = nn.silu(layers.ChannelNorm(name="norm_out", **dtypes)(x))
        conv_out = layers.CausalConv(3, name="conv_out", **dtypes)
        x, new["conv_out"] = tiled(conv_out, x, state["conv_out"], tile=self.tile, halo=conv_out.HALO)
        return x, new


class Stage(nn.Module):
    """The residual blocks of one level and the resampler after them.

    Attributes:
      level: widths and what follows.
      resampler: `Downsample` or `Upsample`.
      tile: rows and columns worked on at once, 0 for all; of the decoder only.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    level: Level
    resampler: type[layers.Downsample] | type[layers.Upsample]
    tile: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, state: State) -> tuple[Array, State]:
        """Maps [B, T, y, x, in_features] to the next level's size and the next state."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        new: State = {}
        for i in range(self.level.blocks):
            block = layers.ResBlock(self.level.features, name=f"res_{i}", **dtypes)
            x, new[f"res_{i}"] = tiled(block, x, state[f"res_{i}"], tile=self.tile, halo=block.HALO)
        if self.level.resamples:
            resample = self.resampler(self.level.temporal, name="resample", **dtypes)
            halo = layers.Upsample.HALO  # nothing that downsamples is tiled
            x, new["resample"] = tiled(resample, x, state["resample"], tile=self.tile, halo=halo)
        return x, new


def init_params(vae: WanVAE, key: PRNGKey) -> Params:
    """Random parameters of `vae`; the draws for one key are not promised to be the same on every backend."""
    config = vae.config
    size = config.spatial_stride
    # The smallest video that reaches every layer. Nothing is computed on it: only the draws run.
    video = jax.ShapeDtypeStruct((1, 1 + config.temporal_stride, size, size, 3), vae.dtype)
    # The default generator takes XLA's CPU compiler over a second per shape, 40 s for this model.
    data = jax.random.bits(key, (4,), jnp.uint32)
    return vae.lazy_init(jax.random.wrap_key_data(data, impl="rbg"), video, method=_visit)["params"]


def _visit(vae: WanVAE, video: Array) -> Array:
    """Two chunks through encoder and decoder: every parameter, without the loops that cost time to trace."""
    batch, _, height, width, _ = video.shape
    state = init_encoder_state(vae.config, batch, height=height, width=width, dtype=vae.dtype)
    state, _ = _encode_chunk(vae, state, video[:, :1])
    _, latents = _encode_chunk(vae, state, video[:, 1:])
    state = vae.init_decode_state(batch, height=latents.shape[2], width=latents.shape[3])
    state, _ = _decode_latent(vae, state, latents[:, 0])
    _, frames = _decode_latent(vae, state, latents[:, 0])
    return frames


def init_encoder_state(config: VAEConfig, batch: int, *, height: int, width: int, dtype: Any) -> State:
    """The encoder's state before a video of `height` x `width` pixels."""
    levels = encoder_levels(config)
    past = functools.partial(_past_frames, batch, height, width, dtype)
    state = {"conv_in": past(3)}
    for i, level in enumerate(levels):
        state[f"down_{i}"] = _stage_state(level, past)
        if level.resamples:
            height, width = height // 2, width // 2
            past = functools.partial(_past_frames, batch, height, width, dtype)
    features = levels[-1].features
    return state | {"mid": _blocks_state([(features, features)] * 2, past), "conv_out": past(features)}


def init_decoder_state(config: VAEConfig, batch: int, *, height: int, width: int, dtype: Any) -> State:
    """The decoder's state before a video of `height` x `width` latents."""
    levels = decoder_levels(config)
    past = functools.partial(_past_frames, batch, height, width, dtype)
    features = levels[0].in_features
    state = {"conv_in": past(config.z_dim), "mid": _blocks_state([(features, features)] * 2, past)}
    for i, level in enumerate(levels):
        state[f"up_{i}"] = _stage_state(level, past)
        if level.resamples:
            height, width = height * 2, width * 2
            past = functools.partial(_past_frames, batch, height, width, dtype)
    return state | {"conv_out": past(levels[-1].features)}


def _past_frames(batch: int, height: int, width: int, dtype: Any, features: int) -> Array:
    return jnp.zeros((batch, layers.HISTORY_FRAMES, height, width, features), dtype)


def _blocks_state(widths: list[tuple[int, int]], past: Callable[[int], Array]) -> State:
    return {f"res_{i}": {"conv1": past(a), "conv2": past(b)} for i, (a, b) in enumerate(widths)}


def _stage_state(level: Level, past: Callable[[int], Array]) -> State:
    state = _blocks_state(level.widths(), past)
    return state | {"resample": None} if level.resamples else state


def _encode_chunk(vae: WanVAE, state: State, chunk: Array) -> tuple[State, Array]:
    """Frames [B, T, Y, X, 3] to the next state and one normalised latent [B, 1, h, w, C]."""
    moments, state = vae.encoder(chunk.astype(vae.dtype), state)
    mean, _ = jnp.split(vae.quant(moments).astype(jnp.float32), 2, axis=-1)
    # The release multiplies by the reciprocal of the deviation.
    return state, (mean - _channels(vae.config.latent_mean)) * (1.0 / _channels(vae.config.latent_std))


def _decode_latent(vae: WanVAE, state: State, latent: Array) -> tuple[State, Array]:
    """One normalised latent [B, h, w, C] to the next state and its frames [B, T, Y, X, 3]."""
    latent = latent.astype(jnp.float32)[:, None]  # [B, 1, h, w, C]
    latent = latent * _channels(vae.config.latent_std) + _channels(vae.config.latent_mean)
    video, state = vae.decoder(vae.post_quant(latent.astype(vae.dtype)), state)
    return state, jnp.clip(video.astype(jnp.float32), -1.0, 1.0)


def _channels(values: tuple[float, ...]) -> Array:
    return jnp.asarray(values, jnp.float32)
