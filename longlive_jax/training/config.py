"""Every knob of training, as frozen dataclasses; the model's own knobs are in `longlive_jax.config`.

A stage's config has the sections every stage shares (`Training`) and one section of its own. A config file
is Python: a module whose `get_config()` returns one of them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from longlive_jax.config import (
    PRESETS,
    PipelineConfig,
    RematPolicy,
    TransformerConfig,
)
from longlive_jax.config import preset as preset_of
from longlive_jax.errors import require
from longlive_jax.toy.world import FIELDS, Split
from longlive_jax.training.losses import DMDConfig

Schedule = Literal["constant", "cosine"]
Better = Literal["max", "min"]


def _at_least(section: str, config: Any, **limits: float) -> None:
    for name, low in limits.items():
        value = getattr(config, name)
        require(value >= low, f"{section}.{name}={value} must be {low:g} or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, where, and how often things happen. Counts are optimiser updates.

    Attributes:
      folder: everything the run writes is in here.
      steps: updates in all.
      seed: of the initial weights, the noise and every random choice.
      log_every: updates between lines of metrics.
      eval_every: updates between evaluations; 0 evaluates at the end only.
      checkpoint_every: updates between checkpoints; the last update and a signal make one too.
      keep: latest checkpoints that are kept; the best one is kept beside them.
      export_every: updates between exports; 0 exports at the end only.
      keep_exports: keep every export, in `exports/<step>`, and not the last one only.
      micro_batches: parts a batch is split into, one after the other (gradient accumulation).
      diverged_factor: the run stops when the loss stays above this many times its recent median.
    """

    folder: str
    steps: int
    seed: int = 0
    log_every: int = 20
    eval_every: int = 0
    checkpoint_every: int = 200
    keep: int = 2
    export_every: int = 0
    keep_exports: bool = False
    micro_batches: int = 1
    diverged_factor: float = 10.0

    def __post_init__(self) -> None:
        _at_least("run", self, steps=1, seed=0, log_every=1, eval_every=0, checkpoint_every=1, keep=1)
        _at_least("run", self, export_every=0, micro_batches=1, diverged_factor=1)
        require(self.folder != "", "run.folder is empty; name the folder the run writes to")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, and the moving average of what it makes.

    Attributes:
      learning_rate: peak.
      schedule: "constant", or "cosine" down to 1% of the peak at the last update.
      warmup_steps: updates of linear rise to the peak.
      betas: decay of the first and second moments.
      eps: added to the root of the second moment.
      weight_decay: decoupled; on matrices and convolutions only.
      clip_norm: the gradient's global norm is cut to this.
      ema_decay: of the moving average of the parameters; 0 keeps none.
      ema_start: updates before the average begins (until then it is the parameters).
    """

    learning_rate: float
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    ema_start: int = 0

    def __post_init__(self) -> None:
        _at_least("optimizer", self, warmup_steps=0, weight_decay=0, ema_start=0)
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive")
        require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm} must be positive")
        require(all(0 <= b < 1 for b in self.betas), f"optimizer.betas={self.betas} must be in [0, 1)")
        require(0 <= self.ema_decay < 1, f"optimizer.ema_decay={self.ema_decay} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are arranged; -1 takes what the other axis leaves.

    Attributes:
      data: ways the batch alone is split.
      fsdp: ways the batch, the parameters and the optimiser state are split.
    """

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """Which clips of the toy world, in which order.

    Attributes:
      batch_size: clips per update over all processes.
      frames: latent frames F per clip.
      examples: distinct clips; the order is shuffled anew in every pass over them.
      seed: names the clips and their order.
      split: combinations of attributes to draw from.
      threads: threads that make batches.
      prefetch: batches kept ready.
    """

    batch_size: int
    frames: int
    examples: int = 1 << 20
    seed: int = 0
    split: Split = "train"
    threads: int = 1
    prefetch: int = 4

    def __post_init__(self) -> None:
        _at_least("data", self, batch_size=1, frames=1, threads=1, prefetch=1, seed=0)
        require(
            self.examples >= self.batch_size,
            f"data.examples={self.examples} must be at least batch_size={self.batch_size}",
        )


