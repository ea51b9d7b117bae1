"""Stage `init`: the few-step causal student, by self-forcing distillation of single clips.

`training.distill` has the steps; this is the loop.
"""

import functools
from typing import Any

import jax

from longlive_jax.training import distill
from longlive_jax.training import distill_setup as setups
from longlive_jax.training import prompts as prompts_lib
from longlive_jax.training.config import InitTraining
from longlive_jax.training.loop import Resume, TrainingRun, check_base, make_mesh
from longlive_jax.training.prompts import PROMPT


def train(config: InitTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Trains generator and critic and exports both; returns the report."""
    check_base(config, *setups.NEEDS)
    mesh = make_mesh(config)
    with TrainingRun(config, resume=resume, is_quiet=is_quiet) as run:
        setup = setups.load(config, mesh)
        batches = prompts_lib.batches(config, setup.tokenizer, with_switch=False)
        evaluator = setups.evaluator(setup)
        train_generator, train_critic = (
            jax.jit(functools.partial(distill.train, setup.distillation, name), donate_argnums=0)
            for name in (distill.GENERATOR, distill.CRITIC)
        )
        state = run.start(setups.init_state(setup), batches)
        run.flops = distill.step_flops(setup.distillation)
        frames = config.data.batch_size * config.model.vae.video_frames(config.rollout.clip_frames)
        for step in run.steps():
            metrics = {}
            if config.is_generator_due(step):
                text = setup.embed(next(batches))[PROMPT]
                state, metrics = train_generator(state, setup.given, text)
            text = setup.embed(next(batches))[PROMPT]
            state, critic_metrics = train_critic(state, setup.given, text)
            run.after(step, state, metrics | critic_metrics, frames=frames)
            if run.is_evaluation_due(step):
                videos = evaluator.videos(setups.student_params(setup, state))
                run.evaluated(step, evaluator.scores(videos), videos)
            if run.is_early_export_due(step):
                run.exported(step, setups.export(setup, state))
        return run.finish(export=setups.export(setup, state))
