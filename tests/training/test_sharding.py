"""The rules on the real models' shapes, and that nothing large is made whole on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from longlive_jax import lora, sharding
from longlive_jax.config import preset
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.errors import UserError
from longlive_jax.training import state as states
from longlive_jax.training.config import OptimizerConfig, RunConfig

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, ema_decay=0.9)
RUN = RunConfig(folder="unused", steps=10)


def train_state_shapes(params):
    def make(params):
        network = states.init_network(params, OPTIMIZER, steps=RUN.steps)
        return states.init_state({"transformer": network}, RUN)

    return jax.eval_shape(make, params)


def bytes_per_device(shapes, placed):
    def size(leaf, sharding):
        return np.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, shapes, placed)))


@pytest.mark.parametrize("name", ["wan_1_3b", "wan_14b"])
def test_fsdp_splits_the_whole_training_state(name):
    mesh = sharding.make_mesh(data=1, fsdp=8)
    shapes = train_state_shapes(expected_tree("transformer", preset(name)))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    split = bytes_per_device(shapes, sharding.shardings(shapes, mesh))
    assert split < whole / 8 * 1.02


def test_lora_and_text_encoder_are_split_too():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    config = preset("wan_1_3b")
    transformer = expected_tree("transformer", config)
    update = jax.eval_shape(functools.partial(lora.init, params=transformer, rank=256), jax.random.key(0))
    for shapes in (update, expected_tree("text_encoder", config)):
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
        assert bytes_per_device(shapes, sharding.shardings(shapes, mesh)) < whole / 8 * 1.02


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("networks/g/params/blocks/self_attn/q/kernel", (30, 1536, 1536), P(None, "fsdp", None)),
        ("networks/g/optimizer/0/mu/blocks/ffn/fc2/kernel", (30, 8960, 1536), P(None, None, "fsdp")),
        ("blocks/self_attn/q/kernel", (2, 33, 64), P(None, None, None)),  # 33 does not divide
        ("blocks/self_attn/q/bias", (30, 1536), P()),
        ("extra/cache/key", (1, 30, 8, 9, 4, 2, 8), P(None, None, ("data", "fsdp"))),
        ("extra/cache/end", (1, 8), P(None, ("data", "fsdp"))),
        ("extra/history", (2, 8, 21, 4, 4, 16), P(None, ("data", "fsdp"))),
        ("extra/switch/text", (2, 8, 16, 64), P(None, ("data", "fsdp"))),
        ("extra/switch/frame", (2,), P(None)),
        ("cache/key", (30, 8, 9, 4, 2, 8), P(None, ("data", "fsdp"))),
        ("step", (), P()),
    ],
)
def test_partition_of_a_leaf(path, shape, expected):
    mesh = sharding.make_mesh(data=4, fsdp=2)
    assert sharding.partition(path, shape, mesh) == expected


def test_first_rule_that_matches_decides():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    rules = ((r"kernel$", P("data")), (r"special/kernel$", P("fsdp")))
    assert sharding.partition("special/kernel", (8, 8), mesh, rules) == P("data")


def test_init_makes_every_piece_where_it_belongs():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def init(key):
        return {"blocks": {"ffn": {"fc1": {"kernel": jax.random.normal(key, (2, 8, 4))}}}}

    made = sharding.init_sharded(init, jax.random.key(0), mesh=mesh)
    kernel = made["blocks"]["ffn"]["fc1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2, 4)}
    np.testing.assert_array_equal(kernel, init(jax.random.key(0))["blocks"]["ffn"]["fc1"]["kernel"])


def test_batches_and_host_trees_keep_their_values():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    batch = {"x": np.arange(16.0).reshape(8, 2), "caption": np.array(["a"] * 8)}
    placed = sharding.place_batch(batch, mesh)
    assert set(placed) == {"x"}
    assert placed["x"].addressable_shards[0].data.shape == (1, 2)
    np.testing.assert_array_equal(placed["x"], batch["x"])
    tree = {"token_embedding": np.arange(32.0).reshape(16, 2)}
    placed = sharding.place(tree, mesh)["token_embedding"]
    assert placed.addressable_shards[0].data.shape == (8, 2)
    np.testing.assert_array_equal(placed, tree["token_embedding"])


@pytest.mark.parametrize(("data", "fsdp"), [(3, 2), (-1, -1), (-1, 3), (0, 8), (16, 1)])
def test_wrong_meshes_are_refused(data, fsdp):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(data=data, fsdp=fsdp)


@pytest.mark.parametrize(("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4))])
def test_minus_one_takes_the_rest(data, fsdp, shape):
    assert sharding.make_mesh(data=data, fsdp=fsdp).devices.shape == shape


def test_accumulated_gradients_are_those_of_the_whole_batch():
    def loss(params, batch, key):
        error = batch @ params
        return jnp.mean(error**2), {"size": jnp.mean(jnp.abs(error))}

    params, batch = jnp.arange(3.0), jax.random.normal(jax.random.key(0), (8, 3))
    whole = states.gradients(loss, params, batch, jax.random.key(1))
    parts = states.gradients(loss, params, batch, jax.random.key(1), micro_batches=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), whole, parts)
