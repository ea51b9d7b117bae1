"""What a distillation stage loads before its first step, and where on the mesh it goes."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint, lora, sharding, toy
from longlive_jax.checkpoint import Checkpoint
from longlive_jax.config import PipelineConfig
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.errors import UserError
from longlive_jax.inference.parts import text_encoder_of, transformer_of
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.training import export as export_lib
from longlive_jax.training import sampling
from longlive_jax.training import state as states
from longlive_jax.training import world as worlds
from longlive_jax.training.config import DistillTraining, LongTraining, Training
from longlive_jax.training.distill import CRITIC, GENERATOR, OPTIMIZERS, Distillation, Given
from longlive_jax.training.evaluation import Evaluator
from longlive_jax.training.export import base_model
from longlive_jax.training.prompts import TextEmbedder, read_prompts
from longlive_jax.training.state import TrainState
from longlive_jax.training.student import Student
from longlive_jax.types import Array, Params

NEEDS = ("transformer", "text_encoder", "vae")


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What surrounds the student in its base, on the mesh.

    Attributes:
      model: the stage's model with the base's latent statistics.
      vae_params: the VAE's parameters.
      embed: tokens to embeddings.
      tokenizer: prompts to tokens.
    """

    model: PipelineConfig
    vae_params: Params
    embed: TextEmbedder
    tokenizer: Tokenizer

    @classmethod
    def load(cls, config: Training, base: Checkpoint, mesh: jax.sharding.Mesh) -> "Surroundings":
        """Loads them; a `UserError` names a part that is missing or of another shape."""
        model = base_model(config, base)

        def part(name: str) -> Params:
            loaded = base.load(name, dtype=model.dtype, expect=expected_tree(name, model))
            return sharding.place(loaded, mesh)

        tokenizer = Tokenizer.from_file(base.tokenizer_path, model.text_encoder)
        embed = TextEmbedder(text_encoder_of(model), part("text_encoder"), mesh)
        return cls(model, part("vae"), embed, tokenizer)


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything a stage holds beside its state.

    Attributes:
      distillation: what its programs are compiled for.
      given: their frozen arguments, on the mesh.
      around: what surrounds the student.
      starts: "generator" and "critic" to the parameters their training begins with (their LoRAs' are
        made by `init_state`).
    """

    distillation: Distillation
    given: Given
    around: Surroundings
    starts: dict[str, Params]

    @property
    def embed(self) -> TextEmbedder:
        return self.around.embed

    @property
    def tokenizer(self) -> Tokenizer:
        return self.around.tokenizer


def load(config: DistillTraining, mesh: jax.sharding.Mesh) -> Setup:
    """Loads student, critic, teacher, text encoder and VAE of a config's checkpoints.

    Raises:
      UserError: one of them is missing or of another shape.
    """
    base = checkpoint.open_checkpoint(config.base)
    around = Surroundings.load(config, base, mesh)
    model = around.model
    starts = {
        GENERATOR: lora.merge_stored(
            base, base.load("transformer", expect=expected_tree("transformer", model))
        ),
        CRITIC: _load_critic(config, model, base),
    }
    bases = {name: _placed(starts.pop(name), config.scores.dtype, mesh) for name in adapted(config)}
    given = Given(
        teacher=_placed(_load_teacher(config, model), config.scores.dtype, mesh),
        bases=bases,
        negative=around.embed.prompts(around.tokenizer, [config.scores.negative_prompt]),
        vae=around.vae_params if isinstance(config, LongTraining) else None,
    )
    starts = {name: _placed(params, "float32", mesh) for name, params in starts.items()}
    return Setup(Distillation(config, model, mesh), given, around, starts)


def adapted(config: DistillTraining) -> tuple[str, ...]:
    """The networks that are trained by way of a LoRA."""
    if not config.lora.rank:
        return ()
    return (GENERATOR, CRITIC) if config.lora.is_critic_adapted else (GENERATOR,)


def init_state(setup: Setup) -> TrainState:
    """The state before the first step, on the mesh; of stage `long` with sequences that are at their end."""
    distillation, mesh = setup.distillation, setup.distillation.mesh
    return sharding.init_sharded(
        functools.partial(make_state, distillation), setup.given.bases, setup.starts, mesh=mesh
    )


def make_state(distillation: Distillation, bases: dict[str, Params], starts: dict[str, Params]) -> TrainState:
    """`init_state`, as a function of arrays (or of their shapes)."""
    config, networks = distillation.config, {}
    for index, name in enumerate((GENERATOR, CRITIC)):
        params = starts.get(name)
        if params is None:
            key = jax.random.fold_in(jax.random.key(config.run.seed), index)
            params = lora.init(key, bases[name], rank=config.lora.rank)
        optimizer, steps = config.updates[OPTIMIZERS[name]]
        networks[name] = states.init_network(params, optimizer, steps=steps)
    state = states.init_state(networks, config.run)
    if not isinstance(config, LongTraining):
        return state
    return dataclasses.replace(state, extra=distillation.finished())


def student_params(setup: Setup, state: TrainState) -> Params:
    """The averaged generator, its LoRA merged."""
    best = state.networks[GENERATOR].best
    return _merged(setup.distillation, setup.given, best) if setup.given.bases else best


@functools.partial(jax.jit, static_argnums=0)
def _merged(distillation: Distillation, given: Given, trained: Params) -> Params:
    return distillation.weights(given, GENERATOR, trained)


def evaluator(setup: Setup) -> Evaluator:
    """Few-step videos of the generator, see `few_step_evaluator`."""
    return few_step_evaluator(setup.distillation, setup.around)


def few_step_evaluator(student: Student, around: Surroundings) -> Evaluator:
    """Few-step videos of unseen combinations, or of the first prompts of the prompt file."""
    config, model = student.config, student.model
    settings = config.evaluation
    if config.data.prompts:
        prompts, codes = read_prompts(config.data.prompts)[: settings.clips], None
    else:
        world = worlds.world_of(model)
        scenes = worlds.held_out_scenes(world, clips=settings.clips, seed=settings.seed)
        prompts, codes = toy.describe_scenes(scenes), scenes.codes
    # On one device, unlike the generator under training.
    generator = dataclasses.replace(student.forcing.generator, transformer=transformer_of(model))

    shape = (settings.frames, *student.latent_size, model.vae.z_dim)

    def sample(params: Params, text: Array, seeds: Array) -> Array:
        return sampling.few_step(generator, params, sampling.Prompts(text, None), seeds, shape=shape)

    text = np.asarray(around.embed.prompts(around.tokenizer, prompts))
    return Evaluator(settings, model, around.vae_params, sample, text, codes)


def export(setup: Setup, state: TrainState) -> pathlib.Path:
    """Writes the checkpoint directory: generator and critic, or what they are adapted from and the LoRAs.

    LoRAs that the base keeps apart are merged into what is trained.
    """
    config = setup.distillation.config
    base = checkpoint.open_checkpoint(config.base)
    parts: dict[str, Params] = {}
    adapters: dict[str, Params] = {}
    for name, (whole, adapter) in _EXPORTED.items():
        params = state.networks[name].best
        if name in setup.given.bases:
            adapters[adapter] = params
            if whole not in base.parts or adapter in base.parts:
                parts[whole] = setup.given.bases[name]
        else:
            parts[whole] = params
    merged = [adapter for _, adapter in _EXPORTED.values()]
    return export_lib.export(config, parts, adapters=adapters, merged=merged, model=setup.distillation.model)


_EXPORTED: Mapping[str, tuple[str, str]] = {
    GENERATOR: ("transformer", "lora"),
    CRITIC: ("critic", "critic_lora"),
}


def _load_teacher(config: DistillTraining, model: PipelineConfig) -> Params:
    teacher = checkpoint.open_checkpoint(config.scores.teacher or config.base, field="scores.teacher")
    shaped = dataclasses.replace(model, transformer=config.teacher_transformer)
    return teacher.load("transformer", expect=expected_tree("transformer", shaped))


def _load_critic(config: DistillTraining, model: PipelineConfig, base: Checkpoint) -> Params:
    expected = expected_tree("transformer", model)
    if config.scores.critic:
        opened = checkpoint.open_checkpoint(config.scores.critic, field="scores.critic")
        return opened.load("transformer", expect=expected)
    if "critic" in base.parts:
        return lora.merge_stored(base, base.load("critic", expect=expected), name="critic_lora")
    if config.teacher_transformer != model.transformer:
        raise UserError(
            "scores.critic is empty and the teacher is of another shape; name the checkpoint directory of a "
            "bidirectional model of the student's shape"
        )
    return _load_teacher(config, model)


def _placed(params: Params, dtype: str, mesh: jax.sharding.Mesh) -> Params:
    cast = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.dtype(dtype)), params)
    return sharding.place(cast, mesh)
