"""The tiny autoencoder TAEHV, which reads and writes the Wan VAE's latents at a fraction of the cost.

All of its convolutions are over single frames; a `MemoryBlock` looks at the frame before as well, and that
frame is all the state a stream needs. Every latent stands for `temporal_stride` frames, so the decoder makes
that many for the first latent too and drops all but the last: the video then has the length of the Wan VAE's.
Latents go in and come out as the transformer has them, without statistics. Interface and streaming are those
of `models.vae.WanVAE`; `VAEConfig.family` says which of the two a config means.

Source: madebyollin/taehv `taehv.py` (TAEHV, MemBlock, TPool, TGrow; the weights `taew2_1`).
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from longlive_jax.config import VAEConfig
from longlive_jax.models.vae_layers import interleave_frames
from longlive_jax.models.vae_stream import (
    StreamingVAE,
    along_frames,
    check_frames,
    check_latents,
    check_sizes,
)
from longlive_jax.models.vae_tiling import tiled
from longlive_jax.types import Array, Params, PRNGKey

State = dict[str, dict[str, Array]]
"""`{"first": frames}` before a video, `{"later": frames}` after its first latent.

`frames` holds each memory block's last input `[B, 1, y, x, D]`, zeros before the video. The two names make
`jax.jit` compile a stream's first piece, which is shorter, and its later pieces separately.
"""

_CLAMP = 3.0
"""Latents are squashed smoothly into (-3, 3) first."""


def decoder_widths(config: VAEConfig) -> tuple[int, ...]:
    """Channels of the decoder's levels, from latents to pixels; the last one has no memory blocks."""
    return tuple(config.dim * m for m in reversed(config.dim_mult))


class TinyVAE(StreamingVAE):
    """Encoder and decoder between videos in [-1, 1] and latents.

    Attributes:
      config: shapes, of the family "taehv".
      tile: rows and columns of activations that a block of the decoder works on at once, see `vae_tiling`; 0
        for whole frames.
      dtype: of the computation; results are float32 in any case.
      param_dtype: of the parameters.
    """

    tile: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.encoder = TinyEncoder(self.config, **dtypes)
        self.decoder = TinyDecoder(self.config, self.tile, **dtypes)

    def encode(self, video: Array) -> Array:
        """Encodes a video, all frames side by side.

        Args:
          video: [B, V, Y, X, 3] floats in [-1, 1]; Y and X multiples of `config.spatial_stride`. The last
            frame is repeated to fill the last group of `config.temporal_stride`.

        Returns:
          [B, ceil(V / stride), Y / 8, X / 8, C] float32.

        Raises:
          UserError: if the shape does not fit.
        """
        check_frames(self.config, video)
        missing = -video.shape[1] % self.config.temporal_stride
        padded = jnp.concatenate([video, jnp.repeat(video[:, -1:], missing, axis=1)], axis=1)
        return self.encoder(((padded + 1) / 2).astype(self.dtype)).astype(jnp.float32)

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
        past = {}
        for level, features in enumerate(decoder_widths(self.config)[:-1]):
            shape = (batch, 1, height * 2**level, width * 2**level, features)
            for block in range(self.config.num_res_blocks):
                past[f"up_{level}_memory_{block}"] = jnp.zeros(shape, self.dtype)
        return {"first": past}

    def decode_step(self, state: State, latents: Array) -> tuple[Array, State]:
        """Decodes the next latents of a stream.

        Args:
          state: from `init_decode_state` or the previous call.
          latents: [B, n, h, w, C]; any n >= 1.

        Returns:
          (video [B, V, 8 h, 8 w, 3] float32 in [-1, 1], the next state). V = stride * n, except for the
          first piece of a video: stride * (n - 1) + 1.

        Raises:
          UserError: if the shape does not fit, or is not the one the state was made for.
        """
        ((when, past),) = state.items()
        check_latents(self.config, latents, past["up_0_memory_0"].shape)
        past, video = along_frames(_decode_latent)(self, past, latents)  # [B, n, stride, Y, X, 3]
        video = video.reshape(video.shape[0], -1, *video.shape[3:])  # [B, n * stride, Y, X, 3]
        dropped = self.config.temporal_stride - 1 if when == "first" else 0
        return video[:, dropped:], {"later": past}


