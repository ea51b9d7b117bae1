"""Distribution matching distillation: the one step of the generator and the one of the critic.

Both begin alike: the generator rolls out the next clip of a sequence, without gradient. The critic
then learns to tell the noise in that clip; the generator runs its exit steps again with gradient
and is moved to where teacher and critic disagree less. Stage `init` makes a new sequence for every step,
as long as one clip. Stage `long` carries sequences from step to step, in `TrainState.extra`.

With a LoRA the trained parameters are its own, and the frozen weights they are added to are an
argument (`Given`). They are added in float32 before a step begins, so a step runs the very weights
that inference does, rounding included.

Source: LongLive `trainer/distillation.py`, `model/dmd.py`, `model/streaming_training.py` (v1.0).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import lora, sharding
from longlive_jax.config import TransformerConfig
from longlive_jax.inference.parts import vae_of
from longlive_jax.models.transformer import Transformer
from longlive_jax.models.vae import WanVAE
from longlive_jax.training import losses
from longlive_jax.training import state as states
from longlive_jax.training.config import DistillTraining, LongTraining
from longlive_jax.training.losses import DMDConfig, ScoreFn
from longlive_jax.training.rollout import Rollout, Sequence
from longlive_jax.training.state import Metrics, TrainState
from longlive_jax.training.student import Student
from longlive_jax.types import Array, Params, PRNGKey, pytree

GENERATOR, CRITIC = "generator", "critic"
OPTIMIZERS = {GENERATOR: "optimizer", CRITIC: "critic_optimizer"}
"""What the config calls their optimisers; see `DistillTraining.updates`."""


@pytree
class Given:
    """What distillation reads and never changes; arguments of its programs, sharded like the rest.

    Attributes:
      teacher: the teacher's parameters.
      bases: "generator" and "critic" to the parameters a LoRA is added to; {} where all weights train.
      negative: `[1, M, text_dim]` embeddings of the negative prompt.
      vae: the VAE's parameters; None where no clip overlaps with an earlier one.
    """

    teacher: Params
    bases: dict[str, Params]
    negative: Array
    vae: Params | None


@dataclasses.dataclass(frozen=True)
class Distillation(Student):
    """How a stage distils: the student, which is the module of generator and critic, and the teacher."""

    config: DistillTraining

    @functools.cached_property
    def teacher(self) -> Transformer:
        """The teacher's module."""
        return dataclasses.replace(self.student, config=self.config.teacher_transformer, remat="none")

    @functools.cached_property
    def vae(self) -> WanVAE:
        """The VAE's module."""
        return vae_of(self.model)

    def weights(self, given: Given, name: str, trained: Params) -> Params:
        """The parameters of the generator or the critic from those under training."""
        if name not in given.bases:
            return trained
        return lora.merge(given.bases[name], trained, scale=self.config.lora.scale)


# --- sequences ------------------------------------------------------------------------------------


def begin(distillation: Distillation, text: Array, key: PRNGKey) -> Sequence:
    """A sequence of one clip for every prompt `[B, M, text_dim]` (stage `init`)."""
    sequence = distillation.forcing.begin(
        text,
        jax.random.bits(key, text.shape[:1], jnp.uint32),
        latent_size=distillation.latent_size,
        history_frames=distillation.config.rollout.clip_frames,
    )
    return sharding.constrain(sequence, distillation.mesh)


def begin_long(
    distillation: Distillation, state: TrainState, text: Array, switch_text: Array | None, *, name: str
) -> Sequence:
    """New sequences for the update of a network (stage `long`).

    Args:
      distillation: how.
      state: its step and key give the seeds and the switch frames.
      text: `[B, M, text_dim]` prompts.
      switch_text: like it, the prompts to switch to; None where nothing switches.
      name: the network whose update needs them.

    Returns:
      See `Student.begin_long`.
    """
    return distillation.begin_long(text, switch_text, jax.random.fold_in(_key(state, name), 1))


# --- steps ----------------------------------------------------------------------------------------


