"""What the training tests share: recorded weights as parameters, scores, noise, comparisons."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import SamplerConfig, TransformerConfig, WindowConfig
from longlive_jax.convert import keys_transformer
from longlive_jax.diffusion import noise as noise_lib
from longlive_jax.inference.rollout import Generator
from longlive_jax.models.transformer import Transformer
from tests.fixtures import load, weights
from tests.models._loading import load_tree

# Compiling is most of the time these tests take; what they compile runs a few times at toy size.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)

TINY32 = TransformerConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=32, text_len=16
)
MODEL = Transformer(TINY32)
TABLE = keys_transformer.table(TINY32)
WINDOW = WindowConfig(window_frames=12, sink_frames=3, block_frames=3)


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


@functools.cache
def params_of(fixture: str, prefix: str) -> Any:
    return load_tree(TABLE, weights(load(fixture), prefix))


def text_context(params: Any, text: np.ndarray) -> Any:
    return MODEL.apply({"params": params}, text, method="text_context")


def score(params: Any, text: np.ndarray) -> Any:
    """A bidirectional score under one prompt."""

    def velocity(noisy: jax.Array, timesteps: jax.Array) -> jax.Array:
        return MODEL.apply({"params": params}, noisy, timesteps, text_context(params, text))[0]

    return velocity


def generator(noise: noise_lib.NoiseFn) -> Generator:
    return Generator(MODEL, WINDOW, SamplerConfig(), noise)


@dataclasses.dataclass(frozen=True, eq=False)
class TableNoise:
    """Recorded draws: initial noise by frame, and by (block, step) what is drawn after it.

    Attributes:
      initial: `[B, F, h, w, C]`.
      fresh: `[blocks, steps, n, h, w, C]`; entry k - 1 precedes pass k, the last one the context pass.
      first: position of the first frame.
    """

    initial: np.ndarray
    fresh: np.ndarray
    first: int = 0

    def __call__(self, seeds, positions, step, shape):
        local = positions - self.first
        start = jnp.take(jnp.asarray(self.initial), local, axis=1)
        block = local[0] // self.fresh.shape[2]
        again = jnp.asarray(self.fresh)[block, jnp.clip(step - 1, 0, self.fresh.shape[1] - 1)][None]
        return jnp.where(step == noise_lib.INITIAL_STEP, start, again)


def table_noise(initial: np.ndarray, drawn: np.ndarray, exits: np.ndarray, *, first: int = 0) -> TableNoise:
    """From the release's layout and call order: per block one draw per step before the exit, one after."""
    steps = len(SamplerConfig().steps)
    drawn = channels_last(drawn)  # [calls, n, h, w, C]
    fresh = np.full((len(exits), steps, *drawn.shape[1:]), np.nan, np.float32)
    calls = iter(drawn)
    for block, exit_step in enumerate(exits):
        for k in range(exit_step):
            fresh[block, k] = next(calls)
        fresh[block, steps - 1] = next(calls)
    assert next(calls, None) is None
    return TableNoise(channels_last(initial), fresh, first)


def assert_gradients(actual: Any, fixture: str, prefix: str, *, bound: float = 1e-3) -> None:
    """Relative L2 error per recorded tensor; tensors that were not recorded must be zero."""
    recorded = weights(load(fixture), prefix)
    for name, rule, layer in TABLE.sources():
        leaf = functools.reduce(lambda node, key: node[key], rule.target.split("/"), actual)
        ours = np.asarray(leaf if layer is None else leaf[layer])
        if name not in recorded:
            assert not ours.any(), f"{name}: the release has no gradient here"
            continue
        theirs = rule.to_ours(recorded.pop(name))
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < bound, f"{name}: relative L2 error {error:.2e}"
    assert not recorded
