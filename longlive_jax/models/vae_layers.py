"""Layers of the causal video VAE: convolutions over time that carry their own history.

Every layer that looks back in time takes the frames it needs as an argument and returns what the next
call needs, so that a video can be coded in pieces of any length with nothing hidden in the module.
A history is the tail of the layer's past *input*; zeros stand for the time before the video, which
makes them the causal padding as well. The two temporal resamplers start with a history of `None`:
the first frame of a video is a chunk of its own and they pass it through.

Activations are [B, T, y, x, D]: T frames of the current chunk at this level's rate, y rows and x columns
at this level's resolution, D channels. Statistics of norms and of softmax are float32 in every dtype.

Source: Wan2.1 `wan/modules/vae.py` (RMS_norm, CausalConv3d, ResidualBlock, AttentionBlock, Resample).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from longlive_jax.models.vae_tiling import tiled
from longlive_jax.types import Array

HISTORY_FRAMES = 2
"""Past input frames a temporal kernel of three needs."""

_KERNEL_INIT = nn.initializers.lecun_normal()

# Fewer input channels than this leave a matrix product short of work: stacking the temporal taps makes the
# convolution two to four times as fast on CPU. With more, the copies cost more than that gains.
_STACKED_CHANNELS = 12


class ChannelNorm(nn.Module):
    """Scales every position's channel vector to length sqrt(D), times a learned gain."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., D] to [..., D] in `dtype`."""
        features = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (features,), self.param_dtype)
        x = x.astype(jnp.float32)
        # The release bounds the length, not its square, by 1e-12.
        inverse_length = lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
        return (x * (inverse_length * features**0.5) * scale.astype(jnp.float32)).astype(self.dtype)


