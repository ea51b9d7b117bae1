"""What quantisation does to a pass of the transformer, layer by layer: `longlive verify --layers`.

The model in full precision and the quantised one run side by side, block by block. Every quantised linear
layer is given the input that it has in full precision, so that its error is its own; the activations of
the two models are compared after every block, which shows how errors add up.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.config import Recipe, TransformerConfig
from longlive_jax.errors import require
from longlive_jax.models.rope import RopeTable
from longlive_jax.models.transformer import Block, TextContext, Transformer
from longlive_jax.quantize import tree
from longlive_jax.quantize.module import Next, dense, fields_of, interceptor
from longlive_jax.quantize.recipes import rule_of
from longlive_jax.types import Array, ArrayLike, Params

_PATCHES = 8  # rows and columns of patches in a random input: enough tokens, and quick at any width
_FRAMES = 3
_TEXT_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What both models are given.

    Attributes:
      latents: `[B, F, h, w, C]`.
      timesteps: `[B, 1]` or `[B, F]` in [0, 1000].
      text: `[B, M, text_dim]`.
    """

    latents: ArrayLike
    timesteps: ArrayLike
    text: ArrayLike


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """Errors of one block; all are relative, |quantised - full| / |full| over all elements.

    Attributes:
      layer: index of the block.
      linears: of every quantised linear layer, given the input it has in full precision.
      after: of the activations after the block, in two models that have run apart from the start.
    """

    layer: int
    linears: Mapping[str, float]
    after: float


@dataclasses.dataclass(frozen=True)
class LayerTable:
    """The error of every block and of the result; `str(table)` is a Markdown table in percent.

    Attributes:
      rows: one per block.
      velocity: relative error of what the transformer returns.
    """

    rows: Sequence[LayerRow]
    velocity: float

    def __str__(self) -> str:
        names = list(self.rows[0].linears)
        lines = [["block", *names, "after the block"]]
        for row in self.rows:
            lines.append([str(row.layer), *(_percent(row.linears[n]) for n in names), _percent(row.after)])
        means = [_percent(float(np.mean([row.linears[name] for row in self.rows]))) for name in names]
        lines.append(["mean", *means, ""])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        text = [
            "| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) + " |"
            for line in lines
        ]
        text.insert(1, "|" + "|".join(f"{'-' * (width + 1)}:" for width in widths) + "|")
        return "\n".join([*text, "", f"velocity: {_percent(self.velocity)} (all in percent)"])


def random_inputs(config: TransformerConfig, *, seed: int = 0) -> Inputs:
    """Noise for latents and text, in the middle of the denoising."""
    random = np.random.default_rng(seed)
    _, rows, columns = config.patch
    size = (rows * _PATCHES, columns * _PATCHES)
    latents = random.standard_normal((1, _FRAMES, *size, config.latent_channels))
    text = np.zeros((1, config.text_len, config.text_dim), np.float32)
    used = min(_TEXT_TOKENS, config.text_len)
    text[:, :used] = random.standard_normal((1, used, config.text_dim))
    return Inputs(latents.astype(np.float32), np.full((1, 1), 500, np.float32), text)


def layer_table(
    transformer: Transformer, params: Params, quantized: Params, *, recipe: Recipe, inputs: Inputs
) -> LayerTable:
    """Runs one pass of both models and compares them block by block.

    Args:
      transformer: the module in full precision.
      params: its parameters.
      quantized: the same, quantised by `recipe`.
      recipe: the recipe.
      inputs: what to run on.
    """
    require(tree.is_quantized(quantized), "nothing is quantised here; name a recipe with quantization=...")
    both = _SideBySide(transformer, params, quantized, recipe)
    fields = fields_of(Transformer, transformer)
    module = _Unrolled(**fields, layers=both)
    arguments = (jnp.asarray(inputs.latents), jnp.asarray(inputs.timesteps))
    text = module.apply({"params": params}, jnp.asarray(inputs.text), method="text_context")
    full, _ = module.apply({"params": params}, *arguments, text)
    result = _Unrolled(**fields, layers=lambda *_: (both.activations, None))
    rounded, _ = result.apply({"params": params}, *arguments, text)
    return LayerTable(both.rows, float(_relative(rounded, full)))