@dataclasses.dataclass(frozen=True)
class PromptsConfig:
    """Which prompts, in which order; distillation sees no videos.

    Attributes:
      batch_size: prompts per update over all processes.
      prompts: text file with one prompt per line; "" takes the toy world's captions.
      switch_prompts: text file with, line by line, the prompt to switch to; "" beside no `prompts` takes
        captions that differ in one to four attributes.
      examples: distinct captions of the toy world.
      seed: names the captions and the order.
      split: combinations of attributes to draw captions from.
      threads: threads that make batches.
      prefetch: batches kept ready.
    """

    batch_size: int
    prompts: str = ""
    switch_prompts: str = ""
    examples: int = 1 << 20
    seed: int = 0
    split: Split = "train"
    threads: int = 1
    prefetch: int = 4

    def __post_init__(self) -> None:
        _at_least("data", self, batch_size=1, threads=1, prefetch=1, seed=0)
        require(
            self.examples >= self.batch_size,
            f"data.examples={self.examples} must be at least batch_size={self.batch_size}",
        )
        require(
            not self.switch_prompts or self.prompts != "",
            f"data.switch_prompts={self.switch_prompts} needs data.prompts, the prompts they follow",
        )


_READ_FROM_PIXELS = (*FIELDS, "all", "iou")  # of the toy world; see `world.adherence`


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on combinations that training never shows.

    Attributes:
      clips: how many clips.
      frames: latent frames of each.
      batch_size: clips made at once.
      seed: names the clips.
      metric: the number that decides which checkpoint is best: "loss", or one that the stage evaluates.
      better: whether more or less of it is better.
    """

    clips: int = 32
    frames: int = 21
    batch_size: int = 8
    seed: int = 1
    metric: str = "loss"
    better: Better = "min"

    def __post_init__(self) -> None:
        _at_least("evaluation", self, clips=1, frames=1, batch_size=1, seed=0)


@dataclasses.dataclass(frozen=True)
class Training:
    """What every stage has.

    Attributes:
      model: the whole model; a stage trains one part of it.
      run: how long, where, how often.
      optimizer: of the part that is trained.
      data: what it sees.
      base: checkpoint directory with the parts this stage needs; its other parts go into the export.
      mesh: arrangement of the devices.
      evaluation: what is measured on the way.
      remat: what the backward pass recomputes.
    """

    model: PipelineConfig
    run: RunConfig
    optimizer: OptimizerConfig
    data: ClipsConfig | PromptsConfig
    base: str = ""
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    remat: RematPolicy = "none"

    evaluated: ClassVar[tuple[str, ...]] = _READ_FROM_PIXELS
    """Numbers that the stage's evaluations give."""

    def __post_init__(self) -> None:
        require(
            self.data.batch_size % self.run.micro_batches == 0,
            f"data.batch_size={self.data.batch_size} must be a multiple of run.micro_batches="
            f"{self.run.micro_batches}",
        )
        allowed = ("loss", *self.evaluated)
        require(
            self.evaluation.metric in allowed,
            f"evaluation.metric={self.evaluation.metric!r} must be one of {', '.join(allowed)}",
        )


