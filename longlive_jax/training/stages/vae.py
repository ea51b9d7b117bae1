"""Stage `vae`: the causal video autoencoder, on rendered clips.

The loss is the mean error of the pixels, those of the sprite weighted, with noise on the latents and a
pull towards zero: together the KL divergence of a posterior of fixed width from a standard normal. It
leaves latents that are smooth and that a decoder forgives small errors of, which is what a diffusion
model needs. `vae.anchor_weight` ties them to a linear code of the frames besides (`training.anchor`).

Images come first, then clips, as for the VAE this one is modelled on: a run on single frames
(`data.frames=1`) is many times cheaper per scene, and a run on clips goes on from it (`base`). Before
its first step the model is one of images: it looks at no past frame, and four frames share the latent
of the last of them.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint, sharding, toy
from longlive_jax.config import PipelineConfig
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.models import vae as vae_lib
from longlive_jax.models.vae import WanVAE
from longlive_jax.toy import data as toy_data
from longlive_jax.toy.renderer import BACKGROUND_TABLE
from longlive_jax.training import anchor as anchors
from longlive_jax.training import export as export_lib
from longlive_jax.training import processes
from longlive_jax.training import state as states
from longlive_jax.training import world as worlds
from longlive_jax.training.anchor import LinearCode
from longlive_jax.training.config import VAETraining
from longlive_jax.training.loop import Resume, TrainingRun, make_mesh
from longlive_jax.training.state import Metrics, TrainState
from longlive_jax.types import Array, Params, PRNGKey

PART = "vae"

ENCODER = ("encoder", "quant")
"""The parts of its parameters that decide what the latents are."""

_SPRITE_DISTANCE = 0.3  # of a sprite's pixel from its background in some channel, in [-1, 1] units


def train(config: VAETraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Trains the VAE and exports it with the statistics of its latents; returns the report."""
    mesh = make_mesh(config)
    vae, world = training_vae(config.model), worlds.world_of(config.model)
    video_frames = config.model.vae.video_frames(config.data.frames)
    clips = iter(
        toy_data.clips(world, worlds.stream_config(config.data), frames=video_frames, shard=worlds.shard())
    )
    step_fn = jax.jit(functools.partial(train_step, config, vae), donate_argnums=0)
    code = None
    if config.vae.anchor_weight:
        clip_count = config.vae.statistics_clips
        code = anchors.fit(world, config.model.vae, clips=clip_count, seed=config.data.seed)
    with TrainingRun(config, resume=resume, is_quiet=is_quiet) as run:
        start, frozen = start_params(config)
        state = sharding.init_sharded(functools.partial(init, config, vae), start, mesh=mesh)
        frozen, code = sharding.place(frozen, mesh), jax.device_put(code, sharding.replicated(mesh))
        state = run.start(state, clips)
        for step in run.steps():
            batch = next(clips)
            batch = sharding.place_batch({name: batch[name] for name in ("video", "attributes")}, mesh)
            state, metrics = step_fn(state, frozen, code, batch)
            run.after(step, state, metrics, frames=config.data.batch_size * video_frames)
            if run.is_evaluation_due(step):
                params = processes.to_host({**frozen, **state.networks[PART].best})
                run.evaluated(step, *evaluate(config, params))
            if run.is_early_export_due(step):
                run.exported(step, export(config, processes.to_host({**frozen, **state.networks[PART].best})))
        folder = export(config, processes.to_host({**frozen, **state.networks[PART].best}))
        return run.finish(export=folder)


def training_vae(model: PipelineConfig) -> WanVAE:
    """The VAE without normalisation: its latents' statistics are known after training only."""
    channels = model.vae.z_dim
    plain = dataclasses.replace(model.vae, latent_mean=(0.0,) * channels, latent_std=(1.0,) * channels)
    return WanVAE(plain, dtype=jnp.dtype(model.dtype))