class TinyDecoder(nn.Module):
    """Latent frames to video frames in [0, 1], not clamped."""

    config: VAEConfig
    tile: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, past: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Maps [B, T, h, w, C] to ([B, T * stride, 8 h, 8 w, 3], the next frames to remember)."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        widths, new = decoder_widths(self.config), {}
        x = jnp.tanh(x.astype(self.dtype) / _CLAMP) * _CLAMP
        x = nn.relu(nn.Conv(widths[0], (3, 3), padding=1, name="conv_in", **dtypes)(x))
        for level, temporal in enumerate(reversed(self.config.temporal_downsample)):
            for i in range(self.config.num_res_blocks):
                name = f"up_{level}_memory_{i}"
                block = MemoryBlock(widths[level], name=name, **dtypes)
                x, new[name] = tiled(block, x, past[name], tile=self.tile, halo=MemoryBlock.HALO)
            grow = Grow(widths[level + 1], 1 + temporal, name=f"up_{level}_grow", **dtypes)
            x, _ = tiled(grow, x, None, tile=self.tile, halo=Grow.HALO)
        return nn.Conv(3, (3, 3), padding=1, name="conv_out", **dtypes)(nn.relu(x)), new


class TinyEncoder(nn.Module):
    """Video frames in [0, 1] to latents."""

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, T, Y, X, 3] to [B, T / stride, Y / 8, X / 8, C]; T is a multiple of the stride."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        features = self.config.dim
        x = nn.relu(nn.Conv(features, (3, 3), padding=1, name="conv_in", **dtypes)(x))
        for level, temporal in enumerate(self.config.temporal_downsample):
            x = _stack_frames(x, 1 + temporal)
            x = nn.Dense(features, use_bias=False, name=f"down_{level}_pool", **dtypes)(x)
            name = f"down_{level}_conv"
            x = nn.Conv(features, (3, 3), strides=2, padding=1, use_bias=False, name=name, **dtypes)(x)
            for i in range(self.config.num_res_blocks):
                block = MemoryBlock(features, name=f"down_{level}_memory_{i}", **dtypes)
                x, _ = block(x, jnp.zeros_like(x[:, :1]))
        return nn.Conv(self.config.z_dim, (3, 3), padding=1, name="conv_out", **dtypes)(x)


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, added to the frame.

    Attributes:
      features: channels D, in and out.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    HALO: ClassVar[int] = 3

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, past: Array) -> tuple[Array, Array]:
        """Maps [B, T, y, x, D] and the frame before, [B, 1, y, x, D], to activations and the last frame."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        before = jnp.concatenate([past, x[:, :-1]], axis=1)
        y = jnp.concatenate([x, before], axis=-1)  # [B, T, y, x, 2 D]
        for i in range(3):
            y = nn.Conv(self.features, (3, 3), padding=1, name=f"conv_{i}", **dtypes)(nn.relu(y) if i else y)
        return nn.relu(y + x), x[:, -1:]


class Grow(nn.Module):
    """Doubles rows and columns, and the frame rate where `frames` is 2; then a convolution.

    Attributes:
      features: channels of the result.
      frames: frames made of each.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    HALO: ClassVar[int] = 1

    features: int
    frames: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, history: None) -> tuple[Array, None]:
        """Maps [B, T, y, x, D] to [B, frames * T, 2 y, 2 x, features]; there is no history."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # Before the rows and columns are doubled: the frames are made of single positions.
        x = nn.Dense(self.frames * x.shape[-1], use_bias=False, name="time", **dtypes)(x)
        x = interleave_frames(x) if self.frames == 2 else x
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)  # [B, frames * T, 2y, 2x, D]
        conv = nn.Conv(self.features, (3, 3), padding=1, use_bias=False, name="conv", **dtypes)
        return conv(x), history


def init_params(vae: TinyVAE, key: PRNGKey) -> Params:
    """Random parameters of `vae`."""
    size = vae.config.spatial_stride
    video = jax.ShapeDtypeStruct((1, vae.config.temporal_stride, size, size, 3), vae.dtype)
    return vae.lazy_init(key, video, method=_visit)["params"]


def _visit(vae: TinyVAE, video: Array) -> Array:
    """Through encoder and decoder, without the loop over latents."""
    latents = vae.encode(video)
    ((_, past),) = vae.init_decode_state(video.shape[0], height=1, width=1).items()
    return _decode_latent(vae, past, latents[:, 0])[1]


def _decode_latent(vae: TinyVAE, past: dict[str, Array], latent: Array) -> tuple[dict[str, Array], Array]:
    """One latent [B, h, w, C] to what is remembered and its frames [B, stride, Y, X, 3]."""
    video, past = vae.decoder(latent[:, None], past)
    return past, jnp.clip(2 * video.astype(jnp.float32) - 1, -1.0, 1.0)


def _stack_frames(x: Array, count: int) -> Array:
    """[B, T, y, x, D] -> [B, T / count, y, x, count * D], earlier frames first."""
    batch, frames, rows, columns, features = x.shape
    x = x.reshape(batch, frames // count, count, rows, columns, features)
    return jnp.moveaxis(x, 2, 4).reshape(batch, frames // count, rows, columns, count * features)
