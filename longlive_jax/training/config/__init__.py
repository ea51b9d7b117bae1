"""Every knob of training, as frozen dataclasses; the model's own knobs are in `longlive_jax.config`.

A stage's config has the sections every stage shares (`Training`) and one section of its own. A config file
is Python: a module whose `get_config()` returns one of them.
"""

from collections.abc import Mapping

from longlive_jax.training.config.distill import (
    CacheGradient,
    DistillTraining,
    InitTraining,
    LongTraining,
    LoRAConfig,
    RolloutConfig,
    ScoresConfig,
    StreamingConfig,
    TextGradient,
)
from longlive_jax.training.config.encoders import (
    TextTraining,
    VAELoss,
    VAETraining,
)
from longlive_jax.training.config.flow import (
    CausalFlowConfig,
    CausalInitTraining,
    CausalMethod,
    FlowConfig,
    FlowTraining,
    TeacherTraining,
)
from longlive_jax.training.config.reward import (
    ReaderConfig,
    ReaderTraining,
    RewardConfig,
    RewardTraining,
)
from longlive_jax.training.config.shared import (
    ClipsConfig,
    EvaluationConfig,
    MeshConfig,
    OptimizerConfig,
    PromptsConfig,
    RunConfig,
    Training,
)

__all__ = (
    "STAGES",
    "CacheGradient",
    "CausalFlowConfig",
    "CausalInitTraining",
    "CausalMethod",
    "ClipsConfig",
    "DistillTraining",
    "EvaluationConfig",
    "FlowConfig",
    "FlowTraining",
    "InitTraining",
    "LoRAConfig",
    "LongTraining",
    "MeshConfig",
    "OptimizerConfig",
    "PromptsConfig",
    "ReaderConfig",
    "ReaderTraining",
    "RewardConfig",
    "RewardTraining",
    "RolloutConfig",
    "RunConfig",
    "ScoresConfig",
    "StreamingConfig",
    "TeacherTraining",
    "TextGradient",
    "TextTraining",
    "Training",
    "VAELoss",
    "VAETraining",
    "stage_of",
)

STAGES: Mapping[str, type[Training]] = {
    "vae": VAETraining,
    "text": TextTraining,
    "teacher": TeacherTraining,
    "causal_init": CausalInitTraining,
    "init": InitTraining,
    "long": LongTraining,
    "reader": ReaderTraining,
    "reward": RewardTraining,
}
"""Stage name to the type of its config, in the order of the recipe."""


def stage_of(config: Training) -> str:
    """The name of the stage a config is for."""
    return next(name for name, cls in STAGES.items() if type(config) is cls)