def train(
    distillation: Distillation, name: str, state: TrainState, given: Given, text: Array
) -> tuple[TrainState, Metrics]:
    """One update of a network on new clips (stage `init`); the critic's ends a step.

    Args:
      distillation: how.
      name: "generator" or "critic".
      state: before the update.
      given: the frozen parameters.
      text: `[B, M, text_dim]` prompts.
    """
    frames, parts = distillation.config.rollout.clip_frames, distillation.config.run.micro_batches

    def one(text: Array, key: PRNGKey) -> tuple[tuple[Params, Metrics], None]:
        begin_key, key = jax.random.split(key)
        sequence = begin(distillation, text, begin_key)
        return _gradients(distillation, state, given, sequence, key, name, frames)[0], None

    keys = jax.random.split(_key(state, name), parts)
    (grads, metrics), _ = states.averaged(one, states.split_rows(text, parts), keys)
    return _updated(distillation, state, name, grads, metrics)


def train_long(
    distillation: Distillation, name: str, state: TrainState, given: Given, *, new_frames: int
) -> tuple[TrainState, Metrics]:
    """One update of a network on the next clip of the sequences in `state.extra` (stage `long`).

    Args:
      distillation: how.
      name: "generator" or "critic"; the critic's update ends a step.
      state: before the update.
      given: the frozen parameters.
      new_frames: of the clip, one of `Streaming.choices`.
    """

    def one(sequence: Sequence, key: PRNGKey) -> tuple[tuple[Params, Metrics], Sequence]:
        return _gradients(distillation, state, given, sequence, key, name, new_frames)

    keys = jax.random.split(_key(state, name), distillation.config.run.micro_batches)
    (grads, metrics), sequences = states.averaged(one, state.extra, keys)
    state = dataclasses.replace(state, extra=sequences)
    return _updated(distillation, state, name, grads, metrics)


def _gradients(
    distillation: Distillation,
    state: TrainState,
    given: Given,
    sequence: Sequence,
    key: PRNGKey,
    name: str,
    new_frames: int,
) -> tuple[tuple[Params, Metrics], Sequence]:
    """Rolls out the next clip of a sequence and differentiates the loss of one of the networks on it."""
    exit_key, key = jax.random.split(key)
    after, rollout = distillation.next_clip(
        distillation.weights(given, GENERATOR, state.networks[GENERATOR].params),
        sequence,
        exit_key,
        new_frames=new_frames,
        keep_context=name == GENERATOR,
    )
    loss_fn = _generator_loss if name == GENERATOR else _critic_loss
    loss = functools.partial(loss_fn, distillation, state, given, rollout, key)
    (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state.networks[name].params)
    return (grads, {"loss": value, **metrics}), after


def _generator_loss(
    distillation: Distillation,
    state: TrainState,
    given: Given,
    rollout: Rollout,
    key: PRNGKey,
    trained: Params,
) -> tuple[Array, Metrics]:
    """Distribution matching on the clip of a rollout."""
    latents = distillation.forcing.latents(distillation.weights(given, GENERATOR, trained), rollout)
    clip, mask = _clip(distillation, given, rollout, latents)
    timesteps, noise = _noise(distillation, key, clip)
    critic = distillation.weights(given, CRITIC, state.networks[CRITIC].params)
    negative = jnp.broadcast_to(given.negative, rollout.text.shape)
    loss, report = losses.dmd_loss(
        distillation.config.dmd,
        clip,
        timesteps,
        noise,
        critic=score(distillation.student, critic, rollout.text),
        teacher=score(distillation.teacher, given.teacher, rollout.text),
        teacher_uncond=score(distillation.teacher, given.teacher, negative),
        mask=mask,
        weight=_frame_weights(distillation.config.dmd, rollout, clip.shape[1]),
    )
    return loss, {
        "dmd_gradient": jnp.mean(jnp.abs(report.gradient)),
        "teacher_distance": jnp.mean(report.normalizer),
        "exit_step": jnp.mean(rollout.exit_steps.astype(jnp.float32)),
        "clip_std": jnp.std(jax.lax.stop_gradient(latents)),
    }


def _frame_weights(dmd: DMDConfig, rollout: Rollout, frames: int) -> Array | None:
    """How much the frames `[F]` of a clip, the last of which are the rollout's, count for the generator."""
    if dmd.opening_weight == 1:
        return None
    opens = jnp.pad(rollout.opens, (frames - rollout.opens.shape[0], 0))
    return jnp.where(opens, dmd.opening_weight, 1.0)


