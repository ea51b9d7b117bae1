"""Flow matching and ODE regression: the data, the loss and the evaluation that two stages share.

A clip is trained either *bidirectionally*, its frames attending to each other, at one noise level or
each at its own (the teacher), or *causally*: every block at its own noise level, attending to itself and
to the keys and values that clean latents leave in the cache, as at inference (teacher forcing). The
clean pass runs block by block without gradient; one pass over all blocks then has the gradient, straight
through to the keys and values of the earlier blocks.

What a block is asked for depends on the batch (`task_of`). Encoded clips are noised to any level, for the
velocity of that noise. Trajectories of the teacher bring their own noisy states, at the levels of the
student's denoising steps, and it is their end that the student must find (ODE regression).
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import cache as cache_lib
from longlive_jax import checkpoint, sharding
from longlive_jax.cache import BlockKV, KVCache
from longlive_jax.config import PipelineConfig
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.diffusion.schedule import NUM_TIMESTEPS, few_step_table, shift_sigma
from longlive_jax.inference.parts import text_encoder_of, transformer_of, vae_of
from longlive_jax.inference.rollout import Generator
from longlive_jax.models import text_encoder as text_lib
from longlive_jax.models import transformer as transformer_lib
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.models.transformer import TextContext
from longlive_jax.models.vae import WanVAE
from longlive_jax.ops.windowed_attention import ClipContext
from longlive_jax.training import latents as latents_lib
from longlive_jax.training import sampling
from longlive_jax.training import state as states
from longlive_jax.training import trajectories as trajectories_lib
from longlive_jax.training import world as worlds
from longlive_jax.training.config import FlowTraining
from longlive_jax.training.evaluation import Evaluator
from longlive_jax.training.export import base_model
from longlive_jax.training.state import Metrics, TrainState
from longlive_jax.training.stored import StoredClips
from longlive_jax.types import Array, Params, PRNGKey, pytree

Sample: TypeAlias = Callable[..., Array]
"""`(generator, params, prompts, seeds, *, shape) -> latents`, as `sampling.few_step`."""

PART = "transformer"
NEEDS = ("vae", "text_encoder")


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a stage takes from its base and does not train.

    Attributes:
      model: the stage's model with the base's latent statistics.
      generator: the transformer with window and sampler.
      vae_params: of the VAE.
      captions: `[K, M, text_dim]` embeddings of `world.caption_table()`; the last is the empty prompt.
      start: the transformer to begin with; None begins with random weights.
    """

    model: PipelineConfig
    generator: Generator
    vae_params: Params
    captions: Array
    start: Params | None

    @property
    def vae(self) -> WanVAE:
        return vae_of(self.model)

    @property
    def local_generator(self) -> Generator:
        """The generator on one device, unlike the one under training."""
        return dataclasses.replace(self.generator, transformer=transformer_of(self.model))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of a latent frame."""
        video = self.model.video
        height, width = self.model.latent_size(video.height, video.width)
        return height, width, self.model.vae.z_dim


def load_frozen(config: FlowTraining, mesh: jax.sharding.Mesh) -> Frozen:
    """Loads the base's VAE, embeds every caption once, and loads the transformer where there is one."""
    base = checkpoint.open_checkpoint(config.base)
    model = base_model(config, base)
    transformer = dataclasses.replace(
        transformer_of(model), remat=config.remat, batch_sharding=sharding.batch_sharding(mesh)
    )
    start = None
    if PART in base.parts:
        start = base.load(PART, dtype=np.float32, expect=expected_tree(PART, model))
    return Frozen(
        model=model,
        generator=Generator(transformer, model.window, model.sampler),
        vae_params=base.load("vae", expect=expected_tree("vae", model)),
        captions=jax.device_put(_embed_captions(base, model), sharding.replicated(mesh)),
        start=start,
    )


def encoded_clips(config: FlowTraining, frozen: Frozen) -> StoredClips:
    """The stage's clips, encoded by the base's VAE."""
    return latents_lib.encode_clips(
        frozen.vae,
        frozen.vae_params,
        worlds.world_of(frozen.model),
        config.data,
        frames=config.flow.encoded_frames or config.data.frames,
        folder=_cache_folder(config),
        fingerprint=checkpoint.open_checkpoint(config.base).fingerprint("vae"),
        switches=_switches(config),
    )


