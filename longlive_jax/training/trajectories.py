"""The teacher's way from noise to a clip: what the causal student regresses (ODE initialisation).

The bidirectional teacher solves its probability-flow ODE once per prompt, with the Euler solver that samples
from it. Kept (in `training.stored`) are the states at the noise levels of the student's denoising steps,
and the end point.

Source: the ODE initialisation of CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009).
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from longlive_jax import toy
from longlive_jax.config_dict import to_dict
from longlive_jax.inference.rollout import Generator
from longlive_jax.training import sampling, stored
from longlive_jax.training import world as worlds
from longlive_jax.training.config import ClipsConfig
from longlive_jax.training.sampling import Solver
from longlive_jax.training.stored import StoredClips
from longlive_jax.types import Array, Params

NAME = "states"

_SOLVED_TOGETHER = 16
_NOISE_STREAM = 3  # keeps a trajectory's noise independent of its scene, as in `toy.data`


def solve_clips(
    generator: Generator,
    params: Params,
    captions: Array,
    world: toy.World,
    clips: ClipsConfig,
    *,
    latent_shape: tuple[int, int, int],
    solver: Solver,
    folder: pathlib.Path,
    fingerprints: Sequence[str],
) -> StoredClips:
    """Solves the trajectories that are not on disk yet; rows are "states" `[B, F, K + 1, h, w, C]`.

    State k is that at the student's k-th denoising step (the first is noise), the last one the end point.

    Args:
      generator: the teacher's transformer, with the student's sampler.
      params: the teacher's parameters.
      captions: `[K, M, text_dim]` embeddings of `world.caption_table()`.
      world: of the prompts.
      clips: which prompts, how many, latent frames of each.
      latent_shape: (h, w, C) of a latent frame.
      solver: how the ODE is solved.
      folder: shared by all processes.
      fingerprints: identify the weights of transformer and text encoder, and the tokenizer.
    """
    key = stored.digest(
        {
            "teacher": [*fingerprints, to_dict(generator.transformer.config)],
            "dtype": str(generator.transformer.dtype),
            "world": dataclasses.asdict(world),
            "clips": [clips.seed, clips.split, clips.frames, *latent_shape],
            "solver": dataclasses.asdict(solver),
            "sampler": to_dict(generator.sampler),
        }
    )
    shape = (clips.frames, *latent_shape)
    params, captions = jax.device_put((params, np.asarray(captions)), jax.local_devices()[0])

    def make(indices: np.ndarray, scenes: toy.Scenes) -> np.ndarray:
        rows = worlds.caption_rows(scenes.codes, scenes.template)
        prompts = solver.prompts(captions[rows], captions[-1])
        seeds = noise_seeds(clips, indices)
        return np.asarray(_solve(generator, params, prompts, seeds, shape=shape, solver=solver))

    folder = folder / f"ode-{clips.frames}-{key}"
    return StoredClips(folder, world, clips, NAME).complete(make, together=_SOLVED_TOGETHER)


def noise_seeds(clips: ClipsConfig, indices: np.ndarray) -> np.ndarray:
    """Seeds of the noise the trajectories begin with, uint32 `[B]`."""
    streams = [toy.world.generator(clips.seed, int(i), _NOISE_STREAM) for i in indices]
    return np.array([stream.integers(1 << 32) for stream in streams], np.uint32)


_solve = jax.jit(sampling.trajectories, static_argnums=0, static_argnames=("shape", "solver"))
