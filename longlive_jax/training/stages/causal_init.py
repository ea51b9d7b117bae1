"""Stage `causal_init`: the teacher made causal, by teacher forcing or by ODE regression."""

import functools
from typing import Any

from longlive_jax.training import flow, flow_loop, sampling
from longlive_jax.training.config import CausalInitTraining
from longlive_jax.training.loop import Resume


def train(config: CausalInitTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """See `flow_loop.train`."""
    ways: dict[str, tuple[Any, Any]] = {
        "teacher_forcing": (
            flow.encoded_clips,
            functools.partial(sampling.causal, solver=flow.solver(config)),
        ),
        # It knows the few denoising steps, and no noise level between them.
        "ode": (flow.trajectories, sampling.few_step),
    }
    clips, sample = ways[config.flow.method]
    return flow_loop.train(
        config,
        needs=(*flow.NEEDS, flow.PART),
        clips=clips,
        sample=sample,
        resume=resume,
        is_quiet=is_quiet,
    )
