"""The autoencoder that a config means: Wan's (also the pruned LightVAE, which is narrower) or TAEHV."""

from typing import Any

import jax.numpy as jnp

from longlive_jax.config import VAEConfig
from longlive_jax.models import tiny_vae, vae
from longlive_jax.models.tiny_vae import TinyVAE
from longlive_jax.models.vae import WanVAE
from longlive_jax.types import Params, PRNGKey


def make(config: VAEConfig, *, dtype: Any = jnp.float32, tile: int = 0) -> WanVAE | TinyVAE:
    """The flax module of a config; `tile` as in `WanVAE`."""
    module = TinyVAE if config.family == "taehv" else WanVAE
    return module(config, tile=tile, dtype=dtype)


def init_params(module: WanVAE | TinyVAE, key: PRNGKey) -> Params:
    """Random parameters of a module of `make`."""
    return tiny_vae.init_params(module, key) if isinstance(module, TinyVAE) else vae.init_params(module, key)
