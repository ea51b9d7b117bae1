"""What every autoencoder of a stream of latents does alike: its checks, and the loop over latents."""

from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn

from longlive_jax.config import VAEConfig
from longlive_jax.errors import require
from longlive_jax.types import Array

S = TypeVar("S")


class StreamingVAE(nn.Module):
    """Base of the autoencoders: subclasses have `config`, `encode`, `init_decode_state` and `decode_step`.

    Attributes:
      config: shapes and latent statistics.
    """

    config: VAEConfig

    def __call__(self, video: Array) -> Array:
        """Encodes and decodes `video` [B, V, Y, X, 3]; the result may lack the frames `encode` drops."""
        return self.decode(self.encode(video))

    def encode(self, video: Array) -> Array:
        """Maps a video [B, V, Y, X, 3] to latents [B, F, h, w, C]."""
        raise NotImplementedError

    def decode(self, latents: Array) -> Array:
        """Decodes a whole video.

        Args:
          latents: [B, F, h, w, C], as the transformer has them.

        Returns:
          [B, stride * (F - 1) + 1, 8 h, 8 w, 3] float32, clamped to [-1, 1].

        Raises:
          UserError: if the shape does not fit.
        """
        check_latents(self.config, latents)
        batch, _, height, width, _ = latents.shape
        state = self.init_decode_state(batch, height=height, width=width)
        return self.decode_step(state, latents)[0]

    def init_decode_state(self, batch: int, *, height: int, width: int) -> Any:
        """The state before the first latent of a video."""
        raise NotImplementedError

    def decode_step(self, state: Any, latents: Array) -> tuple[Array, Any]:
        """Decodes the next latents of a stream."""
        raise NotImplementedError


def check_latents(config: VAEConfig, latents: Array, made_for: tuple[int, ...] | None = None) -> None:
    """Refuses latents that are not [B, F, h, w, C], or are not for the state of a stream.

    Args:
      config: of the autoencoder.
      latents: what is to be decoded.
      made_for: shape [B, ., h, w, .] of frames in the stream's state.

    Raises:
      UserError: they do not fit.
    """
    require(
        latents.ndim == 5 and latents.shape[-1] == config.z_dim and min(latents.shape) > 0,
        f"latents.shape={latents.shape} must be [batch, frames, rows, columns, {config.z_dim}] "
        "with no axis empty",
    )
    if made_for is not None:
        require(
            (latents.shape[0], *latents.shape[2:4]) == (made_for[0], *made_for[2:4]),
            f"latents.shape={latents.shape} does not fit the state, which was made for batch {made_for[0]} "
            f"and {made_for[2]}x{made_for[3]} latents; start with init_decode_state",
        )


def check_sizes(**sizes: int) -> None:
    """Refuses a size that is not positive, by its name."""
    for name, value in sizes.items():
        require(value > 0, f"{name}={value} must be positive")


def check_frames(config: VAEConfig, video: Array) -> None:
    """Refuses a video that is not [B, V, Y, X, 3] with rows and columns of whole latents.

    Raises:
      UserError: it does not fit.
    """
    stride = config.spatial_stride
    require(
        video.ndim == 5 and video.shape[-1] == 3 and min(video.shape) > 0,
        f"video.shape={video.shape} must be [batch, frames, rows, columns, 3] with no axis empty",
    )
    require(
        all(size % stride == 0 for size in video.shape[2:4]),
        f"video.shape={video.shape} must have rows and columns divisible by {stride}; crop or pad",
    )


def along_frames(step: Callable[[Any, S, Array], tuple[S, Array]]) -> Callable[..., tuple[S, Array]]:
    """Runs `step(vae, state, frame)` along axis 1 of input and output, with the same parameters."""
    return nn.scan(step, variable_broadcast="params", split_rngs={"params": False}, in_axes=1, out_axes=1)
