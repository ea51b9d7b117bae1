"""Stage `teacher`: the bidirectional model, by flow matching; short clips first, then long ones.

`training.flow` has the parts; this is the loop.
"""

import functools
from typing import Any

import jax

from longlive_jax import sharding
from longlive_jax.training import export as export_lib
from longlive_jax.training import flow, sampling
from longlive_jax.training import world as worlds
from longlive_jax.training.config import TeacherTraining
from longlive_jax.training.flow import PART
from longlive_jax.training.loop import Resume, Session, check_base, make_mesh


def train(config: TeacherTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Trains the transformer and exports its moving average; returns the report."""
    check_base(config, *flow.NEEDS)
    mesh = make_mesh(config)
    with Session(config, resume=resume, is_quiet=is_quiet) as session:
        frozen = flow.load_frozen(config, mesh)
        clips = iter(flow.encoded_clips(config, frozen).batches(worlds.shard()))
        evaluator = flow.evaluator(config, frozen, sampling.bidirectional)
        step_fn = jax.jit(functools.partial(flow.train_step, config, frozen.generator), donate_argnums=0)
        state = session.start(flow.init(config, frozen, mesh), clips)
        session.flops = flow.step_flops(config, state.networks[PART].params)
        frames = config.data.batch_size * config.model.vae.video_frames(config.data.frames)
        for step in session.steps():
            state, metrics = step_fn(state, sharding.place_batch(next(clips), mesh), frozen.captions)
            session.after(step, state, metrics, frames=frames)
            if session.is_evaluation_due(step):
                videos = evaluator.videos(state.networks[PART].best)
                session.evaluated(step, evaluator.scores(videos), videos)
            if session.is_early_export_due(step):
                export_lib.export(config, {PART: state.networks[PART].best}, model=frozen.model)
        folder = export_lib.export(config, {PART: state.networks[PART].best}, model=frozen.model)
        return session.finish(export=str(folder))