def _switches(config: FlowTraining) -> worlds.Switches | None:
    """Which clips switch: at the first frame of every block but the first, equally often."""
    block = config.model.window.block_frames
    if not config.flow.switch_share:
        return None
    return worlds.Switches(config.flow.switch_share, tuple(range(block, config.data.frames, block)))


def trajectories(config: FlowTraining, frozen: Frozen) -> StoredClips:
    """The trajectories of the base's transformer for the prompts of the stage's clips."""
    base = checkpoint.open_checkpoint(config.base)
    tokenizer = hashlib.sha256(base.tokenizer_path.read_bytes()).hexdigest()
    return trajectories_lib.solve_clips(
        frozen.local_generator,
        frozen.start,
        frozen.captions,
        worlds.world_of(frozen.model),
        config.data,
        latent_shape=frozen.latent_shape,
        solver=solver(config),
        folder=_cache_folder(config),
        fingerprints=(base.fingerprint(PART), base.fingerprint("text_encoder"), tokenizer),
    )


def solver(config: FlowTraining) -> sampling.Solver:
    """How samples of the teacher, and of a student that knows all noise levels, are made."""
    flow = config.flow
    return sampling.Solver(steps=flow.sample_steps, shift=flow.shift, guidance=flow.guidance)


def _cache_folder(config: FlowTraining) -> pathlib.Path:
    return pathlib.Path(config.flow.cache_folder or pathlib.Path(config.run.folder).parent / "latents")


def init(config: FlowTraining, frozen: Frozen, mesh: jax.sharding.Mesh) -> TrainState:
    """The state before the first step, on the mesh."""

    def make(params: Params | None) -> TrainState:
        if params is None:
            key = jax.random.key(config.run.seed)
            params = transformer_lib.init_params(frozen.generator.transformer, key)
        network = states.init_network(params, config.optimizer, steps=config.run.steps)
        return states.init_state({PART: network}, config.run)

    start = None if frozen.start is None else sharding.place(frozen.start, mesh)
    return sharding.init_sharded(make, start, mesh=mesh)


def train_step(
    config: FlowTraining,
    generator: Generator,
    state: TrainState,
    batch: dict[str, Array],
    captions: Array,
) -> tuple[TrainState, Metrics]:
    """One update on a batch of `encoded_clips` or of `trajectories`."""
    loss = functools.partial(loss_fn, config, generator, captions)
    return states.train_alone(config, PART, loss, state, batch)


def loss_fn(
    config: FlowTraining,
    generator: Generator,
    captions: Array,
    params: Params,
    batch: dict[str, Array],
    key: PRNGKey,
) -> tuple[Array, Metrics]:
    """Weighted mean square error of the velocity; the first clips of a batch are the causal ones."""
    drop_key, level_key, noise_key, past_key = jax.random.split(key, 4)
    size = batch["caption"].shape[0]
    causal = round(size * config.flow.causal_share)
    dropped = jax.random.uniform(drop_key, (size,)) < config.flow.text_dropout
    rows = jnp.where(dropped, captions.shape[0] - 1, batch["caption"])
    text = generator.encode_text(params, captions[rows])
    task = task_of(config, generator, batch, level_key=level_key, noise_key=noise_key)

    def error(found: Array, task: Task) -> Array:
        return jnp.mean(task.weight * jnp.square(found - task.target))

    total, metrics = jnp.zeros(()), {}
    if causal:
        first, first_text = task.rows(slice(causal)), jax.tree.map(lambda x: x[:, :causal], text)
        kept = clean_pass(generator, params, first_text, _past(config, past_key, first.clean))
        context = ClipContext(kept.key, kept.value, jnp.ones(first.sigma.shape[1]), generator.window)
        found = velocity(generator, params, first.noisy, first.sigma, first_text, context)
        metrics["loss_causal"] = error(found, first)
        total += metrics["loss_causal"] * causal / size
    if causal < size:
        later, later_text = task.rows(slice(causal, size)), jax.tree.map(lambda x: x[:, causal:], text)
        # One timestep per clip, where it is the same for all of its frames, saves the modulation of each.
        sigma = later.sigma if config.flow.frame_levels else later.sigma[:, :1]
        found = velocity(generator, params, later.noisy, sigma, later_text, None)
        metrics["loss_bidirectional"] = error(found, later)
        total += metrics["loss_bidirectional"] * (size - causal) / size
    return total, metrics if len(metrics) > 1 else {}


