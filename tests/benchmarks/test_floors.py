"""The work of a block from first principles, against the operations in the traced program."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import floors, plot
from longlive_jax.config import WAN_1_3B, WindowConfig
from longlive_jax.models.transformer import TextContext, Transformer, init_params
from longlive_jax.ops.windowed_attention import CachedContext

S = jax.ShapeDtypeStruct


def test_a_block_of_wan_1_3b():
    """The numbers of docs/performance.md."""
    work = floors.block_step(WAN_1_3B, WindowConfig(), frame_len=1560, passes=5, itemsize=2)
    rates = floors.Rates(flops=790e12, bandwidth=4.3e12)
    assert work.seconds(rates) == pytest.approx(0.179, rel=0.01)
    assert 12 / work.seconds(rates) == pytest.approx(67, rel=0.01)


def test_a_pass_has_the_operations_that_its_trace_has():
    model = Transformer(WAN_1_3B, dtype=jnp.float32)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    frame_len, frames, slots = 24, 3, 9
    latents = S((1, frames, 8, 12, 16), jnp.float32)
    text = TextContext(*(S((30, 1, 512, 12, 128), jnp.float32) for _ in range(2)))
    keys = S((30, 1, slots * frame_len, 12, 128), jnp.float32)

    def run(params, latents, text, keys, values, length):
        context = CachedContext(keys, values, length)
        return model.apply({"params": params}, latents, jnp.zeros((1, 1)), text, context=context)

    traced = floors.traced(run, params, latents, text, keys, keys, S((1,), jnp.int32))
    expected = floors.transformer_pass(
        WAN_1_3B, tokens=frames * frame_len, keys=(frames + slots) * frame_len, itemsize=4
    )
    # The trace has the embedding of one timestep as well.
    assert traced.flops == pytest.approx(expected.flops, rel=0.01)


def test_loops_count_as_often_as_they_run():
    def run(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, None, length=7)[0]

    work = floors.traced(run, S((16, 16), jnp.float32))
    assert work.flops == 7 * 2 * 16**3
    assert work.size == 2 * 16 * 16 * 4


def test_of_what_differs_by_platform_one_form_counts():
    def run(x):
        return jax.lax.platform_dependent(x, cuda=lambda x: x @ x @ x, default=lambda x: x @ x)

    assert floors.traced(run, S((16, 16), jnp.float32)).flops == 2 * 16**3


def test_the_plot_takes_its_points_from_the_rows(tmp_path):
    def row(case, seconds):
        return {"case": case, "seconds": seconds, "floor_seconds": seconds / 2}

    by_window = [row("window=12 sink=3", 0.2), row("window=6 sink=3", 0.1), row("window=12 sink=0", 9.0)]
    assert plot.points(by_window, r"window=(\d+) sink=3") == [(6, 100, 50), (12, 200, 100)]
    results = {"windows": {"rows": by_window}, "length": {"rows": [row("after 10 s", 0.2)]}}
    plot.draw(results, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().count("<path") > 4