@dataclasses.dataclass(frozen=True)
class VAELoss:
    """What the autoencoder is asked for.

    Attributes:
      sprite_weight: weight of a pixel the sprite covers or touches, against 1 for the background.
      latent_noise: deviation of the noise that is added to (not yet normalised) latents before decoding.
      latent_weight: weight of the latents' mean square. With the noise this is the KL divergence of a
        posterior of fixed width from a standard normal.
      anchor_weight: weight of the latents' mean square distance from a linear code of their cells
        (`training.anchor`): latents that move as pixels do are easier to model. 0 leaves them free.
      statistics_clips: clips from which the latents' mean and deviation are measured.
      trained: "decoder" leaves the encoder of the base as it is, and with it the latents: models of them
        stay good.
    """

    sprite_weight: float = 4.0
    latent_noise: float = 0.1
    latent_weight: float = 1e-3
    anchor_weight: float = 0.0
    statistics_clips: int = 256
    trained: Literal["all", "decoder"] = "all"

    def __post_init__(self) -> None:
        _at_least(
            "vae",
            self,
            sprite_weight=0,
            latent_noise=0,
            latent_weight=0,
            anchor_weight=0,
            statistics_clips=1,
        )


@dataclasses.dataclass(frozen=True)
class VAETraining(Training):
    """Stage `vae`: the causal video autoencoder, on rendered clips."""

    data: ClipsConfig
    vae: VAELoss = VAELoss()

    evaluated: ClassVar[tuple[str, ...]] = (*_READ_FROM_PIXELS, "psnr")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.vae.trained == "all" or self.base != "",
            f"vae.trained={self.vae.trained} needs the encoder of a base; set base",
        )


@dataclasses.dataclass(frozen=True)
class TextTraining(Training):
    """Stage `text`: the text encoder, by naming the attributes a caption describes."""

    data: ClipsConfig

    evaluated: ClassVar[tuple[str, ...]] = ("accuracy",)


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Flow matching on encoded clips.

    Attributes:
      shift: timestep shift of the noise levels that are drawn, and of the evaluation's samples.
      levels: law of the levels before the shift: uniform in (0, 1), or the logistic function of a standard
        normal, which draws few levels near 0 and 1 (arXiv 2403.03206, section 3.1).
      text_dropout: share of clips that are trained without a prompt, for guidance.
      causal_share: share of every batch that is trained block by block after a clean past; the others
        see all frames at once.
      past_noise: largest noise level of that past; a little makes the model forgive its own errors.
      frame_levels: share of the others whose frames have a noise level each (diffusion forcing, arXiv
        2407.01392). A clear frame beside a noisy one teaches how frames follow from each other, which
        at one level for all takes a small model many times longer to find out.
      sample_steps: Euler steps of the evaluation's samples.
      guidance: scale of their guidance; 1 is none.
      encoded_frames: latent frames that are encoded per clip, of which the first `data.frames` are used, so
        that stages with clips of different lengths share them; 0 encodes what is used.
      cache_folder: where encoded clips are kept; "" puts them beside the run's folder.
    """

    shift: float = 3.0
    levels: Literal["uniform", "logit_normal"] = "uniform"
    text_dropout: float = 0.1
    causal_share: float = 0.0
    past_noise: float = 0.0
    frame_levels: float = 0.0
    sample_steps: int = 20
    guidance: float = 1.0
    encoded_frames: int = 0
    cache_folder: str = ""

    def __post_init__(self) -> None:
        require(self.shift > 0, f"flow.shift={self.shift} must be positive")
        for name in ("text_dropout", "causal_share", "past_noise", "frame_levels"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"flow.{name}={value} must be in [0, 1]")
        _at_least("flow", self, sample_steps=1, guidance=0, encoded_frames=0)


CausalMethod = Literal["teacher_forcing", "ode"]


@dataclasses.dataclass(frozen=True)
class CausalFlowConfig(FlowConfig):
    """How the student is made causal.

    Attributes:
      causal_share: see `FlowConfig`; all of the batch.
      method: "teacher_forcing" is flow matching on clips. "ode" regresses the end of the teacher's own
        trajectories (`training.trajectories`) from their states at the student's denoising steps; then
        `shift`, `sample_steps` and `guidance` are those of the solver, `data.examples` counts trajectories,
        and evaluations sample in the student's few steps.
    """

    causal_share: float = 1.0
    method: CausalMethod = "teacher_forcing"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method == "ode":
            for name, wanted, why in (
                ("causal_share", 1, "the student is causal"),
                ("text_dropout", 0, "a trajectory belongs to its prompt"),
                ("encoded_frames", 0, "a trajectory has data.frames frames"),
            ):
                value = getattr(self, name)
                require(value == wanted, f"flow.{name}={value} must be {wanted} with flow.method=ode: {why}")


@dataclasses.dataclass(frozen=True)
class FlowTraining(Training):
    """What the stages that learn from encoded clips share."""

    data: ClipsConfig
    flow: FlowConfig = FlowConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        causal = self.data.batch_size * self.flow.causal_share / self.run.micro_batches
        require(
            causal == int(causal),
            f"flow.causal_share={self.flow.causal_share} of data.batch_size={self.data.batch_size} in "
            f"run.micro_batches={self.run.micro_batches} parts must be a whole number of clips",
        )
        apart = (self.data.batch_size / self.run.micro_batches - causal) * self.flow.frame_levels
        require(
            apart == int(apart),
            f"flow.frame_levels={self.flow.frame_levels} of the clips that are not causal, of each part of a "
            f"batch (data.batch_size={self.data.batch_size}, run.micro_batches={self.run.micro_batches}, "
            f"flow.causal_share={self.flow.causal_share}) must be a whole number of clips",
        )
        require(
            self.flow.encoded_frames in (0, max(self.flow.encoded_frames, self.data.frames)),
            f"flow.encoded_frames={self.flow.encoded_frames} must be 0 or at least data.frames="
            f"{self.data.frames}",
        )
        block = self.model.window.block_frames
        require(
            causal == 0 or self.data.frames % block == 0,
            f"data.frames={self.data.frames} must be a multiple of model.window.block_frames={block}",
        )


@dataclasses.dataclass(frozen=True)
class TeacherTraining(FlowTraining):
    """Stage `teacher`: the bidirectional model, by flow matching on the VAE's latents."""


