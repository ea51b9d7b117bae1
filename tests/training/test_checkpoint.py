"""Training checkpoints: exact, complete or absent, the right ones kept, foreign ones refused."""

import dataclasses
import pathlib

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import sharding
from longlive_jax.config import TransformerConfig, WindowConfig
from longlive_jax.config_dict import override
from longlive_jax.errors import UserError
from longlive_jax.training import state as states
from longlive_jax.training.checkpoint import FOLDER, Checkpoints, has_checkpoints
from longlive_jax.training.config_file import load_config

CONFIG_FILE = pathlib.Path(__file__).parents[2] / "configs/toy/text.py"


@pytest.fixture
def config(tmp_path):
    return load_config(CONFIG_FILE, {"smoke": "true", "run.folder": str(tmp_path / "run")})


@pytest.fixture
def data():
    return iter(grain.MapDataset.range(100).shuffle(seed=1).repeat().to_iter_dataset())


def two_network_state(config, value=0.0):
    """A distillation's state: generator, critic, and a streaming sequence in flight."""
    from longlive_jax import cache

    def network(offset):
        params = {"blocks": {"ffn": {"fc1": {"kernel": jnp.full((2, 8, 4), value + offset)}}}}
        return states.init_network(params, dataclasses.replace(config.optimizer, ema_decay=0.9), steps=10)

    shape = TransformerConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=2, text_dim=8, text_len=4)
    kv = cache.init(shape, WindowConfig(), batch=8, frame_len=2, dtype=jnp.bfloat16)
    kv = dataclasses.replace(kv, key=kv.key + value)
    extra = {"cache": kv, "history": jnp.full((8, 3, 2, 2, 4), value), "prompts": jnp.arange(8)}
    return states.init_state({"generator": network(0.0), "critic": network(1.0)}, config.run, extra=extra)


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_everything_comes_back_bit_for_bit_and_sharded(config, data):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    state = sharding.init_sharded(lambda: two_network_state(config, 1 / 3), mesh=mesh)
    seen = [next(data) for _ in range(5)]
    with Checkpoints(config) as checkpoints:
        checkpoints.save(5, state, data)
    following = [next(data) for _ in range(5)]
    fresh = sharding.init_sharded(lambda: two_network_state(config), mesh=mesh)
    again = iter(grain.MapDataset.range(100).shuffle(seed=1).repeat().to_iter_dataset())
    with Checkpoints(config) as checkpoints:
        assert checkpoints.latest == 5
        restored = checkpoints.restore(fresh, again)
    assert_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)
    assert restored.extra["cache"].window == state.extra["cache"].window
    assert [next(again) for _ in range(5)] == following != seen


def test_a_state_may_be_donated_while_it_is_written(config, data):
    state = two_network_state(config, 2.0)
    expected = jax.tree.map(np.array, state)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(config) as checkpoints:
        checkpoints.save(1, state, data)
        change(state)
        checkpoints.wait()
        assert_equal(checkpoints.restore(two_network_state(config), data), expected)


def test_the_latest_and_the_best_are_kept(config, data):
    config = override(config, {"run.keep": 2})
    state = two_network_state(config)
    with Checkpoints(config) as checkpoints:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, None, 0.2, None], start=1):
            scores = None if accuracy is None else {"accuracy": accuracy}
            checkpoints.save(step, state, data, scores)
        checkpoints.wait()
        assert checkpoints.best == 2
    kept = sorted(int(path.name) for path in (pathlib.Path(config.run.folder) / FOLDER).iterdir())
    assert kept == [2, 5, 6]


def test_a_checkpoint_that_was_being_written_does_not_count(config, data):
    with Checkpoints(config) as checkpoints:
        checkpoints.save(3, two_network_state(config), data)
    folder = pathlib.Path(config.run.folder) / FOLDER
    (folder / "4.orbax-checkpoint-tmp-7").mkdir()
    with Checkpoints(config) as checkpoints:
        assert checkpoints.latest == 3


def test_another_config_is_refused_by_name(config, data):
    with Checkpoints(config) as checkpoints:
        checkpoints.save(1, two_network_state(config), data)
    changes = {"optimizer.learning_rate": 0.5, "model.text_encoder.ffn_dim": 96, "run.log_every": 7}
    with (
        Checkpoints(override(config, changes)) as checkpoints,
        pytest.raises(UserError, match=r"\(model.text_encoder.ffn_dim, optimizer.learning_rate\)"),
    ):
        checkpoints.restore(two_network_state(config), data)
    with Checkpoints(override(config, {"run.log_every": 7})) as checkpoints:
        checkpoints.restore(two_network_state(config), data)


def test_nothing_to_resume_is_said(config, data):
    assert not has_checkpoints(config.run.folder)
    with Checkpoints(config) as checkpoints, pytest.raises(UserError, match="no checkpoint to resume"):
        checkpoints.restore(two_network_state(config), data)
