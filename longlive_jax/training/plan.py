"""What a distillation run will need, before any device is paid for: its programs, compiled from shapes alone.

Nothing is loaded and nothing runs. The devices may be simulated: the partition of the programs, and with
it the memory per device, is that of a mesh of as many real ones.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from longlive_jax import sharding
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.training import distill, distill_setup
from longlive_jax.training.config import DistillTraining, LongTraining
from longlive_jax.training.distill import CRITIC, GENERATOR, Distillation, Given
from longlive_jax.types import Params

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a run, per device.

    Attributes:
      name: what it does.
      argument_bytes: weights, optimiser state, carried sequences and batch.
      output_bytes: what it returns beside what it updates in place.
      temporary_bytes: everything between.
      compile_seconds: how long compiling took here.
    """

    name: str
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    compile_seconds: float

    @property
    def peak_bytes(self) -> int:
        """Bytes in use at the program's fullest moment, at most."""
        return self.argument_bytes + self.output_bytes + self.temporary_bytes


def plan(config: DistillTraining, mesh: jax.sharding.Mesh, *, only: str = "") -> Iterator[Program]:
    """Compiles the programs of a run for a mesh, one after the other.

    Args:
      config: of the run.
      mesh: its devices, real or simulated.
      only: beginning of the names of the programs that are wanted.
    """
    distillation = Distillation(config, config.model, mesh)
    given, state = _given(distillation), _state(distillation)
    for name, step_fn, arguments in _programs(distillation):
        if not name.startswith(only):
            continue
        start = time.monotonic()
        lowered = jax.jit(step_fn, donate_argnums=0).lower(state, given, *arguments)
        memory: Any = lowered.compile().memory_analysis()
        yield Program(
            name=name,
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            compile_seconds=time.monotonic() - start,
        )


def _programs(distillation: Distillation) -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """Name, step function of (state, given, ...) and the other arguments of every program."""
    config = distillation.config
    if not isinstance(config, LongTraining):
        for name in (GENERATOR, CRITIC):
            yield name, functools.partial(distill.train, distillation, name), (_text(distillation),)
        return
    for frames in (config.rollout.clip_frames, *config.streaming.new_frames):
        for name in (GENERATOR, CRITIC):
            step = functools.partial(distill.train_long, distillation, name, new_frames=frames)
            yield f"{name}, {frames} new frames", step, ()


def _given(distillation: Distillation) -> Given:
    config, model = distillation.config, distillation.model
    taught = dataclasses.replace(model, transformer=config.teacher_transformer)
    stored, text = jnp.dtype(config.scores.dtype), model.text_encoder
    negative: Any = jax.ShapeDtypeStruct((1, text.text_len, text.dim), jnp.dtype(model.dtype))
    student = _typed(expected_tree("transformer", model), stored)
    given = Given(
        teacher=_typed(expected_tree("transformer", taught), stored),
        bases=dict.fromkeys(distill_setup.adapted(config), student),
        negative=negative,
        vae=_typed(expected_tree("vae", model), jnp.dtype(model.dtype))
        if isinstance(config, LongTraining)
        else None,
    )
    return _placed(given, distillation)


def _state(distillation: Distillation) -> Any:
    model, adapted = distillation.model, distill_setup.adapted(distillation.config)
    student = _typed(expected_tree("transformer", model), jnp.dtype("float32"))
    starts = {name: student for name in (GENERATOR, CRITIC) if name not in adapted}
    make = functools.partial(distill_setup.make_state, distillation)
    return _placed(jax.eval_shape(make, dict.fromkeys(adapted, student), starts), distillation)


def _text(distillation: Distillation) -> jax.ShapeDtypeStruct:
    text, size = distillation.model.text_encoder, distillation.config.data.batch_size
    shape = (size, text.text_len, text.dim)
    split = sharding.batch_sharding(distillation.mesh)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(distillation.model.dtype), sharding=split)


def _typed(tree: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tree)


def _placed(tree: Any, distillation: Distillation) -> Any:
    """Shapes with the sharding they will have."""

    def of(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(of, tree, sharding.shardings(tree, distillation.mesh))