@dataclasses.dataclass(frozen=True)
class CausalInitTraining(FlowTraining):
    """Stage `causal_init`: the block-causal student, from the teacher's weights."""

    flow: CausalFlowConfig = CausalFlowConfig()


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adaptation in place of training all weights.

    Attributes:
      rank: of the update of every linear layer of every block; 0 trains all weights.
      alpha: the update is alpha / rank * B A; 0 stands for the rank.
      is_critic_adapted: whether the critic is adapted too, or trained whole.
    """

    rank: int = 0
    alpha: float = 0.0
    is_critic_adapted: bool = True

    def __post_init__(self) -> None:
        _at_least("lora", self, rank=0, alpha=0)

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return (self.alpha or self.rank) / self.rank if self.rank else 1.0


CacheGradient = Literal["straight_through", "opening", "none"]
TextGradient = Literal["full", "none"]


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How the generator makes its clips; window and sampler are the model's.

    Attributes:
      clip_frames: latent frames of a clip as teacher and critic see it.
      cache_gradient: see `training.rollout.SelfForcing`.
      text_gradient: see there.
      renoise_context: see there.
      is_exit_shared: one exit step for all blocks of a clip, or one for each.
    """

    clip_frames: int = 21
    cache_gradient: CacheGradient = "straight_through"
    text_gradient: TextGradient = "full"
    renoise_context: bool = True
    is_exit_shared: bool = True

    def __post_init__(self) -> None:
        _at_least("rollout", self, clip_frames=1)


@dataclasses.dataclass(frozen=True)
class ScoresConfig:
    """Whose scores distribution matching compares.

    Attributes:
      teacher: checkpoint directory of the teacher's transformer; "" is `base`.
      teacher_preset: preset with the shape of the teacher's transformer; "" is that of the model.
      critic: checkpoint directory with the transformer the critic begins as; "" takes the base's critic,
        or, where it has none, the teacher.
      negative_prompt: what guidance leads away from.
      critic_updates: updates of the critic for each one of the generator.
      dtype: storage of the teacher's weights, and of those a LoRA is added to.
    """

    teacher: str = ""
    teacher_preset: str = ""
    critic: str = ""
    negative_prompt: str = ""
    critic_updates: int = 5
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self) -> None:
        _at_least("scores", self, critic_updates=1)
        require(
            self.teacher_preset in ("", *PRESETS),
            f"scores.teacher_preset={self.teacher_preset!r} is unknown; choose one of {', '.join(PRESETS)}",
        )


