"""What a model under training makes of prompts it never saw, and what the pixels say about it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from longlive_jax.config import PipelineConfig
from longlive_jax.inference.parts import vae_of
from longlive_jax.training import processes
from longlive_jax.training import world as worlds
from longlive_jax.training.config import EvaluationConfig
from longlive_jax.types import Array, Params

Sample = Callable[[Params, Array, Array], Array]
"""`(params, text [b, M, text_dim], seeds [b]) -> latents [b, F, h, w, C]`; it is jitted here."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Samples one video per prompt and reads from the pixels what they show.

    Attributes:
      settings: batch size, among others.
      model: gives the VAE and the world.
      vae_params: the VAE's parameters.
      sample: how latents are made.
      text: `[K, M, text_dim]` embeddings of the prompts, on the host.
      codes: int `[K, 4]`, the toy attributes the prompts ask for; None for prompts of another world.
    """

    settings: EvaluationConfig
    model: PipelineConfig
    vae_params: Params
    sample: Sample
    text: np.ndarray
    codes: np.ndarray | None

    @functools.cached_property
    def _run(self) -> Any:
        vae = vae_of(self.model)

        def run(params: Params, vae_params: Params, text: Array, seeds: Array) -> Array:
            latents = self.sample(params, text, seeds)
            video: Any = vae.apply({"params": vae_params}, latents, method="decode")
            return video

        return jax.jit(run)

    def videos(self, params: Params) -> np.ndarray:
        """Videos `[K, V, Y, X, 3]` in [-1, 1], made on one device of this process."""
        # Once, not with every batch.
        params, vae_params = jax.device_put(
            processes.to_host((params, self.vae_params)), jax.local_devices()[0]
        )
        made = []
        for at in range(0, len(self.text), self.settings.batch_size):
            text = self.text[at : at + self.settings.batch_size]
            seeds = np.arange(at, at + len(text), dtype=np.uint32)
            made.append(np.asarray(self._run(params, vae_params, text, seeds)))
        return np.concatenate(made)

    def scores(self, videos: np.ndarray) -> dict[str, float]:
        """Scores by name, see `world.adherence`; none for prompts of another world."""
        if self.codes is None:
            return {}
        return worlds.adherence(worlds.world_of(self.model), videos, self.codes)
