"""What the configs of all stages have: how long, how fast, on what, where, and what is measured."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from longlive_jax.config import PipelineConfig, RematPolicy
from longlive_jax.errors import require
from longlive_jax.toy.world import FIELDS, Split

Schedule = Literal["constant", "cosine"]
Better = Literal["max", "min"]


def at_least(section: str, config: Any, **limits: float) -> None:
    """Refuses fields of a section below their limits."""
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
        at_least("run", self, steps=1, seed=0, log_every=1, eval_every=0, checkpoint_every=1, keep=1)
        at_least("run", self, export_every=0, micro_batches=1, diverged_factor=1)
        require(self.folder != "", "run.folder is empty; name the folder the run writes to")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping, and the moving average of what it makes.

    Attributes:
      learning_rate: peak.
      schedule: "constant", or "cosine" down to 1% of the peak at the last update.
      schedule_steps: updates that the schedule takes; 0 for those of the run. With more than these the run
        ends on the way down.
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
    schedule_steps: int = 0
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    ema_start: int = 0

    def __post_init__(self) -> None:
        at_least("optimizer", self, schedule_steps=0, warmup_steps=0, weight_decay=0, ema_start=0)
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


def _check_stream(data: "ClipsConfig | PromptsConfig") -> None:
    """What every stream of batches needs."""
    at_least("data", data, batch_size=1, threads=1, prefetch=1, seed=0)
    require(
        data.examples >= data.batch_size,
        f"data.examples={data.examples} must be at least batch_size={data.batch_size}",
    )


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
        at_least("data", self, frames=1)
        _check_stream(self)


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
        _check_stream(self)
        require(
            not self.switch_prompts or self.prompts != "",
            f"data.switch_prompts={self.switch_prompts} needs data.prompts, the prompts they follow",
        )


READ_FROM_PIXELS = (*FIELDS, "all", "iou")
"""What evaluations read from videos of the toy world; see `world.adherence`."""


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
        at_least("evaluation", self, clips=1, frames=1, batch_size=1, seed=0)


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

    evaluated: ClassVar[tuple[str, ...]] = READ_FROM_PIXELS
    """Numbers that the stage's evaluations give."""

    def __post_init__(self) -> None:
        require(
            self.data.batch_size % self.run.micro_batches == 0,
            f"data.batch_size={self.data.batch_size} must be a multiple of run.micro_batches="
            f"{self.run.micro_batches}",
        )
        for name, (optimizer, updates) in self.updates.items():
            require(
                optimizer.schedule_steps == 0 or optimizer.schedule_steps >= updates,
                f"{name}.schedule_steps={optimizer.schedule_steps} is less than the run's {updates} updates; "
                "give at least as many, or 0 for as many",
            )
        allowed = ("loss", *self.evaluated)
        require(
            self.evaluation.metric in allowed,
            f"evaluation.metric={self.evaluation.metric!r} must be one of {', '.join(allowed)}",
        )

    @property
    def updates(self) -> Mapping[str, tuple[OptimizerConfig, int]]:
        """Every optimiser by its field's name, and its updates in the whole run."""
        return {"optimizer": (self.optimizer, self.run.steps)}
