"""The loop of the two stages that learn by flow matching; `training.flow` has its parts."""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from longlive_jax import sharding
from longlive_jax.training import export as export_lib
from longlive_jax.training import flow
from longlive_jax.training import world as worlds
from longlive_jax.training.config import FlowTraining
from longlive_jax.training.flow import PART, Frozen, Sample
from longlive_jax.training.loop import Resume, TrainingRun, check_base, make_mesh
from longlive_jax.training.state import TrainState
from longlive_jax.training.stored import StoredClips


def train(
    config: FlowTraining,
    *,
    needs: Sequence[str],
    clips: Callable[[FlowTraining, Frozen], StoredClips],
    sample: Sample,
    resume: Resume,
    is_quiet: bool,
) -> dict[str, Any]:
    """Trains the transformer and exports its moving average; returns the report.

    Args:
      config: of the stage.
      needs: parts its base must have.
      clips: what it learns from, `flow.encoded_clips` or `flow.trajectories`.
      sample: what evaluations sample with.
      resume: see `loop.TrainingRun`.
      is_quiet: see there.
    """
    check_base(config, *needs)
    mesh = make_mesh(config)
    with TrainingRun(config, resume=resume, is_quiet=is_quiet) as run:
        frozen = flow.load_frozen(config, mesh)
        batches = iter(clips(config, frozen).batches(worlds.shard()))
        evaluator = flow.evaluator(config, frozen, sample)
        step_fn = jax.jit(functools.partial(flow.train_step, config, frozen.generator), donate_argnums=0)
        state = run.start(flow.init(config, frozen, mesh), batches)
        run.flops = flow.step_flops(config, state.networks[PART].params)
        frames = config.data.batch_size * config.model.vae.video_frames(config.data.frames)
        for step in run.steps():
            state, metrics = step_fn(state, sharding.place_batch(next(batches), mesh), frozen.captions)
            run.after(step, state, metrics, frames=frames)
            if run.is_evaluation_due(step):
                videos = evaluator.videos(state.networks[PART].best)
                run.evaluated(step, evaluator.scores(videos), videos)
            if run.is_early_export_due(step):
                run.exported(step, _export(config, frozen, state))
        return run.finish(export=_export(config, frozen, state))


def _export(config: FlowTraining, frozen: Frozen, state: TrainState) -> pathlib.Path:
    return export_lib.export(config, {PART: state.networks[PART].best}, model=frozen.model)
