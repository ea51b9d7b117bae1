"""Axis glossary and array aliases: the only place where axis letters are defined.

Letters used in shape comments and docstrings, `# [B, F, P, D]`:

  B  batch (videos)                     L  layers
  F  latent frames                      N  heads
  h  latent rows                        H  head dimension
  w  latent columns                     D  model dimension
  C  latent channels                    S  cache slots (one latent frame each)
  P  patch tokens of one latent frame   M  text tokens (`text_len`)
  T  query tokens (= F * P)             K  key tokens
  V  video frames                       X, Y  pixel columns, pixel rows

Latents are channels-last, `[B, F, h, w, C]`; videos are `[B, V, Y, X, 3]`. The PyTorch release
uses `[B, F, C, h, w]`; only `longlive_jax.convert` and recorded files speak that layout.

`*_frames` counts latent frames, `*_len` counts tokens, a *position* is an absolute frame index in
the video, a *slot* is a physical place in the cache.
"""

import dataclasses
import typing
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np

Array: TypeAlias = jax.Array
"""A device array (or a tracer)."""

ArrayLike: TypeAlias = jax.Array | np.ndarray
"""Anything a jitted function takes as an array."""

Params: TypeAlias = Any
"""A nested dict of arrays: the `params` collection of one flax module."""

PRNGKey: TypeAlias = jax.Array
"""A typed JAX random key."""

_T = TypeVar("_T")


@typing.dataclass_transform(frozen_default=True)
def pytree(cls: type[_T]) -> type[_T]:
    """Makes a class a frozen dataclass that JAX treats as a pytree.

    Fields marked with `static()` are part of the tree's structure (hashable, not traced). Change
    fields with `dataclasses.replace`.
    """
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


def static() -> Any:
    """Marks a field of a `pytree` class as static."""
    return dataclasses.field(metadata={"static": True})