@pytree
class Task:
    """What the transformer is asked for.

    Attributes:
      clean: `[B, F, h, w, C]`, what the past of a causal clip is made of.
      noisy: `[B, F, h, w, C]`, what it sees.
      sigma: `[B, F]`, the noise level of that.
      target: `[B, F, h, w, C]`, the velocity it should find.
      weight: `[B, F, 1, 1, 1]` of the squared error.
    """

    clean: Array
    noisy: Array
    sigma: Array
    target: Array
    weight: Array

    def rows(self, chosen: slice) -> "Task":
        """The same for some of the clips."""
        return jax.tree.map(lambda x: x[chosen], self)


def task_of(
    config: FlowTraining,
    generator: Generator,
    batch: dict[str, Array],
    *,
    level_key: PRNGKey,
    noise_key: PRNGKey,
) -> Task:
    """Flow matching for a batch of `encoded_clips`, ODE regression for one of `trajectories`."""
    if trajectories_lib.NAME in batch:
        return _regression(generator, level_key, batch[trajectories_lib.NAME])
    task = _matching(config, generator, batch[latents_lib.NAME], level_key=level_key, noise_key=noise_key)
    if "begin" not in batch:
        return task
    counts = jnp.arange(task.sigma.shape[1]) >= batch["begin"][:, None]  # [B, F]
    weight = counts / jnp.mean(counts, axis=1, keepdims=True)
    return dataclasses.replace(task, weight=weight[:, :, None, None, None])


def _matching(
    config: FlowTraining, generator: Generator, latents: Array, *, level_key: PRNGKey, noise_key: PRNGKey
) -> Task:
    """Clips `[B, F, h, w, C]` under noise of random levels, and the velocity of that noise."""
    size, frames = latents.shape[:2]
    block, causal = generator.window.block_frames, round(size * config.flow.causal_share)
    sigma = _noise_levels(config, level_key, (size, frames), block=block, causal=causal)
    noise = jax.random.normal(noise_key, latents.shape)
    wide = sigma[:, :, None, None, None]
    noisy = (1 - wide) * latents + wide * noise
    return Task(clean=latents, noisy=noisy, sigma=sigma, target=noise - latents, weight=jnp.ones_like(wide))