class _Unrolled(Transformer):
    """A transformer with something else in place of its scanned blocks."""

    layers: Any = None

    def setup(self) -> None:
        super().setup()
        self.blocks = self.layers


class _SideBySide:
    """Takes the place of the scanned blocks: a loop over layers that runs both models.

    Args: those of `layer_table`.
    """

    def __init__(self, transformer: Transformer, params: Params, quantized: Params, recipe: Recipe) -> None:
        self._block = Block(**fields_of(Block, transformer))
        self._layers = [
            (_layer(params["blocks"], i), _layer(quantized["blocks"], i))
            for i in range(transformer.config.num_layers)
        ]
        self._recipe: Recipe = recipe
        self._text: list[tuple[TextContext, TextContext]] = []
        self._text_errors: list[Mapping[str, Array]] = []
        self.activations: Array | None = None
        self.rows: list[LayerRow] = []

    def text_context(self, carry: None, text: Array) -> tuple[None, TextContext]:
        """Both models' cross-attention keys and values; returns those in full precision."""
        for full, rounded in self._layers:
            run = functools.partial(_measured, self._block, self._recipe, "text_context", full, rounded)
            (_, own), errors = run(carry, text)
            _, other = _quantized(self._block, self._recipe, "text_context", rounded, carry, text)
            self._text.append((own, other))
            self._text_errors.append(errors)
        return carry, jax.tree.map(lambda *x: jnp.stack(x), *(own for own, _ in self._text))

    def __call__(
        self, x: Array, time: Array, rotation: RopeTable, text: TextContext, *without_cache: None
    ) -> tuple[Array, None]:
        """Both models' blocks; returns the activations in full precision."""
        y = x
        for index, (full, rounded) in enumerate(self._layers):
            own_text, other_text = self._text[index]
            run = functools.partial(_measured, self._block, self._recipe, "__call__", full, rounded)
            (x, _), errors = run(x, time, rotation, own_text, None)
            y, _ = _quantized(
                self._block, self._recipe, "__call__", rounded, y, time, rotation, other_text, None
            )
            errors = {**errors, **self._text_errors[index]}
            linears = {name: float(errors[name]) for name in sorted(errors)}
            self.rows.append(LayerRow(index, linears, float(_relative(y, x))))
        self.activations = y
        return x, None


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measured(
    block: Block, recipe: Recipe, method: str, full: Params, rounded: Params, *args: Any
) -> tuple[Any, dict[str, Array]]:
    """One block in full precision, and the error of every linear layer on its input there."""
    errors: dict[str, Array] = {}

    def compare(next_function: Next, inputs: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        module, result = context.module, next_function(*inputs, **options)
        if not (isinstance(module, nn.Dense) and context.method_name == "__call__"):
            return result
        params = functools.reduce(lambda node, key: node[key], module.path, rounded)
        if tree.SCALE in params:
            rule = rule_of(recipe, "/".join(("blocks", *module.path)))
            found = dense(inputs[0], params, rule, dtype=module.dtype)
            errors["/".join(module.path)] = _relative(found, result)
        return result

    with nn.intercept_methods(compare):
        result = block.apply({"params": full}, *args, method=method)
    return result, errors


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _quantized(block: Block, recipe: Recipe, method: str, rounded: Params, *args: Any) -> Any:
    """One quantised block."""
    with nn.intercept_methods(interceptor(recipe, prefix="blocks/")):
        return block.apply({"params": rounded}, *args, method=method)


def _layer(blocks: Params, index: int) -> Params:
    return jax.tree.map(lambda x: x[index], blocks)


def _relative(found: Array, expected: Array) -> Array:
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm((found - expected).ravel()) / jnp.linalg.norm(expected.ravel())


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"