def start_params(config: VAETraining) -> tuple[Params | None, Params]:
    """What is trained of the base's VAE (None without a base), and what is not ({} if all is)."""
    if not config.base:
        return None, {}
    base = checkpoint.open_checkpoint(config.base)
    params = base.load(PART, dtype=np.float32, expect=expected_tree(PART, config.model))
    kept = ENCODER if config.vae.trained == "decoder" else ()
    trained = {name: tree for name, tree in params.items() if name not in kept}
    return trained, {name: params[name] for name in kept}


def init(config: VAETraining, vae: WanVAE, start: Params | None) -> TrainState:
    """The state before the first step."""
    params = start
    if params is None:
        params = as_image_model(vae_lib.init_params(vae, jax.random.key(config.run.seed)))
    network = states.init_network(params, config.optimizer, steps=config.run.steps)
    return states.init_state({PART: network}, config.run)


def as_image_model(params: Params) -> Params:
    """Random parameters changed so that no frame depends on an earlier one.

    Causal convolutions keep the tap of the current frame alone, at the variance of a 2D kernel. Where
    time is halved the last frame is taken, where it is doubled the frame is repeated.
    """

    def change(path: Any, leaf: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("time_conv/kernel"):  # [3, 1, 1, D, D or 2 D]
            copies = leaf.shape[-1] // leaf.shape[-2]
            last = jnp.tile(jnp.eye(leaf.shape[-2], dtype=leaf.dtype), (1, copies))
            return jnp.zeros_like(leaf).at[-1, 0, 0].set(last)
        if leaf.ndim == 5:  # [3, 3, 3, D, E]
            return jnp.zeros_like(leaf).at[-1].set(leaf[-1] * 3**0.5)
        return leaf

    return jax.tree_util.tree_map_with_path(change, params)


def train_step(
    config: VAETraining,
    vae: WanVAE,
    state: TrainState,
    frozen: Params,
    code: LinearCode | None,
    batch: dict[str, Array],
) -> tuple[TrainState, Metrics]:
    """One update on `{"video" [B, V, Y, X, 3], "attributes" [B, 4]}`."""
    loss = functools.partial(loss_fn, config, vae, frozen, code)
    return states.train_alone(config, PART, loss, state, batch)


def loss_fn(
    config: VAETraining,
    vae: WanVAE,
    frozen: Params,
    code: LinearCode | None,
    trained: Params,
    batch: dict[str, Array],
    key: PRNGKey,
) -> tuple[Array, Metrics]:
    """Weighted error of the pixels, the size of the latents, and their distance from the linear code."""
    params, video = {**frozen, **trained}, batch["video"]
    latents = encode(vae, params, video)
    noise = jax.random.normal(key, latents.shape) * config.vae.latent_noise
    error = decode(vae, params, latents + noise) - video  # [B, V, Y, X, 3]
    weight = sprite_weights(video, batch["attributes"], config.vae.sprite_weight)
    pixels = jnp.mean(weight * (jnp.abs(error) + jnp.square(error))) / jnp.mean(weight)
    size = jnp.mean(jnp.square(latents))
    loss = pixels + config.vae.latent_weight * size
    metrics = {"pixels": pixels, "mse": jnp.mean(jnp.square(error)), "latent_size": size}
    if code is not None:
        metrics["anchor"] = jnp.mean(jnp.square(latents - code(video, config.model.vae)))
        loss += config.vae.anchor_weight * metrics["anchor"]
    return loss, metrics


def sprite_weights(video: Array, attributes: Array, weight: float) -> Array:
    """`weight` where a pixel is not the background's, else 1: `[B, V, Y, X, 1]`."""
    background = jnp.asarray(BACKGROUND_TABLE)[attributes[:, toy.FIELDS.index("background")]] * 2 - 1
    distance = jnp.max(jnp.abs(video - background[:, None, None, None]), axis=-1, keepdims=True)
    return jnp.where(distance > _SPRITE_DISTANCE, weight, 1.0)


def encode(vae: WanVAE, params: Params, video: Array) -> Array:
    """Like `WanVAE.encode`, all frames after the first together: no scan, faster where memory allows."""

    def run(vae: WanVAE, video: Array) -> Array:
        batch, _, height, width, _ = video.shape
        state = vae_lib.init_encoder_state(vae.config, batch, height=height, width=width, dtype=vae.dtype)
        first, state = vae.encoder(video[:, :1].astype(vae.dtype), state)
        moments = first
        if video.shape[1] > 1:
            later, _ = vae.encoder(video[:, 1:].astype(vae.dtype), state)
            moments = jnp.concatenate([first, later], axis=1)  # [B, F, h, w, 2 C]
        mean, _ = jnp.split(vae.quant(moments).astype(jnp.float32), 2, axis=-1)
        return mean

    result: Any = vae.apply({"params": params}, video, method=run)
    return result


def decode(vae: WanVAE, params: Params, latents: Array) -> Array:
    """Like `WanVAE.decode`, all latents after the first together and nothing clipped."""

    def run(vae: WanVAE, latents: Array) -> Array:
        batch, frames, height, width, _ = latents.shape
        state = vae.init_decode_state(batch, height=height, width=width)
        hidden = vae.post_quant(latents.astype(vae.dtype))
        video, state = vae.decoder(hidden[:, :1], state)
        if frames > 1:
            later, _ = vae.decoder(hidden[:, 1:], state)
            video = jnp.concatenate([video, later], axis=1)
        return video.astype(jnp.float32)

    result: Any = vae.apply({"params": params}, latents, method=run)
    return result


def evaluate(config: VAETraining, params: Params) -> tuple[dict[str, float], np.ndarray]:
    """What is left of clips of unseen combinations after encoding and decoding, as a stream.

    Returns:
      Scores by name, and the originals with the reconstructions on their right `[B, V, Y, 2 X, 3]`.
    """
    world, settings = worlds.world_of(config.model), config.evaluation
    scenes = worlds.held_out_scenes(world, clips=settings.clips, seed=settings.seed)
    frames = config.model.vae.video_frames(settings.frames)
    vae, original, decoded = training_vae(config.model), [], []
    for at in range(0, settings.clips, settings.batch_size):
        video = toy.render(world, scenes[slice(at, at + settings.batch_size)], frames=frames)
        original.append(np.asarray(video))
        decoded.append(np.asarray(_round_trip(vae, params, video)))
    before, after = np.concatenate(original), np.concatenate(decoded)
    scores = worlds.adherence(world, after, scenes.codes)
    # The peak-to-peak range of [-1, 1] is 2.
    scores["psnr"] = float(10 * np.log10(4 / np.mean(np.square(after - before))))
    return scores, np.concatenate([before, after], axis=3)


def statistics(config: VAETraining, params: Params) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of every latent channel over training clips."""
    world, vae = worlds.world_of(config.model), training_vae(config.model)
    frames, step = config.model.vae.video_frames(config.evaluation.frames), config.evaluation.batch_size
    moments = []
    for at in range(0, config.vae.statistics_clips, step):
        scenes = toy.sample_scenes(world, seed=config.data.seed, indices=np.arange(at, at + step))
        latents = np.asarray(_encode(vae, params, toy.render(world, scenes, frames=frames)), np.float64)
        moments.append((latents.mean((0, 1, 2, 3)), np.square(latents).mean((0, 1, 2, 3))))
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 1e-8))
    return tuple(float(round(x, 6)) for x in mean), tuple(float(round(x, 6)) for x in std)


def export(config: VAETraining, params: Params) -> pathlib.Path:
    """Writes the checkpoint directory with the measured statistics in its config."""
    mean, std = statistics(config, params)
    vae = dataclasses.replace(config.model.vae, latent_mean=mean, latent_std=std)
    return export_lib.export(config, {PART: params}, model=dataclasses.replace(config.model, vae=vae))


@functools.partial(jax.jit, static_argnums=0)
def _round_trip(vae: WanVAE, params: Params, video: Array) -> Array:
    result: Any = vae.apply({"params": params}, video)
    return result


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: WanVAE, params: Params, video: Array) -> Array:
    result: Any = vae.apply({"params": params}, video, method="encode")
    return result