def _regression(generator: Generator, key: PRNGKey, states: Array) -> Task:
    """States `[B, F, K + 1, h, w, C]` of trajectories: for every block one of the first K, and their end.

    The velocity that leads from a state straight to the end is asked for; an error in it, times sigma, is the
    error of x0.
    """
    size, frames = states.shape[:2]
    block = generator.window.block_frames
    sigmas = jnp.asarray(few_step_table(generator.sampler).sigmas)  # [K]
    steps = jax.random.randint(key, (size, frames // block), 0, sigmas.size)
    steps = jnp.repeat(steps, block, axis=1)  # [B, F]
    noisy = jnp.take_along_axis(states, steps[:, :, None, None, None, None], axis=2)[:, :, 0]
    sigma, clean = sigmas[steps], states[:, :, -1]
    wide = sigma[:, :, None, None, None]
    return Task(clean=clean, noisy=noisy, sigma=sigma, target=(noisy - clean) / wide, weight=jnp.square(wide))


def _noise_levels(
    config: FlowTraining, key: PRNGKey, shape: tuple[int, int], *, block: int, causal: int
) -> Array:
    """Noise levels `[B, F]` in (0, 1): one per block of the causal clips, then one per frame of some clips
    (`flow.frame_levels`), then one per clip."""
    size, frames = shape
    if config.flow.levels == "logit_normal":
        level = jax.nn.sigmoid(jax.random.normal(key, shape))
    else:
        level = jax.random.uniform(key, shape)
    level = jnp.asarray(shift_sigma(level, config.flow.shift))
    clip, frame = jnp.arange(size)[:, None], jnp.arange(frames)
    apart = causal + round((size - causal) * config.flow.frame_levels)
    first = jnp.where(clip < causal, frame // block * block, jnp.where(clip < apart, frame, 0))
    return jnp.take_along_axis(level, first, axis=1)


def velocity(
    generator: Generator,
    params: Params,
    noisy: Array,
    sigma: Array,
    text: TextContext,
    context: ClipContext | None,
) -> Array:
    """The transformer's prediction at noise levels `[B, F]` or `[B, 1]`."""
    result: Any = generator.transformer.apply(
        {"params": params}, noisy, sigma * NUM_TIMESTEPS, text, context=context
    )
    return result[0]


def clean_pass(generator: Generator, params: Params, text: TextContext, latents: Array) -> BlockKV:
    """Keys and values that finished latents leave in the cache, block by block, without gradient.

    Args:
      generator: model, window, context noise.
      params: its parameters.
      text: of the B clips.
      latents: `[B, F, h, w, C]`.

    Returns:
      `[L, B, F, P, N, H]`.
    """
    params, text = jax.lax.stop_gradient((params, text))
    config, block = generator.transformer.config, generator.window.block_frames
    size, frames, height, width, _ = latents.shape
    cache = cache_lib.init(
        config,
        generator.window,
        batch=size,
        frame_len=config.frame_len(height, width),
        dtype=generator.transformer.dtype,
        total_frames=frames,
    )

    def one_block(cache: KVCache, step: tuple[Array, Array]) -> tuple[KVCache, BlockKV]:
        first, x = step
        positions = first + jnp.arange(block, dtype=jnp.int32)
        own = generator.context_pass(params, text, x, positions, cache_lib.context(cache))
        return cache_lib.write(cache, own, first), own

    blocks = latents.reshape(size, frames // block, block, *latents.shape[2:]).swapaxes(0, 1)
    firsts = jnp.arange(0, frames, block, dtype=jnp.int32)
    _, own = jax.lax.scan(one_block, cache, (firsts, blocks))

    def joined(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)  # [L, B, blocks, n, P, N, H]
        return x.reshape(*x.shape[:2], frames, *x.shape[4:])

    return jax.lax.stop_gradient(jax.tree.map(joined, own))


def evaluator(config: FlowTraining, frozen: Frozen, sample: Sample) -> Evaluator:
    """Samples clips of unseen combinations."""
    model, settings = frozen.model, config.evaluation
    scenes = worlds.held_out_scenes(worlds.world_of(model), clips=settings.clips, seed=settings.seed)
    captions = np.asarray(frozen.captions)
    generator, shape = frozen.local_generator, (settings.frames, *frozen.latent_shape)

    def latents(params: Params, text: Array, seeds: Array) -> Array:
        prompts = solver(config).prompts(text, captions[-1])
        return sample(generator, params, prompts, seeds, shape=shape)

    text = captions[worlds.caption_rows(scenes.codes, scenes.template)]
    return Evaluator(settings, model, frozen.vae_params, latents, text, scenes.codes)


def step_flops(config: FlowTraining, params: Params) -> float:
    """Operations of one update: 6 per parameter and token, plus the attention's products."""
    model = config.model.transformer
    size = config.model.latent_size(config.model.video.height, config.model.video.width)
    tokens = config.data.frames * model.frame_len(*size)
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    attention = 12 * model.num_layers * model.dim * tokens
    # The clean pass is one more forward: a third of a training pass.
    return config.data.batch_size * tokens * (6 * weights + attention) * (1 + config.flow.causal_share / 3)


def _past(config: FlowTraining, key: PRNGKey, latents: Array) -> Array:
    """The clean past of causal clips, with a little noise where the config says so."""
    if config.flow.past_noise == 0:
        return latents
    level_key, noise_key = jax.random.split(key)
    level = jax.random.uniform(level_key, (latents.shape[0], 1, 1, 1, 1)) * config.flow.past_noise
    return (1 - level) * latents + level * jax.random.normal(noise_key, latents.shape)


def _embed_captions(base: checkpoint.Checkpoint, model: PipelineConfig) -> np.ndarray:
    tokens = Tokenizer.from_file(base.tokenizer_path, model.text_encoder)(worlds.caption_table())
    encoder = text_encoder_of(model)
    params = base.load("text_encoder", expect=expected_tree("text_encoder", model))
    embed = jax.jit(lambda params, ids, lengths: text_lib.embed(encoder, params, ids=ids, lengths=lengths))
    return np.asarray(embed(params, *tokens))
