"""The suites of `benchmarks.run`, and what its parts measure with."""

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import floors
from longlive_jax.config import (
    WAN_1_3B,
    WAN_VAE,
    DType,
    PipelineConfig,
    TransformerConfig,
    VAEConfig,
    preset,
)
from longlive_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Suite:
    """Sizes and repeats.

    Attributes:
      transformer: the model of the block step; attention has its heads.
      vae: the decoder.
      size: latent rows and columns.
      dtype: of everything.
      repeats: timed calls, of which the median counts.
      windows: window sizes in latent frames, with the released sink.
      sinks: sinks, with the released window.
      matmul: side of the matrix product that measures the machine.
      start_up: preset of the starts.
    """

    transformer: TransformerConfig
    vae: VAEConfig
    size: tuple[int, int]
    dtype: DType
    repeats: int
    windows: tuple[int, ...] = (6, 9, 12, 15, 18, 21, 24, 27)
    sinks: tuple[int, ...] = (0, 3, 6)
    matmul: int = 1024
    start_up: str = "toy"

    @property
    def frame_len(self) -> int:
        return self.transformer.frame_len(*self.size)

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else 4


CHAIN = 16
"""Products and copies that one program makes to measure the machine."""

TINY: PipelineConfig = preset("tiny")
SUITES = {
    "gpu": Suite(WAN_1_3B, WAN_VAE, (60, 104), "bfloat16", repeats=20, matmul=8192),
    "cpu": Suite(
        TransformerConfig(dim=512, ffn_dim=2048, num_heads=4, num_layers=8, text_dim=512, text_len=64),
        dataclasses.replace(WAN_VAE, dim=32), (16, 24), "float32", repeats=5,
    ),
    "tiny": Suite(
        TINY.transformer, TINY.vae, (4, 6), "float32", repeats=2, windows=(6, 12), sinks=(0, 3), matmul=256,
        start_up="tiny",
    ),
}  # fmt: skip


def median_seconds(
    call: Callable[[], Any], repeats: int, *, wait: Callable[[Any], Any] | None = None
) -> float:
    """Median time until the results are there, after one untimed call.

    Args:
      call: what is timed.
      repeats: timed calls.
      wait: blocks until a result is there; None: JAX's.
    """
    import jax

    wait = wait or jax.block_until_ready
    wait(call())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def compiled(
    programs: Mapping[str, tuple[Any, tuple[Any, ...]]], *, refusals: type[Exception] = UserError
) -> dict[str, Any]:
    """Compiles `{name: (jitted function, arguments)}` side by side: compilers use one core for the most part.

    Returns:
      Programs by name; in place of one that is refused, the exception.
    """

    def one(program: tuple[Any, tuple[Any, ...]]) -> Any:
        function, arguments = program
        try:
            return function.lower(*arguments).compile()
        except refusals as refusal:
            return refusal

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(one, programs.values()), strict=True))


def memory_of(*programs: Any) -> dict[str, float]:
    """What compiled programs need that run in turn, as the compiler reports it, in MiB.

    Returns:
      `program_mib`: the arguments of all, and of the rest (results that are not written over arguments, and
      temporaries) what the largest has. `temporary_mib`: the most temporaries of one.
    """
    found = [program.memory_analysis() for program in programs]
    arguments = sum(x.argument_size_in_bytes for x in found)
    made = max(x.output_size_in_bytes - x.alias_size_in_bytes + x.temp_size_in_bytes for x in found)
    temporary = max(x.temp_size_in_bytes for x in found)
    return {
        "program_mib": round((arguments + made) / 2**20, 1),
        "temporary_mib": round(temporary / 2**20, 1),
    }


def draw(seed: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Random numbers; zeros would be faster than anything real."""
    import jax

    return jax.random.normal(jax.random.key(seed), shape, dtype)


def measured_rates(suite: Suite) -> floors.Rates:
    """A large matrix product and a large copy on the default device, each many times in one program.

    On a GPU a call from Python costs some 0.2 ms, which beside a single product of 1.4 ms would count as the
    machine's.
    """
    import jax

    n = suite.matmul
    first, weight = (draw(i, (n, n), suite.dtype) for i in range(2))
    weight = weight / n**0.5  # products stay as large as what they are made of
    product = median_seconds(functools.partial(jax.jit(products), first, weight), suite.repeats) / CHAIN
    long, run = draw(0, (32 * n * n,), suite.dtype), jax.jit(copies, donate_argnums=0)
    size = 2 * long.nbytes

    def copied() -> Any:
        nonlocal long
        long = run(long)
        return long

    copy = median_seconds(copied, suite.repeats) / CHAIN
    return floors.Rates(2 * n**3 / product, size / copy)


def products(first: Any, weight: Any) -> Any:
    """`CHAIN` matrix products, each of the one before. In pairs: a loop of single ones would copy each."""
    import jax

    return jax.lax.fori_loop(0, CHAIN // 2, lambda _, x: x @ weight @ weight, first)


def copies(array: Any) -> Any:
    """Reads and writes an array `CHAIN` times, with a sum that depends on the round and cannot be merged."""
    import jax

    return jax.lax.fori_loop(0, CHAIN, lambda i, x: x + i.astype(x.dtype), array)
