"""What changes while training, as pytrees, and the one update of a network that every stage makes.

A stage's state is a `TrainState`: any number of networks under training (one here; a generator and a
critic in the distillation) and whatever else the stage carries from one update to the next (the streaming
sequence of the long tuning). All of it is saved, sharded and donated as one tree.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax

from longlive_jax.training.config import OptimizerConfig, RunConfig, Training
from longlive_jax.types import Array, Params, PRNGKey, pytree

T = TypeVar("T")

Metrics: TypeAlias = dict[str, Array]
"""Scalars by name."""

LossFn: TypeAlias = Callable[..., tuple[Array, Metrics]]
"""`(params, batch, key) -> (loss, metrics)`."""


@pytree
class Network:
    """One network under training; all of it float32.

    Attributes:
      params: its parameters (or its LoRA's).
      optimizer: state of the optimiser.
      ema: moving average of the parameters; None keeps none.
      updates: int32, updates made.
    """

    params: Params
    optimizer: Any
    ema: Params | None
    updates: Array

    @property
    def best(self) -> Params:
        """The averaged parameters where there are any."""
        return self.params if self.ema is None else self.ema


@pytree
class TrainState:
    """State of a stage between two steps.

    Attributes:
      step: int32, steps made (a step may update one network or several).
      key: raw random key; step n draws from `fold_in(key, n)`.
      networks: by name.
      extra: what else the stage carries; None for nothing.
    """

    step: Array
    key: Array
    networks: Mapping[str, Network]
    extra: Any = None

    def step_key(self) -> PRNGKey:
        """The random key of the step to come."""
        return jax.random.fold_in(jax.random.wrap_key_data(self.key), self.step)


DECAYED = frozenset({"kernel", "a", "b", "token_embedding"})
"""Leaves that weight decay pulls on: matrices, convolutions, the factors of a LoRA, embeddings.

By name, as shapes do not tell: the biases of a stack of layers are a matrix.
"""


def is_decayed(params: Params) -> Any:
    """A tree of bools like the parameters."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)


def make_optimizer(config: OptimizerConfig, *, steps: int) -> optax.GradientTransformation:
    """AdamW with warmup and schedule; clipping is in `update`, which reports the norm."""
    return optax.adamw(
        learning_rate(config, steps=steps),
        b1=config.betas[0],
        b2=config.betas[1],
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=is_decayed,
    )


def learning_rate(config: OptimizerConfig, *, steps: int) -> optax.Schedule:
    """Learning rate by update number, in a run of so many updates."""
    steps = config.schedule_steps or steps
    warmup = min(config.warmup_steps, steps)
    peak, left = config.learning_rate, max(steps - warmup, 1)
    after = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, left, alpha=0.01)
    # The first update of a warmup is not lost: it has a rate above 0.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def init_network(params: Params, config: OptimizerConfig, *, steps: int) -> Network:
    """A network before its first update."""
    return Network(
        params=params,
        optimizer=make_optimizer(config, steps=steps).init(params),
        # A copy: one buffer in two places could not be donated.
        ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
        updates=jnp.zeros((), jnp.int32),
    )


def init_state(networks: Mapping[str, Network], run: RunConfig, *, extra: Any = None) -> TrainState:
    """A stage's state before its first step."""
    key = jax.random.key_data(jax.random.key(run.seed))
    return TrainState(jnp.zeros((), jnp.int32), key, dict(networks), extra)


def gradients(
    loss: LossFn, params: Params, batch: Any, key: PRNGKey, *, micro_batches: int = 1
) -> tuple[Params, Metrics]:
    """Gradients of the mean loss over a batch, computed in parts to save memory.

    Args:
      loss: averages over the rows it is given.
      params: what to differentiate by.
      batch: a tree of arrays with B rows.
      key: random key.
      micro_batches: parts, one after the other; B must be a multiple.

    Returns:
      The gradients, and the means of the loss ("loss") and of the metrics over the parts.
    """

    def one(batch: Any, key: PRNGKey) -> tuple[tuple[Params, Metrics], None]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return (grads, {"loss": value, **metrics}), None

    if micro_batches == 1:
        return one(batch, key)[0]
    parts = split_rows(batch, micro_batches)
    total, _ = averaged(one, parts, jax.random.split(key, micro_batches))
    return total


def split_rows(tree: T, parts: int) -> T:
    """Arrays `[B, ...]` to `[parts, B / parts, ...]`.

    Row r goes to part r mod `parts`, so every device keeps an equal share of every part.
    """
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), tree)


def averaged(one: Callable[[Any, PRNGKey], tuple[T, Any]], parts: Any, keys: PRNGKey) -> tuple[T, Any]:
    """Runs a function on one part after another.

    Args:
      one: `(part, key) -> (tree to average, tree to keep)`.
      parts: a tree of arrays `[n, ...]`.
      keys: n random keys.

    Returns:
      The mean of the first results, and the second ones stacked.
    """

    first = jax.tree.map(lambda x: x[0], parts)
    if keys.shape[0] == 1:
        value, kept = one(first, keys[0])
        return value, jax.tree.map(lambda x: x[None], kept)
    one = jax.jit(one)  # traced once, for its shapes and for the scan

    def add(total: T, inputs: tuple[Any, PRNGKey]) -> tuple[T, Any]:
        value, kept = one(*inputs)
        return jax.tree.map(jnp.add, total, value), kept

    shapes, _ = jax.eval_shape(one, first, keys[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, kept = jax.lax.scan(add, zero, (parts, keys))
    return jax.tree.map(lambda x: x / keys.shape[0], total), kept


def update(
    network: Network, grads: Params, config: OptimizerConfig, *, steps: int
) -> tuple[Network, Metrics]:
    """One clipped AdamW update with its moving average.

    Where the gradient is not finite nothing is changed, so the state stays the last good one; the caller
    sees a `grad_norm` that is not finite and stops.

    Args:
      network: before.
      grads: like its parameters.
      config: how.
      steps: updates of the whole run, for the schedule.

    Returns:
      The network after it, and {"grad_norm" before clipping, "learning_rate"}.
    """
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
    optimizer = make_optimizer(config, steps=steps)
    changes, moments = optimizer.update(
        jax.tree.map(lambda g: g * scale, grads), network.optimizer, network.params
    )
    params = optax.apply_updates(network.params, changes)
    after = dataclasses.replace(
        network,
        params=params,
        optimizer=moments,
        ema=_averaged(network, params, config),
        updates=network.updates + 1,
    )
    finite = jnp.isfinite(norm)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, network)
    rate = learning_rate(config, steps=steps)(network.updates)
    return kept, {"grad_norm": norm, "learning_rate": jnp.asarray(rate, jnp.float32)}


def train_alone(
    config: Training, name: str, loss: LossFn, state: TrainState, batch: Any
) -> tuple[TrainState, Metrics]:
    """One step of a stage that trains a single network.

    Args:
      config: the stage's.
      name: of the network.
      loss: what is minimised; see `gradients`.
      state: before the step.
      batch: a tree of arrays with B rows.
    """
    network = state.networks[name]
    grads, metrics = gradients(
        loss, network.params, batch, state.step_key(), micro_batches=config.run.micro_batches
    )
    network, more = update(network, grads, config.optimizer, steps=config.run.steps)
    return TrainState(state.step + 1, state.key, {name: network}), metrics | more


def _averaged(network: Network, params: Params, config: OptimizerConfig) -> Params | None:
    if network.ema is None:
        return None
    decay = jnp.where(network.updates < config.ema_start, 0.0, config.ema_decay)
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, network.ema, params)
