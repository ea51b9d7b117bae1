"""Reward tuning: one step of the generator towards blocks in which a reader finds what the prompt says.

A clip is rolled out as in `training.distill`: without gradient, up to an exit step per block, after which all
exit steps run again with gradient. In place of teacher and critic a frozen network reads the blocks, under
noise, and the generator follows the gradient of its cross-entropy. It is held to where it came from by the
distance of every block from what the base makes of the same noise and the same past.

Sources: DRaFT (arXiv 2309.17400), which follows the gradient of a reward through the last denoising step, and
the self-forcing rollout (arXiv 2506.08009), which makes every step a last one.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint, lora, sharding
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.errors import require
from longlive_jax.toy import reader as readers
from longlive_jax.toy.reader import BlockReader
from longlive_jax.toy.world import FIELDS
from longlive_jax.training import distill
from longlive_jax.training import export as export_lib
from longlive_jax.training import state as states
from longlive_jax.training.config import RewardTraining
from longlive_jax.training.distill_setup import Surroundings
from longlive_jax.training.rollout import Rollout, Sequence
from longlive_jax.training.state import Metrics, TrainState
from longlive_jax.training.student import Student
from longlive_jax.types import Array, Params, PRNGKey, pytree

GENERATOR = distill.GENERATOR
READER = "reader"


@pytree
class Given:
    """What is read and never changed; arguments of the programs.

    Attributes:
      base: the generator's parameters before the stage: what it is held to, and what a LoRA is added to.
      reader: the reader's.
    """

    base: Params
    reader: Params


@pytree
class Asked:
    """Sequences and what their prompts ask for; all have an axis of micro-batches in front.

    Attributes:
      sequence: of `Student.begin_long`.
      codes: int32 `[n, B / n, 4]`, attributes of the first prompts.
      switch_codes: of those after the switch; where nothing switches, the same.
    """

    sequence: Sequence
    codes: Array
    switch_codes: Array


@dataclasses.dataclass(frozen=True)
class Tuning(Student):
    """How the stage tunes.

    Attributes:
      reader: the module of the reader.
    """

    config: RewardTraining
    reader: BlockReader

    def weights(self, given: Given, trained: Params) -> Params:
        """The generator's parameters from those under training."""
        adapts = bool(self.config.lora.rank)
        return lora.merge(given.base, trained, scale=self.config.lora.scale) if adapts else trained


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything the stage holds beside its state.

    Attributes:
      tuning: what its programs are compiled for.
      given: their frozen arguments, on the mesh.
      around: what surrounds the student.
    """

    tuning: Tuning
    given: Given
    around: Surroundings


def load(config: RewardTraining, mesh: jax.sharding.Mesh) -> Setup:
    """Loads the student, the reader and what prompts and evaluations need.

    Raises:
      UserError: one of them is missing or of another shape.
    """
    base = checkpoint.open_checkpoint(config.base)
    around = Surroundings.load(config, base, mesh)
    model = around.model
    where = config.reward.reader or config.base
    opened = checkpoint.open_checkpoint(where, field="reward.reader")
    require(READER in opened.parts, f"reward.reader={where} has no reader; train one (configs/toy/reader.py)")
    read = opened.load(READER, dtype=np.float32)
    size = model.latent_size(model.video.height, model.video.width)
    block = (model.window.block_frames, *size, model.vae.z_dim)
    tuning = Tuning(config, model, mesh, readers.reader_of(read, block=block, where=where))
    params = base.load("transformer", dtype=np.float32, expect=expected_tree("transformer", model))
    given = Given(sharding.place(lora.merge_stored(base, params), mesh), sharding.place(read, mesh))
    return Setup(tuning, given, around)


def init_state(setup: Setup) -> TrainState:
    """The state before the first step, on the mesh, with sequences that are at their end."""
    tuning = setup.tuning
    return sharding.init_sharded(functools.partial(_make_state, tuning), setup.given, mesh=tuning.mesh)


def _make_state(tuning: Tuning, given: Given) -> TrainState:
    config = tuning.config
    # A copy: the base goes on being read while the state is donated.
    params = jax.tree.map(jnp.copy, given.base)
    if config.lora.rank:
        params = lora.init(jax.random.key(config.run.seed), given.base, rank=config.lora.rank)
    network = states.init_network(params, config.optimizer, steps=config.run.steps)
    codes = jnp.zeros((config.data.batch_size, len(FIELDS)), jnp.int32)
    asked = _asked(tuning, tuning.finished(), codes, codes)
    return states.init_state({GENERATOR: network}, config.run, extra=asked)


def begin(
    tuning: Tuning,
    state: TrainState,
    text: Array,
    codes: Array,
    switch_text: Array | None,
    switch_codes: Array | None,
) -> Asked:
    """New sequences: what `TrainState.extra` holds.

    Args:
      tuning: how.
      state: its step and key give the seeds and the switch frames.
      text: `[B, M, text_dim]` prompts.
      codes: int32 `[B, 4]`, what they ask for.
      switch_text: the prompts to switch to; None where nothing switches.
      switch_codes: what they ask for.
    """
    sequence = tuning.begin_long(text, switch_text, jax.random.fold_in(state.step_key(), 1))
    return _asked(tuning, sequence, codes, codes if switch_codes is None else switch_codes)


def _asked(tuning: Tuning, sequence: Sequence, codes: Array, switch_codes: Array) -> Asked:
    parts = tuning.config.run.micro_batches
    asked = Asked(sequence, *(states.split_rows(x, parts) for x in (codes, switch_codes)))
    return sharding.constrain(asked, tuning.mesh, prefix="extra")


def train(tuning: Tuning, state: TrainState, given: Given, *, new_frames: int) -> tuple[TrainState, Metrics]:
    """One update on the next clip of the sequences in `state.extra`.

    Args:
      tuning: how.
      state: before the update.
      given: the frozen parameters.
      new_frames: of the clip, one of `Streaming.choices`.
    """
    config, network = tuning.config, state.networks[GENERATOR]

    def one(asked: Asked, key: PRNGKey) -> tuple[tuple[Params, Metrics], Asked]:
        exit_key, key = jax.random.split(key)
        after, rollout = tuning.next_clip(
            tuning.weights(given, network.params),
            asked.sequence,
            exit_key,
            new_frames=new_frames,
            keep_context=True,
        )
        loss = functools.partial(loss_fn, tuning, given, rollout, _block_codes(tuning, asked, rollout), key)
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(network.params)
        return (grads, {"loss": value, **metrics}), dataclasses.replace(asked, sequence=after)

    keys = jax.random.split(state.step_key(), config.run.micro_batches)
    (grads, metrics), asked = states.averaged(one, state.extra, keys)
    network, more = states.update(network, grads, config.optimizer, steps=config.run.steps)
    state = dataclasses.replace(state, step=state.step + 1, networks={GENERATOR: network}, extra=asked)
    return state, metrics | more


def _block_codes(tuning: Tuning, asked: Asked, rollout: Rollout) -> Array:
    """What every block of a rollout is asked to show, int32 `[B, blocks, 4]`."""
    block = tuning.model.window.block_frames
    blocks, switch = rollout.latents.shape[1] // block, asked.sequence.switch
    before = jnp.broadcast_to(asked.codes[:, None], (len(asked.codes), blocks, len(FIELDS)))
    if switch is None:
        return before
    is_switched = rollout.first + block * jnp.arange(blocks) >= switch.frame
    return jnp.where(is_switched[None, :, None], asked.switch_codes[:, None], before)


def loss_fn(
    tuning: Tuning, given: Given, rollout: Rollout, codes: Array, key: PRNGKey, trained: Params
) -> tuple[Array, Metrics]:
    """Cross-entropy of what is read from the blocks that count, and the distance from the base.

    Args:
      tuning: how.
      given: the frozen parameters.
      rollout: made with `keep_context`.
      codes: int32 `[B, blocks, 4]`.
      key: gives the noise under which blocks are read.
      trained: the parameters to differentiate by.

    Returns:
      float32 scalar, and {"read", "distance" and "read_<attribute>", the share of blocks read right}.
    """
    reward, block = tuning.config.reward, tuning.model.window.block_frames
    latents = tuning.forcing.latents(tuning.weights(given, trained), rollout)
    base = jax.lax.stop_gradient(tuning.forcing.latents(given.base, rollout))
    batch, count = codes.shape[:2]
    blocks = latents.reshape(batch * count, block, *latents.shape[2:])
    sigma_key, noise_key = jax.random.split(key)
    wrong, right = readers.losses(
        tuning.reader,
        given.reader,
        blocks,
        codes.reshape(batch * count, -1),
        sigma=reward.max_sigma * jax.random.uniform(sigma_key, (batch * count,)),
        noise=jax.random.normal(noise_key, blocks.shape),
    )
    counts = rollout.graded[::block].astype(jnp.float32)  # [blocks]

    def mean(x: Array) -> Array:
        """Over the blocks that count, of values `[B, blocks]`."""
        return jnp.sum(x.reshape(batch, count) * counts) / (batch * jnp.sum(counts))

    read = mean(wrong)
    distance = mean(jnp.mean(jnp.square(latents - base).reshape(batch * count, -1), axis=1))
    shares = {f"read_{name}": mean(right[:, i].astype(jnp.float32)) for i, name in enumerate(FIELDS)}
    return read + reward.anchor_weight * distance, {"read": read, "distance": distance, **shares}


def student_params(setup: Setup, state: TrainState) -> Params:
    """The averaged generator, its LoRA merged."""
    return _merged(setup.tuning, setup.given, state.networks[GENERATOR].best)


@functools.partial(jax.jit, static_argnums=0)
def _merged(tuning: Tuning, given: Given, trained: Params) -> Params:
    return tuning.weights(given, trained)


def export(setup: Setup, state: TrainState) -> pathlib.Path:
    """Writes the checkpoint directory: the generator, its LoRA merged, and what the base has besides."""
    parts = {"transformer": student_params(setup, state)}
    return export_lib.export(setup.tuning.config, parts, merged=("lora",), model=setup.tuning.model)


def step_flops(tuning: Tuning) -> float:
    """Model operations of a step: the rollout (see `distill.step_flops`), and its frames again with gradient
    and by the base."""
    config, model = tuning.config, tuning.model
    tokens = config.rollout.clip_frames * model.transformer.frame_len(*tuning.latent_size)
    passes = (len(model.sampler.steps) + 1) / 2 + 1 + 3 + 1
    return config.data.batch_size * passes * distill.forward_flops(model.transformer, tokens)
