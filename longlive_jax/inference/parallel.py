"""The rollout over several devices: a batch first, then the heads, then the tokens of one video.

`SpreadGenerator` takes the place of a `Generator`; its states are global arrays whose cache is split, and
each of its functions is the plain one inside of `jax.shard_map`. Nothing of the cache ever moves: a device
writes and reads its own part. Videos of a batch need no exchange at all, so the batch is split first. What
devices of one video exchange is counted by `traffic`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.config import PipelineConfig
from longlive_jax.errors import require
from longlive_jax.inference import rollout
from longlive_jax.inference.rollout import FLUSH_FRAMES, Generator, RolloutState
from longlive_jax.ops.windowed_attention.spread import HEADS, TOKENS, Spread
from longlive_jax.sharding import Rules, shardings
from longlive_jax.types import Array, Params

BATCH = "batch"
AXES = (BATCH, TOKENS, HEADS)

RULES: Rules = (
    # [L, B, S, P, N, H], and in 8 bits its scales and centres
    (r"(^|/)cache/(key|value|sink_key)(/|$)", P(None, BATCH, None, TOKENS, HEADS)),
    (r"(^|/)text/", P(None, BATCH)),
    (r"(^|/)frame$", P()),
    (r"", P(BATCH)),
)
"""Partition of a rollout's state and of its latents."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What devices do: `batch` groups of them, each with videos of its own, share these as `spread` says."""

    batch: int
    spread: Spread

    @property
    def devices(self) -> int:
        return self.batch * self.spread.devices

    def mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        shape = (self.batch, self.spread.tokens, self.spread.heads)
        return Mesh(np.array(devices).reshape(shape), AXES)

    def __str__(self) -> str:
        parts = (("batch", self.batch), ("tokens", self.spread.tokens), ("heads", self.spread.heads))
        return " x ".join(f"{count} ({name})" for name, count in parts if count > 1) or "1"


