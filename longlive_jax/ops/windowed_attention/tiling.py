"""How the Pallas kernels cut their work: checked configurations, measured ones, and a rule for the rest."""

import dataclasses
import math
from collections.abc import Mapping

COPY_REGISTERS = 40
"""Registers a thread of the copying warpgroup keeps; the others share what it gives up."""

SHARED_BYTES = 227 * 1024
"""Shared memory of one block on a Hopper GPU."""

_SMALL_BYTES = 2048 + 256
"""Of it, for the compiler's scratch space and the barriers."""

_GROUP_ROWS = 64
"""Rows of one tensor core instruction of a warpgroup."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a tiling is chosen for.

    Attributes:
      batch: B.
      heads: N.
      query_len: T.
      key_len: keys attended to when the cache is full.
      head_dim: H.
    """

    batch: int
    heads: int
    query_len: int
    key_len: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The forward kernel's.

    Attributes:
      block_q: queries of one warpgroup.
      block_kv: keys of one step.
      stages: steps that are copied ahead.
      splits: blocks that share the keys of one tile of queries.
      compute_registers: registers per thread of a multiplying warpgroup.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    splits: int = 1
    compute_registers: int = 232

    def __post_init__(self) -> None:
        _check_multiples(self, "block_q", "block_kv")
        _check_registers(self.compute_registers)
        if self.stages < 2 or self.splits < 1:
            raise ValueError(f"{self}: stages must be at least 2 and splits at least 1")

    def fits(self, head_dim: int) -> bool:
        """Whether queries, keys and values of 2 bytes each have room in a block's shared memory."""
        held = 2 * head_dim * (2 * self.block_q + 2 * self.stages * self.block_kv)
        return held + _SMALL_BYTES <= SHARED_BYTES


@dataclasses.dataclass(frozen=True)
class BackwardTiling:
    """The backward kernels'.

    Attributes:
      block_q: queries that a warpgroup holds for the gradient of the queries.
      block_kv: keys that are streamed by it.
      block_held: keys that a warpgroup holds for the gradients of keys and values.
      block_stream: queries that are streamed by it.
      stages: steps that are copied ahead.
      compute_registers: registers per thread of a multiplying warpgroup.
    """

    block_q: int = 64
    block_kv: int = 64
    block_held: int = 64
    block_stream: int = 64
    stages: int = 2
    compute_registers: int = 232

    def __post_init__(self) -> None:
        _check_multiples(self, "block_q", "block_kv", "block_held", "block_stream")
        _check_registers(self.compute_registers)
        if self.stages < 2:
            raise ValueError(f"{self}: stages must be at least 2")


TUNED: Mapping[tuple[str, Problem], Tiling] = {}
"""Measured tilings by device kind and problem. `python -m benchmarks.run --suite gpu` prints entries; a
device or problem that is not here gets `heuristic`."""

JOIN_KEYS = 280
"""Writing and reading one share's float32 output takes as long as attending to so many keys: 8 bytes a value
at 4.3 TB/s against 4 operations a key at 600 TFLOP/s."""


def choose(problem: Problem, *, device_kind: str, multiprocessors: int) -> Tiling:
    """The measured tiling of a problem on a device, else the rule's."""
    return TUNED.get((device_kind, problem)) or heuristic(problem, multiprocessors=multiprocessors)


def heuristic(problem: Problem, *, multiprocessors: int) -> Tiling:
    """The largest tiles that fit, and as many splits as fill the multiprocessors.

    With `n` blocks on `m` multiprocessors the last wave is `n mod m` wide, so the work takes
    `ceil(n / m) * m / n` of what it would if it could be spread evenly.
    """
    block_kv = 128 if problem.key_len > 64 else 64
    tiling = Tiling(block_kv=block_kv)
    if dataclasses.replace(tiling, stages=3).fits(problem.head_dim):
        tiling = dataclasses.replace(tiling, stages=3)
    tiles = problem.batch * problem.heads * math.ceil(problem.query_len / (2 * tiling.block_q))
    steps = math.ceil(problem.key_len / block_kv)

    def cost(splits: int) -> float:
        blocks = tiles * splits
        waves = math.ceil(blocks / multiprocessors) * multiprocessors / blocks
        return waves + (JOIN_KEYS * splits / problem.key_len if splits > 1 else 0)

    most = max(1, min(8, steps // 2))
    return dataclasses.replace(tiling, splits=min(range(1, most + 1), key=cost))


def candidates(problem: Problem, *, multiprocessors: int) -> tuple[Tiling, ...]:
    """Tilings worth measuring, the rule's first."""
    first = heuristic(problem, multiprocessors=multiprocessors)
    others = [
        Tiling(block_kv=block_kv, stages=stages, splits=splits)
        for block_kv in (64, 128)
        for stages in (2, 3, 4)
        for splits in (1, 2, 3, 4)
    ]
    fitting = [t for t in others if t.fits(problem.head_dim)]
    return (first, *(t for t in fitting if t != first))


def _check_multiples(tiling: Tiling | BackwardTiling, *names: str) -> None:
    for name in names:
        value = getattr(tiling, name)
        if value < _GROUP_ROWS or value % _GROUP_ROWS:
            raise ValueError(f"{type(tiling).__name__}.{name}={value} must be a multiple of {_GROUP_ROWS}")


def _check_registers(count: int) -> None:
    # Two multiplying warpgroups and a copying one, 128 threads each, share 65536 registers.
    if count % 8 or not 24 <= count <= (65536 // 128 - COPY_REGISTERS) // 2 // 8 * 8:
        raise ValueError(f"compute_registers={count} must be a multiple of 8 that leaves room for the others")
