"""The paper's first stage: self-forcing distillation of Wan2.1-1.3B, taught by Wan2.1-14B, on 64 devices.

    longlive train configs/wan/init.py --distributed

Needs the prompt file and checkpoint directories of `longlive convert`: the causal model of the ODE
initialisation with text encoder and VAE, and both Wan models (scores.teacher, scores.critic).
"""

from longlive_jax.training import paper
from longlive_jax.training.config import InitTraining, RunConfig


def get_config() -> InitTraining:
    return InitTraining(
        model=paper.STUDENT,
        run=RunConfig(folder="runs/wan/init", steps=700, eval_every=200, checkpoint_every=100),
        optimizer=paper.optimizer(2e-6, ema_decay=0.99),
        critic_optimizer=paper.optimizer(4e-7),
        data=paper.prompts(with_switch=False),
        base="checkpoints/ode_init",
        scores=paper.SCORES,
        mesh=paper.MESH,
        evaluation=paper.EVALUATION,
        remat="full",
    )
