"""Stage `teacher`: the bidirectional model, by flow matching; short clips first, then long ones."""

import functools
from typing import Any

from longlive_jax.training import flow, flow_loop, sampling
from longlive_jax.training.config import TeacherTraining
from longlive_jax.training.loop import Resume


def train(config: TeacherTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """See `flow_loop.train`."""
    return flow_loop.train(
        config,
        needs=flow.NEEDS,
        clips=flow.encoded_clips,
        sample=functools.partial(sampling.bidirectional, solver=flow.solver(config)),
        resume=resume,
        is_quiet=is_quiet,
    )