def choose_layout(
    devices: int, *, batch: int, heads: int, frame_len: int, splits_heads: bool = True
) -> Layout:
    """How a number of devices share the work.

    The batch takes as many as divide it, the heads as many of the rest as divide these, the tokens what is
    left: 8 devices and 12 heads are 4 by heads and 2 by tokens.

    Args:
      devices: how many.
      batch: B.
      heads: N.
      frame_len: P, tokens of one latent frame.
      splits_heads: False leaves heads together.

    Raises:
      UserError: a frame's tokens cannot be split so often.
    """
    rows = math.gcd(devices, batch)
    rest = devices // rows
    require(
        frame_len % rest == 0,
        f"devices={devices}: the {frame_len} tokens of a frame cannot be split {rest} ways; choose another "
        "number of devices, height or width",
    )
    by_heads = math.gcd(rest, heads) if splits_heads else 1
    return Layout(rows, Spread(rest // by_heads, by_heads))


def layout_of(config: PipelineConfig, *, devices: int, batch: int, latent_size: tuple[int, int]) -> Layout:
    """`choose_layout` for a pipeline.

    Raises:
      UserError: they do not fit, or the cache or the attention cannot be split as they would have to.
    """
    model = config.transformer
    layout = choose_layout(
        devices,
        batch=batch,
        heads=model.num_heads,
        frame_len=model.frame_len(*latent_size),
        splits_heads=config.window.rope != "jittered",
    )
    if layout.spread.tokens > 1:
        check_split_tokens(layout, config.cache_dtype, config.attention)
    return layout


def check_split_tokens(layout: Layout, cache_dtype: str, attention: str) -> None:
    """Refuses what needs all tokens of a frame on one device."""
    share = f"devices={layout.devices} splits the tokens of a frame {layout.spread.tokens} ways"
    require(
        cache_dtype == "same",
        f"cache_dtype={cache_dtype!r}: {share}, and keys in 8 bits are centred over all of them; "
        "use cache_dtype=same, or devices that divide batch times heads",
    )
    require(
        attention != "cudnn",
        f"attention='cudnn': {share}, and cuDNN gives no exact log-sum-exp to join them by; use 'auto'",
    )


def available(devices: int, *, decodes_apart: bool = False) -> tuple[jax.Device, ...]:
    """The first `devices` of this process, and with `decodes_apart` the one after them.

    Raises:
      UserError: there are fewer.
    """
    found = jax.local_devices()
    most = len(found) - decodes_apart
    wanted = f"devices={devices}" + (" and one to decode apart" if decodes_apart else "")
    remedy = f"choose from 1 to {most}" if most else "decode on the same one"
    require(1 <= devices <= most, f"{wanted}: this process has {len(found)}; {remedy}")
    return tuple(found[: devices + decodes_apart])


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts arrays whole on each device."""
    # With an axis for every prime factor: JAX describes results in the mesh of the arguments, and so this one
    # has to be able to describe every layout.
    factors = _prime_factors(len(devices))
    mesh = Mesh(np.array(devices).reshape(factors), [f"factor_{i}" for i in range(len(factors))])
    return jax.device_put(tree, NamedSharding(mesh, P()))


def _prime_factors(number: int) -> tuple[int, ...]:
    """In rising order; (1,) for 1."""
    for divisor in range(2, number):
        if number % divisor == 0:
            return (divisor, *_prime_factors(number // divisor))
    return (number,)


@dataclasses.dataclass(frozen=True)
class SpreadGenerator(Generator):
    """A `Generator` whose states live on several devices; the same functions, the same results.

    Give it parameters that are on all of them (`replicate`), or every call copies them.

    Attributes:
      devices: which, in order.
    """

    devices: tuple[jax.Device, ...] = ()

    def init(
        self,
        params: Params,
        text: Array,
        seeds: Array,
        *,
        latent_size: tuple[int, int],
        total_frames: int | None = None,
    ) -> RolloutState:
        """As `Generator.init`; each device makes its part of the empty cache."""
        state = super().init(params, text, seeds, latent_size=latent_size, total_frames=total_frames)
        mesh = self.layout(state).mesh(self.devices)
        return jax.tree.map(jax.lax.with_sharding_constraint, state, shardings(state, mesh, RULES))

    def step(self, params: Params, state: RolloutState) -> tuple[RolloutState, Array]:
        """As `Generator.step`."""
        return self._spread(Generator.step, params, state)

    def keep(self, params: Params, state: RolloutState, text: Array, mask: Array) -> RolloutState:
        """As `Generator.keep`."""
        return self._spread(Generator.keep, params, state, text, mask)

    def clear(self, params: Params, state: RolloutState, text: Array, mask: Array) -> RolloutState:
        """As `Generator.clear`."""
        return self._spread(Generator.clear, params, state, text, mask)

    def flush(
        self, params: Params, state: RolloutState, text: Array, mask: Array, *, frames: int = FLUSH_FRAMES
    ) -> RolloutState:
        """As `Generator.flush`."""
        return self._spread(functools.partial(Generator.flush, frames=frames), params, state, text, mask)

    def cut(
        self,
        params: Params,
        state: RolloutState,
        text: Array,
        mask: Array,
        *,
        frames: int = FLUSH_FRAMES,
        gap: int = rollout.CUT_GAP,
    ) -> RolloutState:
        """As `Generator.cut`."""
        run = functools.partial(Generator.cut, frames=frames, gap=gap)
        return self._spread(run, params, state, text, mask)

    def recache(
        self,
        params: Params,
        state: RolloutState,
        text: Array,
        mask: Array,
        *,
        frames: int,
        keep_sink: bool,
    ) -> RolloutState:
        """As `Generator.recache`."""
        run = functools.partial(Generator.recache, frames=frames, keep_sink=keep_sink)
        return self._spread(run, params, state, text, mask)

    def resize(self, state: RolloutState) -> RolloutState:
        """As `Generator.resize`."""
        return self._spread(lambda generator, _, old: generator.resize(old), {}, state)

    def layout(self, state: RolloutState) -> Layout:
        """How a state of these (global) shapes is split."""
        _, batch, _, frame_len, heads, _ = state.cache.key.shape
        layout = choose_layout(
            len(self.devices),
            batch=batch,
            heads=heads,
            frame_len=frame_len,
            # A cut turns keys in the cache, where a part of the heads does not know which ones it has.
            splits_heads=not self.transformer.rope_jitter,
        )
        if layout.spread.tokens > 1:
            check_split_tokens(layout, self.cache_dtype, self.transformer.attention)
        return layout

    def _spread(self, run: Callable[..., Any], params: Params, state: RolloutState, *rows: Array) -> Any:
        """Calls `run(generator, params, state, *rows)` on every device with its part of all but `params`."""
        layout = self.layout(state)
        mesh = layout.mesh(self.devices)
        whole = Generator(*(getattr(self, field.name) for field in dataclasses.fields(Generator)))
        is_shared = layout.spread.devices > 1
        transformer = self.transformer.clone(spread=layout.spread) if is_shared else self.transformer
        local = dataclasses.replace(whole, transformer=transformer)

        def specs(tree: Any) -> Any:
            return jax.tree.map(lambda sharding: sharding.spec, shardings(tree, mesh, RULES))

        results = jax.eval_shape(functools.partial(run, whole), params, state, *rows)
        return jax.shard_map(
            functools.partial(run, local),
            mesh=mesh,
            in_specs=(P(), specs(state), *(P(BATCH) for _ in rows)),
            out_specs=specs(results),
            check_vma=False,  # the collectives end with equal values that the check cannot see to be equal
        )(params, state, *rows)


# --- what is exchanged -----------------------------------------------------------------------------


def traffic(config: PipelineConfig, layout: Layout, *, batch: int, latent_size: tuple[int, int]) -> int:
    """Bytes that one device receives from others while a block is made, from shapes alone.

    Per layer and pass: queries, keys, values and results between tokens and heads; where tokens are split as
    well, queries, partial results and their log-sum-exp. Per denoising pass the velocity.

    Args:
      config: model, window, steps and precision.
      layout: result of `layout_of`.
      batch: B.
      latent_size: (h, w) of the latents.
    """
    model, spread = config.transformer, layout.spread
    frame_len = model.frame_len(*latent_size)
    tokens = batch // layout.batch * config.window.block_frames * frame_len // spread.devices
    # A device has `tokens` tokens of all heads, or as much in other shapes: the unit of what is exchanged.
    activations = tokens * model.dim * np.dtype(_numpy_name(config.dtype)).itemsize
    by_heads = 4 * activations * (spread.heads - 1) // spread.heads
    by_tokens = (spread.tokens - 1) * (2 * activations + 4 * tokens * model.num_heads)
    velocity = (spread.devices - 1) * tokens * model.patch_dim * 4
    steps = len(config.sampler.steps)
    return (steps + 1) * model.num_layers * (by_heads + by_tokens) + steps * velocity


def ring_traffic(config: PipelineConfig, devices: int, *, latent_size: tuple[int, int]) -> int:
    """The same if all keys and values of a full window went around a ring of devices, for comparison."""
    model, window = config.transformer, config.window
    keys = window.window_frames * model.frame_len(*latent_size) * model.dim
    size = 2 * keys * np.dtype(_numpy_name(config.dtype)).itemsize * (devices - 1) // devices
    return (len(config.sampler.steps) + 1) * model.num_layers * size


def describe(config: PipelineConfig, layout: Layout, *, batch: int, latent_size: tuple[int, int]) -> str:
    """One line for people: how devices share, and what one of them receives per block."""
    size = traffic(config, layout, batch=batch, latent_size=latent_size)
    return f"{layout.devices} devices: {layout}; each receives {size / 1e6:.1f} MB per block from the others"


def _numpy_name(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype  # NumPy alone has no bfloat16
