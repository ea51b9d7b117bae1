"""Stage `reader`: a network that reads the toy world's attributes from blocks of latents, noisy or not.

It sees renders alone, encoded by the base's VAE. Some show sprites that are none of the world's shapes
(`toy.misshapen`), a class of their own. What stage `reward` follows the gradient of.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint, sharding, toy
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.inference.parts import vae_of
from longlive_jax.toy import data as toy_data
from longlive_jax.toy import reader as readers
from longlive_jax.toy.reader import MISSHAPEN, BlockReader
from longlive_jax.toy.world import SHAPE
from longlive_jax.training import export as export_lib
from longlive_jax.training import latents as latents_lib
from longlive_jax.training import processes
from longlive_jax.training import state as states
from longlive_jax.training import world as worlds
from longlive_jax.training.config import ClipsConfig, ReaderTraining
from longlive_jax.training.loop import Resume, TrainingRun, check_base, make_mesh
from longlive_jax.training.state import Metrics, TrainState
from longlive_jax.training.stored import StoredClips
from longlive_jax.types import Array, Params, PRNGKey

PART = "reader"


def train(config: ReaderTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Trains the reader and exports it beside the base's parts; returns the report."""
    check_base(config, "vae")
    mesh = make_mesh(config)
    reader = BlockReader(config.reader.dim, config.reader.layers)
    step_fn = jax.jit(functools.partial(train_step, config, reader), donate_argnums=0)
    with TrainingRun(config, resume=resume, is_quiet=is_quiet) as run:
        clips = encoded(config, config.data, share=config.reader.misshapen_share)
        batches = iter(
            toy_data.stream(
                worlds.stream_config(config.data),
                worlds.shard(),
                functools.partial(rows, clips, config.reader.misshapen_share),
            )
        )
        unseen = _unseen(config)
        state = run.start(sharding.init_sharded(functools.partial(init, config, reader), mesh=mesh), batches)
        frames = config.data.batch_size * config.model.vae.video_frames(config.data.frames)
        for step in run.steps():
            state, metrics = step_fn(state, sharding.place_batch(next(batches), mesh))
            run.after(step, state, metrics, frames=frames)
            if run.is_evaluation_due(step):
                run.evaluated(step, evaluate(config, reader, state.networks[PART].best, unseen))
            if run.is_early_export_due(step):
                run.exported(step, export(config, state.networks[PART].best))
        return run.finish(export=export(config, state.networks[PART].best))


def encoded(config: ReaderTraining, clips: ClipsConfig, *, share: float) -> StoredClips:
    """Clips encoded by the base's VAE, a share of them misshapen."""
    base = checkpoint.open_checkpoint(config.base)
    model = export_lib.base_model(config, base)
    return latents_lib.encode_clips(
        vae_of(model),
        base.load("vae", dtype=model.dtype, expect=expected_tree("vae", model)),
        worlds.world_of(model),
        clips,
        frames=clips.frames,
        folder=pathlib.Path(
            config.reader.cache_folder or pathlib.Path(config.run.folder).parent / latents_lib.NAME
        ),
        fingerprint=base.fingerprint("vae"),
        misshapen_share=share,
    )


def rows(clips: StoredClips, share: float, indices: np.ndarray) -> dict[str, np.ndarray]:
    """A batch {"latents" float32 [b, F, h, w, C], "codes" int32 [b, 4]}; a shape may be `MISSHAPEN`."""
    codes = clips.scenes(indices).codes.astype(np.int32)
    drawn = toy_data.drawings(codes, share=share, seed=clips.clips.seed, indices=indices)
    codes[:, SHAPE] = np.where([d is not None for d in drawn], MISSHAPEN, codes[:, SHAPE])
    return {"latents": clips.rows(indices)[latents_lib.NAME], "codes": codes}


def init(config: ReaderTraining, reader: BlockReader) -> TrainState:
    """The state before the first step."""
    model = config.model
    size = model.latent_size(model.video.height, model.video.width)
    block = (model.window.block_frames, *size, model.vae.z_dim)
    params = readers.init_params(reader, jax.random.key(config.run.seed), block=block)
    network = states.init_network(params, config.optimizer, steps=config.run.steps)
    return states.init_state({PART: network}, config.run)


def train_step(
    config: ReaderTraining, reader: BlockReader, state: TrainState, batch: dict[str, Array]
) -> tuple[TrainState, Metrics]:
    """One update on a batch of `rows`."""
    loss = functools.partial(loss_fn, config, reader)
    return states.train_alone(config, PART, loss, state, batch)


def loss_fn(
    config: ReaderTraining, reader: BlockReader, params: Params, batch: dict[str, Array], key: PRNGKey
) -> tuple[Array, Metrics]:
    """Mean cross-entropy, summed over the attributes, of all blocks, each under its own noise."""
    blocks, codes = _blocks(config, batch)
    level_key, clean_key, noise_key = jax.random.split(key, 3)
    sigma = config.reader.max_sigma * jax.random.uniform(level_key, codes.shape[:1])
    is_clean = jax.random.bernoulli(clean_key, config.reader.clean_share, sigma.shape)
    noise = jax.random.normal(noise_key, blocks.shape)
    wrong, right = readers.losses(
        reader, params, blocks, codes, sigma=jnp.where(is_clean, 0.0, sigma), noise=noise
    )
    return jnp.mean(wrong), {"accuracy": jnp.mean(right.all(1).astype(jnp.float32))}


def evaluate(
    config: ReaderTraining, reader: BlockReader, params: Params, unseen: dict[str, np.ndarray]
) -> dict[str, float]:
    """Shares of the blocks of unseen combinations that are read right, without noise.

    Returns:
      One per attribute and "all", of well-shaped sprites; and "misshapen", of those known as such.
    """
    blocks, codes = _blocks(config, unseen)
    clean = jax.jit(
        lambda p, x, k: readers.losses(reader, p, x, k, sigma=jnp.zeros(len(k)), noise=jnp.zeros_like(x))[1]
    )
    host = processes.to_host(params)
    right, is_misshapen = np.asarray(clean(host, blocks, codes)), codes[:, SHAPE] == MISSHAPEN
    shaped = right[~is_misshapen]
    shares = {field: float(shaped[:, i].mean()) for i, field in enumerate(toy.FIELDS)}
    return shares | {
        "all": float(shaped.all(1).mean()),
        "misshapen": float(right[is_misshapen, SHAPE].mean()),
    }


def export(config: ReaderTraining, params: Params) -> pathlib.Path:
    """Writes the checkpoint directory: the base's parts and the reader."""
    model = export_lib.base_model(config, checkpoint.open_checkpoint(config.base))
    return export_lib.export(config, {PART: params}, model=model)


def _unseen(config: ReaderTraining) -> dict[str, np.ndarray]:
    """Clips of held-out combinations, half of them misshapen."""
    settings = config.evaluation
    clips = ClipsConfig(
        batch_size=1,
        frames=config.data.frames,
        examples=settings.clips,
        seed=settings.seed,
        split="held_out",
        threads=config.data.threads,
    )
    half = 0.5
    return rows(encoded(config, clips, share=half), half, np.arange(settings.clips))


def _blocks(config: ReaderTraining, batch: Any) -> tuple[Any, Any]:
    """All blocks `[B F / n, n, h, w, C]` of clips `[B, F, h, w, C]`, and their codes."""
    latents, block = batch["latents"], config.model.window.block_frames
    count = latents.shape[1] // block
    blocks = latents.reshape(len(latents) * count, block, *latents.shape[2:])
    return blocks, batch["codes"].repeat(count, axis=0)
