"""What a run will need, compiled from shapes alone."""

import jax
import numpy as np
import pytest

from longlive_jax import sharding
from longlive_jax.training import plan
from longlive_jax.training.config_file import load_config
from tests.training._runs import CONFIGS

PAPER = CONFIGS.parent / "wan"
LIMIT_BYTES = 80e9


def mesh_of(data, fsdp):
    devices = np.array(jax.devices()[: data * fsdp])
    return jax.sharding.Mesh(devices.reshape(data, fsdp), sharding.AXES)


@pytest.mark.slow
@pytest.mark.usefixtures("fast_programs")
def test_more_devices_hold_less_each():
    """Weights and optimiser state are split by fsdp; the batch, and what it needs, by both axes."""
    config = load_config(CONFIGS / "init.py", {"smoke": "true", "model.transformer.dim": "128"})
    (one,), (eight,) = (list(plan.plan(config, mesh_of(*m), only="critic")) for m in ((1, 1), (1, 8)))
    assert one.name == eight.name == "critic"
    assert eight.argument_bytes < one.argument_bytes / 3
    assert eight.temporary_bytes < one.temporary_bytes / 3
    assert one.peak_bytes == one.argument_bytes + one.output_bytes + one.temporary_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["init", "long"])
def test_the_papers_critic_fits_80_gb(name):
    """On eight devices instead of 64, which hold the same shards of the weights and as many clips each."""
    changes = {"mesh.data": "1", "data.batch_size": "8"}
    config = load_config(PAPER / f"{name}.py", changes)
    for program in plan.plan(config, mesh_of(1, 8), only="critic"):
        assert program.peak_bytes < LIMIT_BYTES, program