def _critic_loss(
    distillation: Distillation,
    state: TrainState,
    given: Given,
    rollout: Rollout,
    key: PRNGKey,
    trained: Params,
) -> tuple[Array, Metrics]:
    """Flow matching on the clip of a rollout."""
    clip, mask = _clip(distillation, given, rollout, rollout.latents)
    timesteps, noise = _noise(distillation, key, clip)
    critic = distillation.weights(given, CRITIC, trained)
    loss = losses.critic_loss(
        distillation.config.dmd,
        clip,
        timesteps,
        noise,
        critic=score(distillation.student, critic, rollout.text),
        mask=mask,
    )
    return loss, {}


def score(transformer: Transformer, params: Params, text: Array) -> ScoreFn:
    """A bidirectional model under the prompts `[B, M, text_dim]`, as the losses ask for it."""
    context = transformer.apply({"params": params}, text, method="text_context")

    def velocity(noisy: Array, timesteps: Array) -> Array:
        result: Any = transformer.apply({"params": params}, noisy, timesteps, context)
        return result[0]

    return velocity


def _clip(
    distillation: Distillation, given: Given, rollout: Rollout, latents: Array
) -> tuple[Array, Array | None]:
    """The clip that is scored, and the frames that count."""
    if not isinstance(distillation.config, LongTraining):
        return latents, None
    vae, vae_params = distillation.vae, given.vae
    assert vae_params is not None, given.vae

    def decode(latents: Array) -> Array:
        video: Any = vae.apply({"params": vae_params}, latents, method="decode")
        return video

    def encode(video: Array) -> Array:
        found: Any = vae.apply({"params": vae_params}, video, method="encode")
        return found

    return distillation.streaming.clip(rollout, latents, decode=decode, encode=encode)


def _noise(distillation: Distillation, key: PRNGKey, clip: Array) -> tuple[Array, Array]:
    """Timesteps `[B]` and noise like the clip."""
    time_key, noise_key = jax.random.split(key)
    timesteps = losses.draw_timesteps(distillation.config.dmd, time_key, clip.shape[0])
    return timesteps, jax.random.normal(noise_key, clip.shape)


def _updated(
    distillation: Distillation, state: TrainState, name: str, grads: Params, metrics: Metrics
) -> tuple[TrainState, Metrics]:
    """The state after an update; the critic's is the last one of a step."""
    is_generator = name == GENERATOR
    optimizer, steps = distillation.config.updates[OPTIMIZERS[name]]
    network, more = states.update(state.networks[name], grads, optimizer, steps=steps)
    step = state.step if is_generator else state.step + 1
    state = dataclasses.replace(state, step=step, networks={**state.networks, name: network})
    prefix = "generator_" if is_generator else ""
    return state, {f"{prefix}{key}": value for key, value in (metrics | more).items()}


def step_flops(distillation: Distillation) -> float:
    """Model operations of an average step: the critic's update and its share of a generator's.

    Both roll out a clip (on average half of the sampler's passes and one more, and the context pass). The
    generator's update adds two scores of the teacher, one of the critic, and its own pass with gradient,
    which counts three times; the critic's adds its own.
    """
    config, model = distillation.config, distillation.model
    tokens = config.rollout.clip_frames * model.transformer.frame_len(*distillation.latent_size)
    student, teacher = (
        forward_flops(shape, tokens) for shape in (model.transformer, config.teacher_transformer)
    )
    rollout = (len(model.sampler.steps) + 1) / 2 + 1
    generator = (rollout + 1 + 3) * student + 2 * teacher
    critic = (rollout + 3) * student
    return config.data.batch_size * (critic + generator / config.scores.critic_updates)


def forward_flops(config: TransformerConfig, tokens: int) -> float:
    """Operations of a forward pass whose tokens all attend to each other, without the text's."""
    matrices = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim  # q, k, v, o; q and o of the text; ffn
    return 2 * tokens * config.num_layers * (matrices + 2 * config.dim * (tokens + config.text_len))


def host_random(seed: int, step: int, name: str) -> np.random.Generator:
    """The random numbers of an update that decide which program runs; the same in every process."""
    return np.random.default_rng((seed, step, _STREAMS[name]))


_STREAMS = {GENERATOR: 0, CRITIC: 1}


def _key(state: TrainState, name: str) -> PRNGKey:
    """The random key of an update in the step to come."""
    return jax.random.fold_in(state.step_key(), _STREAMS[name])
