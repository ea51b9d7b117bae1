"""The paper's second stage: streaming long tuning with LoRAs of rank 256, on 64 devices.

    longlive train configs/wan/long.py --distributed

Needs runs/wan/init/export, both prompt files, and checkpoint directories of both Wan models.
"""

import dataclasses

from longlive_jax.training import paper
from longlive_jax.training.config import LongTraining, LoRAConfig, RunConfig


def get_config() -> LongTraining:
    return LongTraining(
        model=paper.STUDENT,
        run=RunConfig(folder="runs/wan/long", steps=3000, eval_every=500, checkpoint_every=100),
        optimizer=paper.optimizer(1e-5, ema_decay=0.99),
        critic_optimizer=paper.optimizer(2e-6),
        data=paper.prompts(with_switch=True),
        base="runs/wan/init/export",
        scores=dataclasses.replace(paper.SCORES, critic=""),  # the first stage's critic
        lora=LoRAConfig(rank=256, alpha=256),
        mesh=paper.MESH,
        evaluation=paper.EVALUATION,
        remat="full",
    )
