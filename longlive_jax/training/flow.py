"""Flow matching on encoded clips: the data, the loss and the evaluation that two stages share.

A clip is trained either *bidirectionally*, all frames at one noise level and attending to each other (the
teacher), or *causally*: every block at its own noise level, attending to itself and to the keys and
values that clean latents leave in the cache, as at inference (teacher forcing). The clean pass runs block by
block without gradient; one pass over all blocks then has the gradient, straight through to the keys
and values of the earlier blocks.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import cache as cache_lib
from longlive_jax import checkpoint, sharding
from longlive_jax.cache import BlockKV, KVCache
from longlive_jax.config import PipelineConfig
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.diffusion.schedule import NUM_TIMESTEPS, shift_sigma
from longlive_jax.inference.pipeline import text_encoder_of, transformer_of, vae_of
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
from longlive_jax.training import world as worlds
from longlive_jax.training.config import FlowTraining
from longlive_jax.training.evaluation import Evaluator
from longlive_jax.training.export import base_model
from longlive_jax.training.state import Metrics, TrainState
from longlive_jax.types import Array, Params, PRNGKey

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


def encoded_clips(config: FlowTraining, frozen: Frozen) -> latents_lib.EncodedClips:
    """The stage's clips, encoded by the base's VAE."""
    folder = config.flow.cache_folder or pathlib.Path(config.run.folder).parent / "latents"
    return latents_lib.encode_clips(
        frozen.vae,
        frozen.vae_params,
        worlds.world_of(frozen.model),
        config.data,
        frames=config.flow.encoded_frames or config.data.frames,
        folder=pathlib.Path(folder),
        fingerprint=checkpoint.open_checkpoint(config.base).fingerprint("vae"),
    )


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
    """One update on `{"latents" [B, F, h, w, C], "caption" [B]}`."""
    network = state.networks[PART]
    loss = functools.partial(loss_fn, config, generator, captions)
    grads, metrics = states.gradients(
        loss, network.params, batch, state.step_key(), micro_batches=config.run.micro_batches
    )
    network, more = states.update(network, grads, config.optimizer, steps=config.run.steps)
    return TrainState(state.step + 1, state.key, {PART: network}), metrics | more


def loss_fn(
    config: FlowTraining,
    generator: Generator,
    captions: Array,
    params: Params,
    batch: dict[str, Array],
    key: PRNGKey,
) -> tuple[Array, Metrics]:
    """Mean square error of the velocity; the first clips of a batch are the causal ones."""
    drop_key, level_key, noise_key, past_key = jax.random.split(key, 4)
    latents = batch["latents"]  # [B, F, h, w, C]
    size, block = latents.shape[0], generator.window.block_frames
    causal = round(size * config.flow.causal_share)
    dropped = jax.random.uniform(drop_key, (size,)) < config.flow.text_dropout
    rows = jnp.where(dropped, captions.shape[0] - 1, batch["caption"])
    text = generator.encode_text(params, captions[rows])
    shape = (size, latents.shape[1])
    sigma = _noise_levels(config, level_key, shape, block=block, causal=causal)  # [B, F]
    noise = jax.random.normal(noise_key, latents.shape)
    wide = sigma[:, :, None, None, None]
    noisy, target = (1 - wide) * latents + wide * noise, noise - latents

    total, metrics = jnp.zeros(()), {}
    if causal:
        first_text = jax.tree.map(lambda x: x[:, :causal], text)
        past = _past(config, past_key, latents[:causal])
        kept = clean_pass(generator, params, first_text, past)
        context = ClipContext(kept.key, kept.value, jnp.ones(latents.shape[1]), generator.window)
        found = velocity(generator, params, noisy[:causal], sigma[:causal], first_text, context)
        metrics["loss_causal"] = jnp.mean(jnp.square(found - target[:causal]))
        total += metrics["loss_causal"] * causal / size
    if causal < size:
        later_text = jax.tree.map(lambda x: x[:, causal:], text)
        found = velocity(generator, params, noisy[causal:], sigma[causal:, :1], later_text, None)
        metrics["loss_bidirectional"] = jnp.mean(jnp.square(found - target[causal:]))
        total += metrics["loss_bidirectional"] * (size - causal) / size
    return total, metrics if len(metrics) > 1 else {}


def _noise_levels(
    config: FlowTraining, key: PRNGKey, shape: tuple[int, int], *, block: int, causal: int
) -> Array:
    """Noise levels `[B, F]` in (0, 1): one per block of the causal clips, one per clip of the others."""
    size, frames = shape
    drawn = (size, -(-frames // block))
    if config.flow.levels == "logit_normal":
        level = jax.nn.sigmoid(jax.random.normal(key, drawn))
    else:
        level = jax.random.uniform(key, drawn)
    level = shift_sigma(level, config.flow.shift)
    level = jnp.where(jnp.arange(size)[:, None] < causal, level, level[:, :1])
    return jnp.repeat(jnp.asarray(level), block, axis=1)[:, :frames]


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


def evaluator(config: FlowTraining, frozen: Frozen, sample: Any) -> Evaluator:
    """Samples clips of unseen combinations.

    Args:
      config: of the stage.
      frozen: its frozen parts.
      sample: `sampling.bidirectional` or `sampling.causal`.
    """
    model, flow, settings = frozen.model, config.flow, config.evaluation
    scenes = worlds.held_out_scenes(worlds.world_of(model), clips=settings.clips, seed=settings.seed)
    captions = np.asarray(frozen.captions)
    size = model.latent_size(model.video.height, model.video.width)
    # On one device, unlike the generator under training.
    generator = dataclasses.replace(frozen.generator, transformer=transformer_of(model))

    def latents(params: Params, text: Array, seeds: Array) -> Array:
        empty = None if flow.guidance == 1 else jnp.broadcast_to(captions[-1], text.shape)
        result: Array = sample(
            generator,
            params,
            sampling.Prompts(text, empty),
            seeds,
            shape=(settings.frames, *size, model.vae.z_dim),
            steps=flow.sample_steps,
            shift=flow.shift,
            guidance=flow.guidance,
        )
        return result

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
