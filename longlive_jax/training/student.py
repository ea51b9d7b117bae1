"""The student under training: its module, how it makes clips, and the sequences they belong to."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from longlive_jax import sharding
from longlive_jax.config import PipelineConfig
from longlive_jax.inference.parts import transformer_of
from longlive_jax.inference.rollout import Generator
from longlive_jax.models.transformer import Transformer
from longlive_jax.training import state as states
from longlive_jax.training.config import DistillTraining, LongTraining, RewardTraining
from longlive_jax.training.rollout import Rollout, SelfForcing, Sequence, Switch, draw_exit_steps
from longlive_jax.training.streaming import Streaming
from longlive_jax.types import Array, Params, PRNGKey


@dataclasses.dataclass(frozen=True)
class Student:
    """How a stage rolls its student out. Hashable: everything that is fixed before a program is compiled.

    Attributes:
      config: the stage's.
      model: its model, with the latent statistics of its base.
      mesh: where it runs.
    """

    config: DistillTraining | RewardTraining
    model: PipelineConfig
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def forcing(self) -> SelfForcing:
        """How clips are generated."""
        rollout = self.config.rollout
        keep_sink = isinstance(self.config, LongTraining | RewardTraining) and self.config.streaming.keep_sink
        return SelfForcing(
            Generator(self.student, self.model.window, self.model.sampler),
            cache_gradient=rollout.cache_gradient,
            text_gradient=rollout.text_gradient,
            renoise_context=rollout.renoise_context,
            keep_sink=keep_sink,
        )

    @functools.cached_property
    def streaming(self) -> Streaming:
        """How sequences are cut into clips (stages `long` and `reward`)."""
        assert isinstance(self.config, LongTraining | RewardTraining), self.config
        streaming = self.config.streaming
        return Streaming(
            self.forcing,
            clip_frames=self.config.rollout.clip_frames,
            new_frames=streaming.new_frames,
            sequence_frames=streaming.sequence_frames,
        )

    @functools.cached_property
    def student(self) -> Transformer:
        """The module under training."""
        return dataclasses.replace(
            transformer_of(self.model),
            remat=self.config.remat,
            batch_sharding=sharding.batch_sharding(self.mesh),
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """(h, w)."""
        return self.model.latent_size(self.model.video.height, self.model.video.width)

    def begin_long(self, text: Array, switch_text: Array | None, key: PRNGKey) -> Sequence:
        """New sequences of more than one clip.

        Args:
          text: `[B, M, text_dim]` prompts.
          switch_text: like it, the prompts to switch to; None where nothing switches.
          key: gives the seeds and the switch frames.

        Returns:
          What `TrainState.extra` holds: a `Sequence` with an axis of micro-batches in front,
          `[n, B / n, ...]`, each with a switch frame of its own.
        """
        config = self.config
        assert isinstance(config, LongTraining | RewardTraining), config
        parts = config.run.micro_batches
        choices = jnp.asarray(config.streaming.switch_frames or (0,), jnp.int32)

        def one(part: tuple[Array, Array | None], key: PRNGKey) -> Sequence:
            text, switch_text = part
            seeds_key, switch_key = jax.random.split(key)
            switch = None
            if switch_text is not None:
                switch = Switch(switch_text, jax.random.choice(switch_key, choices))
            seeds = jax.random.bits(seeds_key, text.shape[:1], jnp.uint32)
            return self.streaming.begin(text, seeds, latent_size=self.latent_size, switch=switch)

        keys = jax.random.split(key, parts)
        sequences = jax.vmap(one)(states.split_rows((text, switch_text), parts), keys)
        return sharding.constrain(sequences, self.mesh, prefix="extra")

    def finished(self) -> Sequence:
        """Sequences of `begin_long` that are at their end: a run's first step begins new ones."""
        config, encoder = self.config, self.model.text_encoder
        assert isinstance(config, LongTraining | RewardTraining), config
        text = jnp.zeros((config.data.batch_size, encoder.text_len, encoder.dim), self.model.dtype)
        switch = text if config.streaming.switch_frames else None
        sequences = self.begin_long(text, switch, jax.random.key(0))
        return dataclasses.replace(
            sequences, frame=jnp.full_like(sequences.frame, config.streaming.sequence_frames)
        )

    def next_clip(
        self, params: Params, sequence: Sequence, key: PRNGKey, *, new_frames: int, keep_context: bool
    ) -> tuple[Sequence, Rollout]:
        """Rolls out the next clip of a sequence.

        Args:
          params: the generator's parameters.
          sequence: where it stands.
          key: gives the exit steps.
          new_frames: latent frames of the clip; the opening one has `rollout.clip_frames`.
          keep_context: see `SelfForcing.roll_out`.
        """
        rollout, generator = self.config.rollout, self.forcing.generator
        exits = draw_exit_steps(
            key,
            new_frames // generator.window.block_frames,
            len(generator.sampler.steps),
            same_for_all_blocks=rollout.is_exit_shared,
        )
        return self.forcing.roll_out(
            params, sequence, exits, opening=new_frames == rollout.clip_frames, keep_context=keep_context
        )
