"""A linear code of video frames, to which an autoencoder's latents can be tied.

An encoder that is free chooses latents that bend as an object moves by a pixel; a diffusion model then
has to learn the bends. Principal components of a cell's pixels are linear: what moves by a pixel moves
the code by the same vector wherever it is. The decoder stays as free as it was.

The code of a latent frame is that of the *last* video frame it stands for, so the first latent of a clip,
which is one frame, and the later ones, which are several, look alike.
"""

from typing import Any

import numpy as np

from longlive_jax import toy
from longlive_jax.config import VAEConfig
from longlive_jax.types import Array, pytree

WHITENING = 0.5
"""Components are divided by their deviation to this power: 0 keeps their sizes, 1 makes all equal."""


@pytree
class LinearCode:
    """Cells of pixels to latents: `(cell - mean) @ projection`.

    Attributes:
      mean: `[S * S * 3]`, the average cell of S x S pixels.
      projection: `[S * S * 3, C]`.
    """

    mean: Array
    projection: Array

    def __call__(self, video: Array, config: VAEConfig) -> Array:
        """The code of a clip.

        Args:
          video: `[B, V, Y, X, 3]` in [-1, 1].
          config: gives the strides of time and space.

        Returns:
          `[B, F, Y / S, X / S, C]`, latents of unit mean square over the clips it was fitted to.
        """
        last = video[:, :: config.temporal_stride]  # frame 0, then the last of every group
        return (_cells(last, config.spatial_stride) - self.mean) @ self.projection


def fit(world: toy.World, config: VAEConfig, *, clips: int, seed: int) -> LinearCode:
    """Principal components of the cells of first frames, in a random basis.

    The basis spreads the components over the channels: every channel has the same variance, so
    normalising them one by one later does not undo `WHITENING`.

    Args:
      world: geometry.
      config: gives the stride and the number C of channels (those beyond S * S * 3 repeat others).
      clips: number of training scenes to render.
      seed: of the scenes and of the basis.

    Returns:
      The code, float32; the same for the same arguments.
    """
    scenes = toy.sample_scenes(world, seed=seed, indices=np.arange(clips))
    frames = np.asarray(toy.render(world, scenes, frames=1), np.float64)
    cells = _cells(frames, config.spatial_stride).reshape(-1, 3 * config.spatial_stride**2)
    mean = cells.mean(0)
    variance, components = np.linalg.eigh(np.cov((cells - mean).T))
    variance, components = variance[::-1][: config.z_dim], components[:, ::-1][:, : config.z_dim]
    # The sign of an eigenvector is the library's whim.
    largest = np.abs(components).argmax(0)
    components = components * np.sign(components[largest, np.arange(components.shape[1])])
    scaled = components / np.maximum(variance, 1e-8) ** (WHITENING / 2)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(config.z_dim, config.z_dim)))
    projection = scaled @ basis[: components.shape[1]]
    projection /= np.sqrt(np.mean(np.square((cells - mean) @ projection)))
    return LinearCode(mean.astype(np.float32), projection.astype(np.float32))


def _cells(video: Any, side: int) -> Any:
    batch, frames, height, width, channels = video.shape
    cells = video.reshape(batch, frames, height // side, side, width // side, side, channels)
    cells = cells.swapaxes(3, 4)  # [B, V, h, w, S, S, 3]
    return cells.reshape(batch, frames, height // side, width // side, side * side * channels)
