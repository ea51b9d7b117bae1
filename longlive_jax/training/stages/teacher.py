"""Stage `teacher`: the bidirectional model, by flow matching; short clips first, then long ones."""

from typing import Any

from longlive_jax.training import flow, flow_loop, sampling
from longlive_jax.training.config import TeacherTraining
from longlive_jax.training.loop import Resume


def train(config: TeacherTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """See `flow_loop.train`."""
    return flow_loop.train(
        config, needs=flow.NEEDS, sample=sampling.bidirectional, resume=resume, is_quiet=is_quiet
    )
