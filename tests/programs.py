"""Compiled programs that tests look into."""

import os

import jax


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """As users compile it: the quick tests emit loops in another way (tests/conftest.py)."""
    is_quick = "xla_cpu_use_fusion_emitters=false" in os.environ.get("XLA_FLAGS", "")
    return lowered.compile({"xla_cpu_use_fusion_emitters": True} if is_quick else None)
