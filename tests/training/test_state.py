"""The update every stage makes: AdamW, clipping, schedule and average against their formulas."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longlive_jax import lora
from longlive_jax.config import preset
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.training import state as states
from longlive_jax.training.config import OptimizerConfig
from longlive_jax.training.stages import text
from tests.training._runs import smoke

PARAMS = {"fc": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([[0.5, -0.5]])}}
GRADS = {"fc": {"kernel": jnp.array([[0.3, -0.1], [2.0, 1.0]]), "bias": jnp.array([[0.2, 0.4]])}}


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def trees():
    model = preset("toy")
    transformer = expected_tree("transformer", model)
    yield "transformer", transformer
    yield "vae", expected_tree("vae", model)
    yield "text encoder", expected_tree("text_encoder", model)
    yield "lora", jax.eval_shape(functools.partial(lora.init, rank=2), jax.random.key(0), transformer)


@pytest.mark.parametrize("tree", [pytest.param(tree, id=name) for name, tree in trees()])
def test_weight_decay_spares_all_but_matrices(tree):
    """Every leaf of the real trees, those of the layer-stacked blocks included."""
    spared = ("bias", "scale", "modulation", "position")
    found = paths(states.is_decayed(tree))
    assert any(found.values())
    for path, decayed in found.items():
        assert decayed == (path.rsplit("/")[-1] not in spared), path
    for path, leaf in paths(tree).items():
        assert leaf.ndim > 1 or not found[path], path


def test_weight_decay_pulls_on_the_heads_of_the_text_stage():
    config = smoke("text", None, "unused")
    state = jax.eval_shape(lambda: text.init(config, text.text_encoder_of(config.model)))
    found = paths(states.is_decayed(state.networks[text.PART].params))
    assert {found[f"heads/{field}/kernel"] for field in ("shape", "colour", "motion", "background")} == {True}
    assert found["encoder/token_embedding"]


def test_a_stacked_bias_stays_where_it_is_without_a_gradient():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", weight_decay=0.5)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    network, _ = states.update(states.init_network(PARAMS, config, steps=4), zero, config, steps=4)
    np.testing.assert_array_equal(network.params["fc"]["bias"], PARAMS["fc"]["bias"])
    expected = PARAMS["fc"]["kernel"] * (1 - 0.1 * 0.5)
    np.testing.assert_allclose(network.params["fc"]["kernel"], expected, rtol=1e-6)


def test_updates_are_adamw_with_clipping_warmup_and_cosine():
    """Against the formulas, written out; and what is reported of each update."""
    settings = {"learning_rate": 0.02, "schedule": "cosine", "warmup_steps": 2, "betas": (0.8, 0.9)}
    config = OptimizerConfig(**settings, weight_decay=0.1, clip_norm=1.5)
    steps, network = 6, None
    network = states.init_network(PARAMS, config, steps=6)
    value = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS["fc"].items()}
    first, second = ({name: np.zeros_like(leaf) for name, leaf in value.items()} for _ in range(2))
    for count in range(steps):
        grads = jax.tree.map(lambda g, n=count: g * (1 if n % 2 else -0.5), GRADS)
        network, report = states.update(network, grads, config, steps=steps)
        norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
        # Two updates of rise that begin above 0, then half a cosine down to 1 % over the four that are left.
        fall = 0.01 + 0.99 * (1 + math.cos(math.pi * (count - 2) / 4)) / 2
        rate = 0.02 * ((count + 1) / 3 if count < 2 else fall)
        assert float(report["grad_norm"]) == pytest.approx(norm, rel=1e-6)
        assert float(report["learning_rate"]) == pytest.approx(rate, rel=1e-5)
        for name, decay in (("kernel", 0.1), ("bias", 0.0)):
            g = np.asarray(grads["fc"][name], np.float64) * min(1.0, 1.5 / norm)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.9 * second[name] + 0.1 * g**2
            mean, square = first[name] / (1 - 0.8 ** (count + 1)), second[name] / (1 - 0.9 ** (count + 1))
            value[name] -= rate * (mean / (np.sqrt(square) + 1e-8) + decay * value[name])
            np.testing.assert_allclose(network.params["fc"][name], value[name], rtol=2e-5)
    assert int(network.updates) == steps


def test_a_schedule_may_be_longer_than_the_run():
    config = OptimizerConfig(learning_rate=0.02, schedule="cosine", warmup_steps=2)
    shorter = dataclasses.replace(config, schedule_steps=9)
    whole, stopped = states.learning_rate(config, steps=9), states.learning_rate(shorter, steps=5)
    assert [float(stopped(count)) for count in range(5)] == [float(whole(count)) for count in range(5)]
    assert float(stopped(4)) > float(states.learning_rate(config, steps=5)(4))


def test_only_gradients_above_the_limit_are_clipped():
    """By optax's own rule, on either side of the limit."""
    for clip_norm in (0.5, 100.0):
        config = OptimizerConfig(learning_rate=0.1, schedule="constant", eps=1.0, clip_norm=clip_norm)
        chain = optax.chain(optax.clip_by_global_norm(clip_norm), states.make_optimizer(config, steps=3))
        changes, _ = chain.update(GRADS, chain.init(PARAMS), PARAMS)
        network, _ = states.update(states.init_network(PARAMS, config, steps=3), GRADS, config, steps=3)
        expected = optax.apply_updates(PARAMS, changes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), network.params, expected)


def test_the_average_is_the_parameters_until_it_begins():
    """Three updates, the average from the second on."""
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", ema_decay=0.75, ema_start=1)
    network, seen = states.init_network(PARAMS, config, steps=3), []
    for _ in range(3):
        network, _ = states.update(network, GRADS, config, steps=3)
        seen.append((network.params["fc"]["kernel"], network.ema["fc"]["kernel"]))
    (one, first), (two, second), (three, third) = seen
    np.testing.assert_array_equal(first, one)
    np.testing.assert_allclose(second, 0.75 * one + 0.25 * two, rtol=1e-6)
    np.testing.assert_allclose(third, 0.75 * second + 0.25 * three, rtol=1e-6)
    assert network.best is network.ema
    assert states.init_network(PARAMS, OptimizerConfig(learning_rate=0.1), steps=3).best is PARAMS


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(wrong):
    config = OptimizerConfig(learning_rate=0.1, ema_decay=0.9)
    before = states.init_network(PARAMS, config, steps=3)
    grads = {"fc": {**GRADS["fc"], "bias": jnp.array([[wrong, 0.0]])}}
    after, report = states.update(before, grads, config, steps=3)
    assert not np.isfinite(report["grad_norm"])
    jax.tree.map(np.testing.assert_array_equal, after, before)
