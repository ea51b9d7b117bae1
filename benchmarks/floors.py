"""The least time a machine could take: operations over its rate of multiplying, bytes over its bandwidth."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from longlive_jax import memory
from longlive_jax.config import TransformerConfig, WindowConfig


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a machine reaches at best, measured in the same run.

    Attributes:
      flops: floating-point operations per second of a large matrix product.
      bandwidth: bytes per second of a large copy, read and written together.
    """

    flops: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Work:
    """What has to be done at least.

    Attributes:
      flops: operations of the matrix products and convolutions.
      size: bytes read once and written once.
    """

    flops: float
    size: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.size + other.size)

    def times(self, count: float) -> "Work":
        return Work(self.flops * count, self.size * count)

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.size / rates.bandwidth)

    def report(self, seconds: float, rates: Rates) -> dict[str, float]:
        """The floor, and how many times as long `seconds` is."""
        floor = self.seconds(rates)
        return {
            "seconds": seconds,
            "floor_seconds": floor,
            "times_floor": round(seconds / floor, 2),
            "tflop_per_second": round(self.flops / seconds / 1e12, 3),
        }


def attention(*, batch: int, heads: int, queries: int, keys: int, head_dim: int, itemsize: int) -> Work:
    """Two products of `queries x keys x head_dim`; queries, keys, values and results each once."""
    products = 4 * batch * heads * queries * keys * head_dim
    return Work(products, 2 * batch * heads * (queries + keys) * head_dim * itemsize)


def transformer_pass(config: TransformerConfig, *, tokens: int, keys: int, itemsize: int) -> Work:
    """One pass over `tokens` tokens, each of which attends to `keys`, of a batch of one; text K/V at hand."""
    dim, hidden, layers = config.dim, config.ffn_dim, config.num_layers
    shape = {"batch": 1, "heads": config.num_heads, "head_dim": config.head_dim, "itemsize": itemsize}
    own = attention(queries=tokens, keys=keys, **shape)
    text = attention(queries=tokens, keys=config.text_len, **shape)
    # Queries, keys, values and output; query and output of the text's; two layers of the MLP.
    weights = 4 * dim * dim + 2 * dim * dim + 2 * dim * hidden
    linear = Work(2 * tokens * weights, weights * itemsize)
    ends = Work(4 * tokens * config.patch_dim * dim, 2 * config.patch_dim * dim * itemsize)
    return (own + text + linear).times(layers) + ends


def block_step(
    config: TransformerConfig, window: WindowConfig, *, frame_len: int, passes: int, itemsize: int
) -> Work:
    """A block once the window is full: the denoising passes and the clean one."""
    tokens = window.block_frames * frame_len
    keys = window.window_frames * frame_len
    return transformer_pass(config, tokens=tokens, keys=keys, itemsize=itemsize).times(passes)


def traced(function: Callable[..., Any], *arguments: Any) -> Work:
    """The products and convolutions of a function, counted in its jaxpr; arguments and results once.

    Loops count as often as they run, and of what differs by platform this platform's form. `arguments` may be
    shapes.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments)
    size = sum(v.aval.size * v.aval.dtype.itemsize for v in (*jaxpr.jaxpr.invars, *jaxpr.jaxpr.outvars))
    name = jax.default_backend()
    return Work(_flops(jaxpr.jaxpr, "cuda" if name == "gpu" else name), size)


def _flops(jaxpr: jex.Jaxpr, platform: str) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * out.size * math.prod(shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            spec = eqn.params["dimension_numbers"].rhs_spec
            total += 2 * out.size * kernel.size / kernel.shape[spec[0]]
        else:
            count = eqn.params.get("length", 1) if name == "scan" else 1
            total += count * sum(_flops(inner, platform) for inner in memory.inner_jaxprs(eqn, platform))
    return total
