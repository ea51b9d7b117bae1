"""Reads the prompted attributes from a block of latents, noisy or not: a reward that has a gradient.

`toy.measure` reads pixels and is the judge; this network is trained on renders alone, its own gradient can
be followed into a generator (stage `reward`), and what it was fooled by the judge does not know.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from longlive_jax.errors import require
from longlive_jax.toy.world import FIELDS, SHAPE, VALUES
from longlive_jax.types import Array, Params

MISSHAPEN = len(VALUES["shape"])
"""Class of a sprite that is none of the world's shapes."""

CLASSES = tuple(len(VALUES[field]) + (index == SHAPE) for index, field in enumerate(FIELDS))
"""How many classes each attribute has."""

_NOISE_FEATURES = 5


class BlockReader(nn.Module):
    """A residual network of 3 x 3 convolutions on the torus, over the block's frames as channels.

    Attributes:
      dim: channels.
      layers: residual layers.
    """

    dim: int = 64
    layers: int = 3

    @nn.compact
    def __call__(self, latents: Array, sigma: Array) -> tuple[Array, ...]:
        """Logits of a block, one array `[B, classes]` for each attribute.

        Args:
          latents: `[B, n, h, w, C]`, normalised, with noise.
          sigma: float32 `[B]`, how much: `(1 - sigma) latents + sigma noise`.
        """
        batch, _, height, width, _ = latents.shape
        x = jnp.moveaxis(latents, 1, 3).reshape(batch, height, width, -1).astype(jnp.float32)
        frequencies = jnp.arange(_NOISE_FEATURES, dtype=jnp.float32)
        level = nn.Dense(self.dim, name="level")(jnp.cos(sigma[:, None] * frequencies))
        x = nn.gelu(nn.Dense(2 * self.dim, name="enter")(_neighbourhoods(x)))
        x = nn.Dense(self.dim, name="narrow")(x) + level[:, None, None]
        for layer in range(self.layers):
            y = nn.LayerNorm(name=f"norm_{layer}")(x)
            y = nn.gelu(nn.Dense(2 * self.dim, name=f"wide_{layer}")(_neighbourhoods(y)))
            x = x + nn.Dense(self.dim, name=f"back_{layer}")(y)
        x = nn.Dense(2 * self.dim, name="look")(nn.LayerNorm(name="norm")(x))
        # What there is in all, and what there is anywhere.
        pooled = jnp.concatenate([jnp.mean(x, (1, 2)), jnp.max(x, (1, 2))], axis=-1)
        pooled = nn.gelu(nn.Dense(2 * self.dim, name="join")(pooled))
        return tuple(
            nn.Dense(classes, name=field)(pooled) for field, classes in zip(FIELDS, CLASSES, strict=True)
        )


def _neighbourhoods(x: Array) -> Array:
    """Every cell with its eight neighbours, `[B, h, w, 9 D]`: a convolution is a matrix product of these."""
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return jnp.concatenate([jnp.roll(x, shift, axis=(1, 2)) for shift in shifts], axis=-1)


def init_params(reader: BlockReader, key: Array, *, block: tuple[int, int, int, int]) -> Params:
    """Random parameters of a reader of blocks (n, h, w, C)."""
    params: Params = reader.init(key, jnp.zeros((1, *block)), jnp.zeros(1))["params"]
    return params


def reader_of(params: Params, *, block: tuple[int, int, int, int], where: str) -> BlockReader:
    """The module that stored parameters are of.

    Args:
      params: a checkpoint's part "reader".
      block: (n, h, w, C) of the blocks it is to read.
      where: the checkpoint, for the error.

    Raises:
      UserError: they are of a reader of other blocks.
    """
    dim = params["narrow"]["kernel"].shape[-1]
    layers = sum(name.startswith("norm_") for name in params)
    reader, (frames, _, _, channels) = BlockReader(dim, layers), block
    shapes = jax.eval_shape(lambda key: init_params(reader, key, block=block), jax.random.key(0))
    fits = jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    require(
        fits,
        f"{where} has a reader of other blocks than {frames} latent frames of {channels} channels; train one "
        "for this model (stage reader)",
    )
    return reader


def losses(
    reader: BlockReader, params: Params, latents: Array, codes: Array, *, sigma: Array, noise: Array
) -> tuple[Array, Array]:
    """How wrong blocks are read under noise.

    Args:
      reader: the module.
      params: its parameters.
      latents: `[B, n, h, w, C]`, without noise.
      codes: int32 `[B, 4]`, what they show or ought to show; a shape may be `MISSHAPEN`.
      sigma: float32 `[B]`.
      noise: like the latents.

    Returns:
      Cross-entropy summed over the attributes, float32 `[B]`, and which are read right, bool `[B, 4]`.
    """
    at = sigma[:, None, None, None, None]
    logits: Any = reader.apply({"params": params}, (1 - at) * latents + at * noise, sigma)
    wrong = [
        optax.softmax_cross_entropy_with_integer_labels(each, codes[:, i]) for i, each in enumerate(logits)
    ]
    right = [jnp.argmax(each, axis=-1) == codes[:, i] for i, each in enumerate(logits)]
    return sum(wrong, start=jnp.zeros(len(codes))), jnp.stack(right, axis=1)
