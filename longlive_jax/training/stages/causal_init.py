"""Stage `causal_init`: the causal student from the teacher's weights, by teacher forcing."""

from typing import Any

from longlive_jax.training import flow, flow_loop, sampling
from longlive_jax.training.config import CausalInitTraining
from longlive_jax.training.loop import Resume


def train(config: CausalInitTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """See `flow_loop.train`."""
    return flow_loop.train(
        config, needs=(*flow.NEEDS, flow.PART), sample=sampling.causal, resume=resume, is_quiet=is_quiet
    )
