"""What measures the machine does the work that is counted, and memory is a program's own."""

import functools

import jax
import jax.numpy as jnp
import pytest

from benchmarks import floors
from benchmarks.suites import CHAIN, SUITES, copies, draw, measured_rates, median_seconds, memory_of, products
from longlive_jax.audit import audit

TINY = SUITES["tiny"]
MIB = jax.ShapeDtypeStruct((512, 512), jnp.float32)


def test_the_products_that_are_timed_are_as_many_as_are_counted():
    work = floors.traced(products, MIB, MIB)
    assert work.flops == CHAIN * 2 * 512**3


def test_the_copies_that_are_timed_write_over_what_they_read():
    program = jax.jit(copies, donate_argnums=0).lower(MIB).compile()
    assert audit(program, large=512 * 512).copies == ()
    assert memory_of(program) == {"program_mib": 1.0, "temporary_mib": 0.0}
    assert copies(jnp.zeros(3)).tolist() == [CHAIN * (CHAIN - 1) / 2] * 3


def test_the_rate_is_that_of_single_products():
    """If the compiler left out all but one of the chain, it would be `CHAIN` times as high."""
    pair = [draw(i, (TINY.matmul, TINY.matmul), TINY.dtype) for i in range(2)]
    single = 2 * TINY.matmul**3 / median_seconds(functools.partial(jax.jit(jnp.matmul), *pair), 20)
    assert single / CHAIN * 2 < measured_rates(TINY).flops < single * CHAIN / 2


def test_products_neither_grow_nor_vanish():
    first, weight = (draw(i, (256, 256), "float32") for i in range(2))
    assert float(jnp.std(products(first, weight / 16))) == pytest.approx(1, rel=0.5)


def test_memory_counts_what_is_written_over_once_and_the_larger_of_two_programs():
    kept = jax.jit(lambda x: x + 1).lower(MIB).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(MIB).compile()
    assert memory_of(kept)["program_mib"] == 2
    assert memory_of(donated)["program_mib"] == 1
    assert memory_of(kept, donated)["program_mib"] == 3