@dataclasses.dataclass(frozen=True)
class DistillTraining(Training):
    """What the stages that distil by distribution matching share.

    `run.steps` counts updates of the critic; the generator's come with the first of every
    `scores.critic_updates` of them. `optimizer` is the generator's.
    """

    data: PromptsConfig
    critic_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=4e-7, schedule="constant")
    dmd: DMDConfig = DMDConfig()  # noqa: RUF009  (frozen)
    rollout: RolloutConfig = RolloutConfig()
    scores: ScoresConfig = ScoresConfig()
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        window, frames = self.model.window, self.rollout.clip_frames
        require(
            frames % window.block_frames == 0,
            f"rollout.clip_frames={frames} must be a multiple of model.window.block_frames="
            f"{window.block_frames}",
        )
        require(
            window.rope == "absolute",
            "model.window.rope='relative' is for inference; train with 'absolute'",
        )
        require(
            not self.data.prompts or self.evaluation.metric not in _READ_FROM_PIXELS,
            f"evaluation.metric={self.evaluation.metric!r} is read from videos of the toy world's captions; "
            'with data.prompts choose "loss"',
        )

    @property
    def teacher_transformer(self) -> TransformerConfig:
        """Shape of the teacher."""
        named = self.scores.teacher_preset
        return preset_of(named).transformer if named else self.model.transformer

    def is_generator_due(self, step: int) -> bool:
        """Whether the generator is updated in this step (the first is step 1)."""
        return (step - 1) % self.scores.critic_updates == 0

    @property
    def generator_updates(self) -> int:
        """Updates of the generator in the whole run."""
        return -(-self.run.steps // self.scores.critic_updates)


@dataclasses.dataclass(frozen=True)
class InitTraining(DistillTraining):
    """Stage `init`: self-forcing distillation of single clips, with window and sink."""


@dataclasses.dataclass(frozen=True)
class StreamingConfig:
    """How long tuning cuts its sequences into clips.

    Attributes:
      sequence_frames: latent frames of a sequence.
      new_frames: choices for the new frames of a clip after the first; the others overlap.
      switch_frames: choices for the frame at which the prompt changes; empty keeps one prompt.
      keep_sink: leave the sink's keys and values as they are at a switch.
    """

    sequence_frames: int = 240
    new_frames: tuple[int, ...] = (18,)
    switch_frames: tuple[int, ...] = (21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201)
    keep_sink: bool = False


@dataclasses.dataclass(frozen=True)
class LongTraining(DistillTraining):
    """Stage `long`: streaming long tuning, clip by clip of sequences that switch their prompt."""

    streaming: StreamingConfig = StreamingConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        frames = self.streaming.switch_frames
        require(
            all(0 < f < self.streaming.sequence_frames for f in frames),
            f"streaming.switch_frames={frames} must lie within streaming.sequence_frames="
            f"{self.streaming.sequence_frames}",
        )
        require(
            not frames or not self.data.prompts or self.data.switch_prompts != "",
            "data.switch_prompts is empty: name the file of prompts to switch to, or leave "
            "streaming.switch_frames empty",
        )


STAGES: Mapping[str, type[Training]] = {
    "vae": VAETraining,
    "text": TextTraining,
    "teacher": TeacherTraining,
    "causal_init": CausalInitTraining,
    "init": InitTraining,
    "long": LongTraining,
}
"""Stage name to the type of its config, in the order of the recipe."""


def stage_of(config: Training) -> str:
    """The name of the stage a config is for."""
    return next(name for name, cls in STAGES.items() if type(config) is cls)
