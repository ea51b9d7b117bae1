"""Stage `long`: streaming long tuning, on sequences that are carried from step to step.

`training.distill` has the steps; this is the loop. Every update, of the generator or of the critic,
takes the sequences one clip further; when they are at their end, new ones begin.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from longlive_jax.training import distill
from longlive_jax.training import distill_setup as setups
from longlive_jax.training import prompts as prompts_lib
from longlive_jax.training.config import LongTraining
from longlive_jax.training.distill import CRITIC, GENERATOR
from longlive_jax.training.loop import Resume, TrainingRun, check_base, make_mesh
from longlive_jax.training.prompts import PROMPT, SWITCH
from longlive_jax.training.state import Metrics


def train(config: LongTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Trains the LoRAs (or all weights) of generator and critic and exports them; returns the report."""
    check_base(config, *setups.NEEDS)
    mesh = make_mesh(config)
    with TrainingRun(config, resume=resume, is_quiet=is_quiet) as run:
        setup = setups.load(config, mesh)
        switches = bool(config.streaming.switch_frames)
        batches = prompts_lib.batches(config, setup.tokenizer, with_switch=switches)
        evaluator = setups.evaluator(setup)
        begin = jax.jit(functools.partial(distill.begin_long, setup.distillation), static_argnames="name")
        advance = {
            name: jax.jit(
                functools.partial(distill.train_long, setup.distillation, name),
                donate_argnums=0,
                static_argnames="new_frames",
            )
            for name in (GENERATOR, CRITIC)
        }
        streaming = setup.distillation.streaming
        random = functools.partial(distill.host_random, config.run.seed)
        state = run.start(setups.init_state(setup), batches)
        run.flops = distill.step_flops(setup.distillation)
        frame = int(np.max(state.extra.frame))
        for step in run.steps():
            metrics: Metrics = {}
            video_frames = 0
            for name in (GENERATOR, CRITIC) if config.is_generator_due(step) else (CRITIC,):
                if not streaming.choices(frame):
                    text = setup.embed(next(batches))
                    sequences = begin(state, text[PROMPT], text.get(SWITCH), name=name)
                    state, frame = dataclasses.replace(state, extra=sequences), 0
                new_frames = int(random(step, name).choice(streaming.choices(frame)))
                state, found = advance[name](state, setup.given, new_frames=new_frames)
                metrics |= found
                frame += new_frames
                video_frames += config.data.batch_size * new_frames * config.model.vae.temporal_stride
            run.after(step, state, metrics, frames=video_frames)
            if run.is_evaluation_due(step):
                videos = evaluator.videos(setups.student_params(setup, state))
                run.evaluated(step, evaluator.scores(videos), videos)
            if run.is_early_export_due(step):
                run.exported(step, setups.export(setup, state))
        return run.finish(export=setups.export(setup, state))