class CausalConv(nn.Module):
    """A 3x3x3 convolution that sees the current frame and the two before it.

    Attributes:
      features: output channels.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    HALO: ClassVar[int] = 1

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, history: Array) -> tuple[Array, Array]:
        """Convolves one chunk.

        Args:
          x: [B, T, y, x, D] current frames.
          history: [B, 2, y, x, D] input frames before them.

        Returns:
          ([B, T, y, x, features], the history of the next chunk).
        """
        kernel = self.param("kernel", _KERNEL_INIT, (3, 3, 3, x.shape[-1], self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        frames = jnp.concatenate([history, x.astype(self.dtype)], axis=1)  # [B, 2 + T, y, x, D]
        y = convolve_frames(frames, kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return y, frames[:, -HISTORY_FRAMES:]


class TemporalConv(nn.Module):
    """A 3x1x1 convolution over time, without padding.

    Attributes:
      features: output channels.
      stride: frames from one output to the next.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    features: int
    stride: int = 1
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, frames: Array) -> Array:
        """Maps [B, T, y, x, D] to [B, (T - 3) // stride + 1, y, x, features]."""
        channels = frames.shape[-1]
        kernel = self.param("kernel", _KERNEL_INIT, (3, 1, 1, channels, self.features), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        end = frames.shape[1] - 2
        taps = [frames[:, tap : tap + end : self.stride] for tap in range(3)]
        # One matrix product over the channels of all three taps: far faster than a 3D convolution on CPU.
        stacked = jnp.concatenate(taps, axis=-1)  # [B, T', y, x, 3 D]
        y = jnp.dot(stacked, kernel.reshape(3 * channels, self.features).astype(self.dtype))
        return y + bias.astype(self.dtype)


class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, beside a shortcut that is linear where the width changes."""

    HALO: ClassVar[int] = 2

    features: int
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, history: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        """Maps [B, T, y, x, D] to [B, T, y, x, features]; `history` as `res_history` builds it."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        shortcut = x
        if x.shape[-1] != self.features:
            shortcut = nn.Dense(self.features, name="shortcut", **dtypes)(x)
        new = {}
        for index in (1, 2):
            x = nn.silu(ChannelNorm(name=f"norm{index}", **dtypes)(x))
            conv = CausalConv(self.features, name=f"conv{index}", **dtypes)
            x, new[f"conv{index}"] = conv(x, history[f"conv{index}"])
        return x + shortcut, new


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of one frame, with a residual connection.

    Attributes:
      max_logits: logits of one frame held at once, by taking the queries in groups; 0 for all.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    max_logits: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [B, T, y, x, D] to [B, T, y, x, D]; frames do not see each other."""
        batch, frames, rows, columns, features = x.shape
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        normed = ChannelNorm(name="norm", **dtypes)(x).reshape(batch, frames, rows * columns, features)
        query, key, value = jnp.split(nn.Dense(3 * features, name="qkv", **dtypes)(normed), 3, axis=-1)

        def attend(queries: Array) -> Array:
            logits = jnp.einsum("btqd,btkd->btqk", queries, key, preferred_element_type=jnp.float32)
            weights = jax.nn.softmax(logits * features**-0.5, axis=-1).astype(self.dtype)
            return jnp.einsum("btqk,btkd->btqd", weights, value)

        mixed = _in_groups(attend, query, size=self.max_logits // (rows * columns) if self.max_logits else 0)
        # Zero at first, as in the release: a new block starts as the identity.
        out = nn.Dense(features, kernel_init=nn.initializers.zeros, name="proj", **dtypes)(mixed)
        return x + out.reshape(x.shape)


def _in_groups(attend: Callable[[Array], Array], query: Array, *, size: int) -> Array:
    """`attend(query)` [B, T, Q, D] in groups of `size` queries, which do not depend on each other."""
    count = query.shape[2]
    if size == 0 or size >= count:
        return attend(query)
    # The last group is moved back to be a whole one.
    starts = jnp.minimum(jnp.arange(0, count, size), count - size)

    def visit(mixed: Array, start: Array) -> tuple[Array, None]:
        found = attend(lax.dynamic_slice_in_dim(query, start, size, axis=2))
        return lax.dynamic_update_slice_in_dim(mixed, found, start, axis=2), None

    return lax.scan(visit, jnp.zeros_like(query), starts)[0]


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the latent resolution.

    Attributes:
      features: channels.
      tile: rows and columns worked on at once, 0 for all. The attention sees the whole frame in any case.
      dtype: of the computation.
      param_dtype: of the parameters.
    """

    features: int
    tile: int = 0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, history: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Maps [B, T, h, w, features] to the same shape."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        new = {}
        for i in range(2):
            block = ResBlock(self.features, name=f"res_{i}", **dtypes)
            x, new[f"res_{i}"] = tiled(block, x, history[f"res_{i}"], tile=self.tile, halo=ResBlock.HALO)
            if i == 0:
                # As many numbers as the widest layer's window holds.
                max_logits = max(self.tile * self.tile * self.features, x.shape[2] * x.shape[3])
                x = FrameAttention(max_logits if self.tile else 0, name="attention", **dtypes)(x)
        return x, new


class Downsample(nn.Module):
    """Halves rows and columns, and the frame rate too where `temporal`."""

    temporal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, history: Array | None) -> tuple[Array, Array | None]:
        """Maps [B, T, y, x, D] to [B, T or T/2, y/2, x/2, D].

        Args:
          x: the chunk; T is even unless this is the first.
          history: the last frame of the previous chunk, [B, 1, y/2, x/2, D]; `None` for the first chunk,
            which keeps its rate, and always where time is not halved.
        """
        features = x.shape[-1]
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        # The release pads below and to the right only.
        conv = nn.Conv(features, (3, 3), strides=2, padding=((0, 1), (0, 1)), name="conv", **dtypes)
        x = conv(x)
        if not self.temporal:
            return x, None
        last = x[:, -1:]
        if history is not None:
            time_conv = TemporalConv(features, stride=2, name="time_conv", **dtypes)
            x = time_conv(jnp.concatenate([history, x], axis=1))
        return x, last


