"""Every kernel lowers for CUDA at the shapes of wan_1_3b, with no GPU at hand, and copies nothing."""

import re

import jax
import jax.numpy as jnp
import pytest

from longlive_jax.config import WAN_1_3B, SamplerConfig, WindowConfig
from longlive_jax.errors import UserError
from longlive_jax.inference import rollout
from longlive_jax.models.transformer import Transformer, init_params
from longlive_jax.ops.windowed_attention import api, pallas_mosaic_gpu
from longlive_jax.quantize import numerics

S = jax.ShapeDtypeStruct
QUERY = S((1, 4680, 12, 128), jnp.bfloat16)
TEXT = S((1, 512, 12, 128), jnp.bfloat16)
CACHE = S((30, 1, 14040, 12, 128), jnp.bfloat16)
ONE_LAYER = S((1, 14040, 12, 128), jnp.bfloat16)
LENGTH, LAYER = S((1,), jnp.int32), S((), jnp.int32)


def lowered(function, *arguments) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def made(program: str, size: int) -> set[str]:
    """Operations whose result has at least `size` elements."""
    found = set()
    for line in program.splitlines():
        match = re.search(r"= \"?(stablehlo\.\w+).*-> tensor<([\dx]+)x\w+>$", line)
        if match and eval(match[2].replace("x", "*")) >= size:
            found.add(match[1])
    return found


def attend(query, key, value, cached_key, cached_value, length, layer):
    return pallas_mosaic_gpu.attend_lse(
        query, key, value, cached_key=cached_key, cached_value=cached_value, cached_len=length, layer=layer
    )


def test_the_forward_kernel_takes_the_whole_cache_as_it_is():
    program = lowered(attend, QUERY, QUERY, QUERY, CACHE, CACHE, LENGTH, LAYER)
    assert program.count("@mosaic_gpu") == 1
    assert made(program, CACHE.size) <= {"stablehlo.reshape"}  # layer and batch become one axis: no copy
    assert "stablehlo.concatenate" not in program
    assert "stablehlo.dynamic_slice" not in program


def test_cross_attention():
    program = lowered(lambda q, k, v: pallas_mosaic_gpu.attend_lse(q, k, v), QUERY, TEXT, TEXT)
    assert program.count("@mosaic_gpu") == 1


def test_ragged_sizes():
    """Lengths that are no multiples of the copy engine's 8 rows; such a cache is refused."""
    query, key = S((2, 101, 2, 64), jnp.bfloat16), S((2, 71, 2, 64), jnp.bfloat16)
    cache, length = S((2, 200, 2, 64), jnp.bfloat16), S((2,), jnp.int32)
    program = lowered(attend, query, key, key, cache, cache, length, None)
    assert program.count("@mosaic_gpu") == 1
    cache = S((2, 203, 2, 64), jnp.bfloat16)
    with pytest.raises(UserError, match="a cache of 8 n tokens, not of 203"):
        lowered(attend, query, key, key, cache, cache, length, None)


def test_the_backward_kernels():
    def loss(query, key, value, cached_key, cached_value, length):
        out, lse = attend(query, key, value, cached_key, cached_value, length, None)
        return jnp.sum(out.astype(jnp.float32)) + jnp.sum(lse)

    program = lowered(jax.grad(loss, argnums=range(5)), QUERY, QUERY, QUERY, ONE_LAYER, ONE_LAYER, LENGTH)
    # Forward, and for own and cached keys one for the queries and one for keys and values.
    assert program.count("@mosaic_gpu") == 5


@pytest.fixture
def as_if_on_hopper(monkeypatch):
    monkeypatch.setattr(
        pallas_mosaic_gpu, "obstacle", lambda query, *, platform: pallas_mosaic_gpu.unfit(query)
    )


def test_the_block_step_hands_the_whole_cache_to_the_kernel(as_if_on_hopper):
    model = Transformer(WAN_1_3B, dtype=jnp.bfloat16, attention="pallas_mosaic_gpu")
    generator = rollout.Generator(model, WindowConfig(), SamplerConfig())
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    text, seeds = S((1, 512, 4096), jnp.bfloat16), S((1,), jnp.uint32)
    state = jax.eval_shape(
        lambda p, t, s: generator.init(p, t, s, latent_size=(60, 104)), params, text, seeds
    )
    program = lowered(generator.step, params, state)
    assert "@mosaic_gpu" in program
    # What is written into the cache goes into the buffer itself, which is donated (tests/test_audit.py).
    kept = {"reshape", "dynamic_update_slice", "while", "constant"}
    assert made(program, state.cache.key.size) <= {f"stablehlo.{name}" for name in kept}


def test_auto_takes_the_kernel_over_a_cache_where_it_can_read_it(as_if_on_hopper):
    query = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)

    def chosen(tokens, dtype=jnp.bfloat16):
        cached = jnp.zeros((1, tokens, 1, 64), dtype)
        context = api.CachedContext(cached, cached, jnp.ones(1, jnp.int32))
        return api.choose(query.astype(dtype), "auto", context)

    assert chosen(16) == "pallas_mosaic_gpu"
    # No cuDNN here, so what the kernel does not take goes to the reference.
    assert chosen(12) == chosen(16, jnp.float32) == "reference"
    assert api.choose(query, "auto") == "reference"
    assert api.choose(query, "pallas_mosaic_gpu") == "pallas_mosaic_gpu"


@pytest.mark.parametrize(("frame_len", "expected"), [(8, "pallas_mosaic_gpu"), (900, "reference")])
def test_auto_over_a_cache_in_8_bits(as_if_on_hopper, frame_len, expected):
    """Made dense it has 9 frames of tokens, of which the kernel takes multiples of 8 (480x480 has 8100)."""
    query = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)
    cached = numerics.quantize_tokens(
        jnp.zeros((1, 9, frame_len, 1, 64), jnp.bfloat16), "int8", centred=False
    )
    context = api.CachedContext(cached, cached, jnp.ones(1, jnp.int32))
    assert api.choose(query, "auto", context) == expected
    lowered(lambda q: api.windowed_attention(q, q, q, context=context), query)  # and it runs


def test_auto_says_on_a_gpu_why_it_takes_the_reference(monkeypatch, caplog):
    query = jnp.zeros((1, 64, 1, 64), jnp.float32)
    assert api.choose(query, "auto") == "reference"
    assert not caplog.records  # a CPU has nothing else
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    api._warn_once.cache_clear()
    for _ in range(2):
        assert api.choose(query, "auto") == "reference"
    assert [r.getMessage() for r in caplog.records] == [
        "attention='auto' takes the slow reference (cudnn: dtype is float32, not bfloat16 or float16)"
    ]
