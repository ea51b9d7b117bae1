"""Stage `reward`: the student tuned by what a reader sees in its own rollouts.

`training.reward` has the steps; this is the loop. Every update takes the sequences one clip further; when
they are at their end, new ones begin.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from longlive_jax import sharding
from longlive_jax.training import distill, reward
from longlive_jax.training import distill_setup as setups
from longlive_jax.training import prompts as prompts_lib
from longlive_jax.training.config import RewardTraining
from longlive_jax.training.loop import Resume, TrainingRun, check_base, make_mesh
from longlive_jax.training.prompts import PROMPT, SWITCH


def train(config: RewardTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Trains the generator (or its LoRA) and exports it; returns the report."""
    check_base(config, *setups.NEEDS)
    mesh = make_mesh(config)
    with TrainingRun(config, resume=resume, is_quiet=is_quiet) as run:
        setup = reward.load(config, mesh)
        switches = bool(config.streaming.switch_frames)
        batches = prompts_lib.batches(config, setup.around.tokenizer, with_switch=switches)
        evaluator = setups.few_step_evaluator(setup.tuning, setup.around)
        begin = jax.jit(functools.partial(reward.begin, setup.tuning))
        advance = jax.jit(
            functools.partial(reward.train, setup.tuning), donate_argnums=0, static_argnames="new_frames"
        )
        streaming = setup.tuning.streaming
        state = run.start(reward.init_state(setup), batches)
        run.flops = reward.step_flops(setup.tuning)
        frame = int(np.max(state.extra.sequence.frame))
        for step in run.steps():
            if not streaming.choices(frame):
                batch = next(batches)
                text, codes = setup.around.embed(batch), sharding.place_batch(_codes(batch), mesh)
                asked = begin(state, text[PROMPT], codes[PROMPT], text.get(SWITCH), codes.get(SWITCH))
                state, frame = dataclasses.replace(state, extra=asked), 0
            random = distill.host_random(config.run.seed, step, reward.GENERATOR)
            new_frames = int(random.choice(streaming.choices(frame)))
            state, metrics = advance(state, setup.given, new_frames=new_frames)
            frame += new_frames
            video_frames = config.data.batch_size * new_frames * config.model.vae.temporal_stride
            run.after(step, state, metrics, frames=video_frames)
            if run.is_evaluation_due(step):
                videos = evaluator.videos(reward.student_params(setup, state))
                run.evaluated(step, evaluator.scores(videos), videos)
            if run.is_early_export_due(step):
                run.exported(step, reward.export(setup, state))
        return run.finish(export=reward.export(setup, state))


def _codes(batch: prompts_lib.TextBatch) -> dict[str, np.ndarray]:
    """What the prompts ask for, by prompt."""
    names = [name for name in (PROMPT, SWITCH) if f"{name}_codes" in batch]
    return {name: np.asarray(batch[f"{name}_codes"], np.int32) for name in names}