class Upsample(nn.Module):
    """Doubles rows and columns, halves the channels; doubles the frame rate first where `temporal`."""

    HALO: ClassVar[int] = 1

    temporal: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, history: Array | None) -> tuple[Array, Array | None]:
        """Maps [B, T, y, x, D] to [B, T or 2T, 2y, 2x, D/2].

        Args:
          x: the chunk.
          history: two input frames before it, [B, 2, y, x, D]; `None` for the first chunk, which keeps its
            rate, and always where time is not doubled.
        """
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        new = None
        if self.temporal and history is None:
            # The second chunk is padded with zeros: the release's upsampler never sees the first.
            new = jnp.zeros((x.shape[0], HISTORY_FRAMES, *x.shape[2:]), self.dtype)
        elif history is not None:
            frames = jnp.concatenate([history, x], axis=1)  # [B, 2 + T, y, x, D]
            new = frames[:, -HISTORY_FRAMES:]
            x = TemporalConv(2 * x.shape[-1], name="time_conv", **dtypes)(frames)
            x = interleave_frames(x)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)  # [B, T, 2y, 2x, D]
        return nn.Conv(x.shape[-1] // 2, (3, 3), padding=1, name="conv", **dtypes)(x), new


def convolve_frames(frames: Array, kernel: Array) -> Array:
    """Convolves in space and time: no padding in time, zeros around each frame.

    Args:
      frames: [B, 2 + T, y, x, D].
      kernel: [3, 3, 3, D, E], the same dtype.

    Returns:
      [B, T, y, x, E] in that dtype.
    """
    # XLA's CPU backend runs 3D convolutions at half the speed of 2D ones or less. On an H200 the stacked form
    # is 1.1 to 1.5 times as fast as the 3D one (benchmarks/results/vae_convolutions_gpu.json).
    if frames.shape[-1] <= _STACKED_CHANNELS:
        on_cpu = convolve_stacked_in_float32
    else:
        on_cpu = convolve_by_taps if frames.shape[1] % 2 else convolve_by_pairs
    return lax.platform_dependent(
        frames, kernel, cpu=on_cpu, cuda=convolve_stacked, default=convolve_directly
    )


def convolve_directly(frames: Array, kernel: Array) -> Array:
    """`convolve_frames` as one 3D convolution."""
    return lax.conv_general_dilated(
        frames,
        kernel,
        window_strides=(1, 1, 1),
        padding=((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def convolve_stacked(frames: Array, kernel: Array) -> Array:
    """`convolve_frames` as one 2D convolution over the channels of all three temporal taps."""
    length = frames.shape[1] - 2
    stacked = jnp.concatenate([frames[:, tap : tap + length] for tap in range(3)], axis=-1)
    kernel = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, stacked.shape[-1], -1)
    return _convolve_images(stacked, kernel)


def convolve_stacked_in_float32(frames: Array, kernel: Array) -> Array:
    """`convolve_stacked` whose products are float32, whatever the dtype of frames and kernel."""
    return convolve_stacked(frames.astype(jnp.float32), kernel.astype(jnp.float32)).astype(frames.dtype)


def convolve_by_taps(frames: Array, kernel: Array) -> Array:
    """`convolve_frames` as a sum of 2D convolutions, one per temporal tap, added up in float32."""
    length = frames.shape[1] - 2
    exact, kernel = frames.astype(jnp.float32), kernel.astype(jnp.float32)
    taps = [_convolve_images(exact[:, tap : tap + length], kernel[tap]) for tap in range(3)]
    return (taps[0] + taps[1] + taps[2]).astype(frames.dtype)


def convolve_by_pairs(frames: Array, kernel: Array) -> Array:
    """`convolve_frames` for an even number of output frames, with four 2D convolutions a pair, not six.

    Winograd's minimal filter F(2, 3) along time, in float32: its additions cost nothing beside the
    products they save, and its rounding is that of a few more additions.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv 1509.09308.
    """
    length = frames.shape[1] - 2
    # Fused with what computes the frames, the differences would round (as multiply-adds) differently in a
    # stream, where some of them come from the history.
    frames = lax.optimization_barrier(frames)
    f0, f1, f2, f3 = (frames[:, i : i + length : 2].astype(jnp.float32) for i in range(4))
    k0, k1, k2 = kernel.astype(jnp.float32)
    both, alternating = (k0 + k1 + k2) / 2, (k0 - k1 + k2) / 2
    first = _convolve_images(f0 - f2, k0)
    second = _convolve_images(f1 + f2, both)
    third = _convolve_images(f2 - f1, alternating)
    fourth = _convolve_images(f1 - f3, k2)
    pairs = jnp.stack([first + second + third, second - third - fourth], axis=2)
    batch, _, _, *image = pairs.shape
    return pairs.reshape(batch, length, *image).astype(frames.dtype)


def _convolve_images(frames: Array, kernel: Array) -> Array:
    """3x3 convolution of every frame `[B, T, y, x, D]` on its own, zeros around it, in its dtype."""
    batch, length, *image = frames.shape
    images = lax.conv_general_dilated(
        frames.reshape(batch * length, *image),
        kernel,
        window_strides=(1, 1),
        padding=((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return images.reshape(batch, length, *images.shape[1:])


def interleave_frames(x: Array) -> Array:
    """[B, T, y, x, 2 D] -> [B, 2 T, y, x, D]: the first half of the channels is the earlier frame."""
    batch, frames, rows, columns, channels = x.shape
    x = x.reshape(batch, frames, rows, columns, 2, channels // 2)
    x = jnp.moveaxis(x, 4, 2)  # [B, T, 2, y, x, D]
    return x.reshape(batch, 2 * frames, rows, columns, channels // 2)
