"""How much accelerator memory a generation needs, part by part, worked out from shapes alone.

Weights and states are exact: they are the arrays that `jax.eval_shape` says the modules make. Working
memory is an estimate: the largest sum of intermediate arrays alive at one point of the traced
program, with elementwise operations written over an operand that is no longer needed. Compilers fuse
more than that and need scratch space of their own; `measure=compiled_bytes` asks the one at hand.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from longlive_jax.config import DType, PipelineConfig
from longlive_jax.errors import UserError
from longlive_jax.inference import parts, rollout
from longlive_jax.models import text_encoder, transformer, vae_families

Measure: TypeAlias = Callable[..., int]
"""`(function, *arguments, donated=...)` to bytes of working memory."""

Phase = Literal["text", "video"]
"""The text encoder runs first and is freed; then the video is made. All other weights stay."""

DTYPES: tuple[DType, ...] = get_args(DType)
CARDS_GB = (16, 24, 80)
GB = 1 << 30
"""A card sold as 24 GB has 24 * 2^30 bytes."""

USABLE = 0.92
"""Share of a card that is left beside the driver, compiled programs and fragmentation."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the budget.

    Attributes:
      name: what it is.
      phases: when it is needed.
      is_work: working memory, of which only the largest of a phase counts (the parts take turns).
      size: bytes per dtype.
    """

    name: str
    phases: tuple[Phase, ...]
    is_work: bool
    size: Mapping[DType, int]


@dataclasses.dataclass(frozen=True)
class Budget:
    """Memory of one way to generate; `str(budget)` is a table.

    Attributes:
      title: what it is for.
      rows: the parts.
    """

    title: str
    rows: tuple[Row, ...]

    def peak(self, phase: Phase, dtype: DType) -> int:
        """Bytes a phase needs at once: all that stays, and the largest working memory."""
        rows = [row for row in self.rows if phase in row.phases]
        stays = sum(row.size[dtype] for row in rows if not row.is_work)
        return stays + max((row.size[dtype] for row in rows if row.is_work), default=0)

    def verdict(self, card_gb: int, dtype: DType) -> str:
        """Whether a card of `card_gb` GB can run it, in a few words."""
        room = card_gb * GB * USABLE
        if self.peak("video", dtype) > room:
            return "too small"
        return "fits" if self.peak("text", dtype) <= room else "fits with the text encoder on the CPU"

    def __str__(self) -> str:
        lines = [["GiB", *DTYPES]]
        for row in self.rows:
            lines.append([row.name, *(_gigabytes(row.size[dtype]) for dtype in DTYPES)])
        for phase, name in (("text", "**at once, while the text is encoded**"), ("video", "**afterwards**")):
            lines.append([name, *(_gigabytes(self.peak(phase, dtype)) for dtype in DTYPES)])  # type: ignore[arg-type]
        for card in CARDS_GB:
            lines.append([f"on a {card} GB card", *(self.verdict(card, dtype) for dtype in DTYPES)])
        return f"{self.title}\n\n{_markdown(lines)}"


def budget(
    config: PipelineConfig,
    *,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    measure: Measure | None = None,
) -> Budget:
    """The memory budget of `config`.

    Args:
      config: the pipeline; its dtype is ignored, every dtype gets a column.
      batch: videos made side by side.
      height: rows in pixels; default `config.video.height`.
      width: columns in pixels; default `config.video.width`.
      frames: latent frames; matters only where the window keeps everything.
      measure: how working memory is found: `working_bytes` (the default, takes seconds and no
        accelerator) or `compiled_bytes` (a minute, exact for this machine's device).

    Raises:
      UserError: the size does not fit the model, or `frames` is needed.
    """
    height, width = height or config.video.height, width or config.video.width
    latent_size = config.latent_size(height, width)
    by_dtype = {}
    for dtype in DTYPES:
        one = dataclasses.replace(config, dtype=dtype)
        if measure is None:  # the traced program must not depend on the machine
            one = dataclasses.replace(one, attention="reference")
        by_dtype[dtype] = (
            _text_encoder_rows(one, measure or working_bytes)
            | _transformer_rows(
                one, measure or working_bytes, batch=batch, latent_size=latent_size, frames=frames
            )
            | _vae_rows(one, measure or working_bytes, batch=batch, latent_size=latent_size)
        )
    rows = tuple(
        Row(
            name=name,
            phases=_phases(name),
            is_work=name.endswith("at work"),
            size={dtype: by_dtype[dtype][name] for dtype in DTYPES},
        )
        for name in by_dtype[DTYPES[0]]
    )
    window = config.window
    attended = f"window {window.window_frames}" if window.is_bounded else f"all {frames} frames"
    videos = "1 video" if batch == 1 else f"{batch} videos"
    basis = "estimated" if measure is None else f"as compiled for {jax.default_backend()}"
    title = f"{config.name}: {videos} of {width}x{height}, {attended}, blocks of {window.block_frames}"
    title += f"; working memory {basis}"
    return Budget(title, rows)


def _phases(name: str) -> tuple[Phase, ...]:
    if name.startswith("text encoder"):
        return ("text",)
    return ("text", "video") if name.endswith("weights") else ("video",)


def cache_bytes(
    config: PipelineConfig, dtype: DType, *, batch: int, frame_len: int, frames: int | None = None
) -> int:
    """Bytes of the keys and values: 2 L B S P D itemsize (and a second copy of a travelling sink's keys).

    In 8 bits D is D + 2 N: a bfloat16 scale per token and head; and the keys of a frame have a centre.

    Args:
      config: gives the transformer and the window.
      dtype: of keys and values.
      batch: B.
      frame_len: P, tokens of one latent frame.
      frames: length of the video, where the window keeps everything.
    """
    shape, window = config.transformer, config.window
    slots = window.cache_frames(frames)
    rows = shape.num_layers * batch
    frame, centre = rows * frame_len * shape.dim * jnp.dtype(dtype).itemsize, 0
    if config.cache_dtype != "same":
        frame, centre = rows * frame_len * (shape.dim + 2 * shape.num_heads), rows * 2 * shape.dim
    moving = min(window.sink_frames, slots) if window.rope == "relative" and window.is_bounded else 0
    return (2 * slots + moving) * frame + (slots + moving) * centre


def _text_encoder_rows(config: PipelineConfig, measure: Measure) -> dict[str, int]:
    module = parts.text_encoder_of(config)
    params = _shapes(text_encoder.init_params, module)
    ids = jax.ShapeDtypeStruct((1, config.text_encoder.text_len), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    work = measure(lambda p, i, n: text_encoder.embed(module, p, ids=i, lengths=n), params, ids, lengths)
    return {"text encoder weights": tree_bytes(params), "text encoder at work": work}


def _transformer_rows(
    config: PipelineConfig, measure: Measure, *, batch: int, latent_size: tuple[int, int], frames: int | None
) -> dict[str, int]:
    shape, module = config.transformer, parts.transformer_of(config)
    generator = rollout.Generator(module, config.window, config.sampler, cache_dtype=config.cache_dtype)
    params = _shapes(transformer.init_params, module)
    text = jax.ShapeDtypeStruct((batch, shape.text_len, shape.text_dim), jnp.dtype(config.dtype))
    seeds = jax.ShapeDtypeStruct((batch,), jnp.uint32)
    init = functools.partial(rollout.init, generator, latent_size=latent_size, total_frames=frames)
    state = jax.eval_shape(init, params, text, seeds)
    step = functools.partial(rollout.step, generator)
    return {
        "transformer weights": tree_bytes(params),
        "key/value cache": tree_bytes(state.cache),
        "prompt keys/values": tree_bytes(state.text),
        "latest latents": tree_bytes(state.history),
        "transformer at work": measure(step, params, state, donated=state),
    }


def _vae_rows(
    config: PipelineConfig, measure: Measure, *, batch: int, latent_size: tuple[int, int]
) -> dict[str, int]:
    module = parts.decoder_of(config)
    params = _shapes(vae_families.init_params, module)
    shape = (batch, config.window.block_frames, *latent_size, config.vae.z_dim)
    latents = jax.ShapeDtypeStruct(shape, jnp.float32)

    def decode(p: Any, s: Any, x: Any) -> Any:
        return module.apply({"params": p}, s, x, method="decode_step")

    height, width = latent_size
    start = jax.eval_shape(lambda: module.init_decode_state(batch, height=height, width=width))
    _, state = jax.eval_shape(decode, params, start, latents)  # the steady state, after the first block
    return {
        "video autoencoder weights": tree_bytes(params),
        "video decoder state": tree_bytes(state),
        "video decoder at work": measure(decode, params, state, latents, donated=state),
    }


@functools.lru_cache(maxsize=8)
def _shapes(init: Any, module: Any) -> Any:
    """The parameter tree of a flax module in its compute precision, as shapes (tracing takes seconds)."""
    module = dataclasses.replace(module, param_dtype=module.dtype)
    return jax.eval_shape(functools.partial(init, module), jax.random.key(0))


# --- bytes ------------------------------------------------------------------------------------------


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) in a tree."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def working_bytes(function: Any, *arguments: Any, donated: Any = None, platform: str = "cuda") -> int:
    """Estimated bytes of intermediates and results of `function`, beside its arguments.

    Args:
      function: traceable by JAX; it is not run.
      *arguments: arrays or `jax.ShapeDtypeStruct`s.
      donated: arguments that are given up; results of the same shape and dtype are written over them.
      platform: whose branch of a `jax.lax.platform_dependent` counts.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    free = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(donated))
    in_place = set()
    for variable in _variables(jaxpr.outvars):
        key = (variable.aval.shape, variable.aval.dtype)
        if free[key] > 0:
            free[key] -= 1
            in_place.add(variable)
    return _peak(jaxpr, platform, in_place)


def compiled_bytes(function: Any, *arguments: Any, donated: Any = None) -> int:
    """Like `working_bytes`, as the compiler of the default device reports it; compiles, runs nothing."""
    given_up = [i for i, argument in enumerate(arguments) if argument is donated]
    analysis = jax.jit(function, donate_argnums=given_up).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        raise UserError(f"the {jax.default_backend()} compiler does not report memory; leave --compile out")
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


# Results of these exist only inside whatever reads them.
_FUSED = frozenset(
    (
        *("broadcast_in_dim", "convert_element_type", "reshape", "squeeze", "expand_dims", "transpose"),
        *("iota", "rev", "stop_gradient", "copy", "bitcast_convert_type"),
    )
)


def _peak(jaxpr: Any, platform: str, in_place: Set[Any] = frozenset()) -> int:
    """Most bytes of a jaxpr's own variables alive at one point.

    Its inputs belong to the caller, and the results named `in_place` are written over them.
    """
    owner = _owners(jaxpr)
    in_place = {owner.get(variable, variable) for variable in in_place}
    last_use = {}
    for i, equation in enumerate(jaxpr.eqns):
        for variable in _variables(equation.invars):
            last_use[owner.get(variable, variable)] = i
    for variable in _variables(jaxpr.outvars):
        last_use[owner.get(variable, variable)] = len(jaxpr.eqns)

    alive: dict[Any, int] = {}
    total = peak = 0
    for i, equation in enumerate(jaxpr.eqns):
        dying = [v for v in alive if last_use.get(v, -1) <= i]
        if _is_elementwise(equation):
            total -= sum(alive.pop(v) for v in dying)
            dying = []
        for variable in equation.outvars:
            if variable not in owner and variable not in in_place:
                alive[variable] = _aval_bytes(variable.aval)
                total += alive[variable]
        inner = max(
            (
                _peak(sub, platform, _shared_results(equation, sub))
                for sub in inner_jaxprs(equation, platform)
            ),
            default=0,
        )
        peak = max(peak, total + inner)
        total -= sum(alive.pop(v) for v in dying)
    return peak


def _owners(jaxpr: Any) -> dict[Any, Any]:
    """Maps the result of each fused equation to the variable whose memory it keeps alive."""
    owner: dict[Any, Any] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in _FUSED:
            source = next(iter(_variables(equation.invars)), None)
            for variable in equation.outvars:
                owner[variable] = owner.get(source, source)
    return owner


def _is_elementwise(equation: Any) -> bool:
    """Whether the result may be written over an operand: same shape, and no inner program."""
    if any(True for _ in inner_jaxprs(equation, platform=None)) or equation.primitive.name in _REORDERING:
        return False
    shapes = {v.aval.shape for v in _variables(equation.invars) if v.aval.shape}
    return shapes <= {v.aval.shape for v in equation.outvars}


_REORDERING = frozenset(["dot_general", "conv_general_dilated", "gather", "scatter", "sort", "cumsum"])


def inner_jaxprs(equation: Any, platform: str | None) -> Iterator[Any]:
    """The programs inside an equation of a jaxpr.

    Args:
      equation: may be a loop, a branch, a call: anything.
      platform: of programs that differ by platform (`jax.lax.platform_dependent`) the one of this platform
        alone, e.g. "cuda"; None gives all.
    """
    by_platform = equation.params.get("branches_platforms")
    if by_platform is not None and platform is not None:
        branches = zip(equation.params["branches"], by_platform, strict=True)
        yield next(branch.jaxpr for branch, names in branches if names is None or platform in names)
        return
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, jex.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, jex.Jaxpr):
                yield item


def _shared_results(equation: Any, body: Any) -> Set[Any]:
    """Results of a plain inner call: its caller has counted their memory already.

    A loop is different: while a turn runs, what it carries exists twice.
    """
    is_loop = equation.primitive.name in ("scan", "while")
    return frozenset() if is_loop else frozenset(_variables(body.outvars))


def _variables(atoms: Any) -> Iterator[Any]:
    return (atom for atom in atoms if not isinstance(atom, jex.Literal))


def _aval_bytes(aval: Any) -> int:
    dtype = aval.dtype
    itemsize = dtype.itemsize if hasattr(dtype, "itemsize") else 8  # random keys
    return math.prod(aval.shape) * itemsize


# --- text -------------------------------------------------------------------------------------------


def _gigabytes(size: int) -> str:
    value = size / GB
    return f"{value:.2f}" if value >= 0.005 else f"{value:.1g}"


def _markdown(lines: list[list[str]]) -> str:
    """A table that reads well as plain text and as Markdown; all columns but the first are numbers."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]

    def row(cells: list[str]) -> str:
        aligned = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(aligned)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([row(lines[0]), row(rule), *map(row, lines[1:])])
