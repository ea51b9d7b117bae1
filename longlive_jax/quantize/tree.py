"""Parameter trees with 8-bit kernels.

A quantised linear layer has `kernel_scale` beside its `kernel` and is otherwise as it was:

    blocks/self_attn/q/kernel         int8 or fp8 [L, in, out]
    blocks/self_attn/q/kernel_scale   float32     [L, 1, out]
    blocks/self_attn/q/bias           as before   [L, out]

Layers are stacked, and every layer has its own scales.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import KERNEL_SCALE, flatten, unflatten
from longlive_jax.config import Recipe
from longlive_jax.quantize import numerics
from longlive_jax.quantize.recipes import Rule, rule_of
from longlive_jax.storage import Spec
from longlive_jax.types import Array, Params

KERNEL, SCALE = "kernel", KERNEL_SCALE


def rule_for(recipe: Recipe, leaf: str) -> Rule | None:
    """What becomes of a leaf of a transformer, by its path; None if it stays as it is."""
    layer, _, name = leaf.rpartition("/")
    rule = rule_of(recipe, layer) if name == KERNEL else None
    return rule if rule is not None and rule.weights is not None else None


def scale_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """`[..., in, out]` to the shape of its scales `[..., 1, out]`: one per layer and output channel."""
    return (*kernel[:-2], 1, kernel[-1])


def quantized_specs(specs: Mapping[str, Spec], recipe: Recipe) -> dict[str, Spec]:
    """The leaves of the quantised tree, by path, from those of the tree in full precision."""
    found: dict[str, Spec] = {}
    for leaf, spec in specs.items():
        rule = rule_for(recipe, leaf)
        if rule is None or rule.weights is None:
            found[leaf] = spec
        else:
            found[leaf] = Spec(spec.shape, numerics.dtype_of(rule.weights))
            found[_scale_name(leaf)] = Spec(scale_shape(spec.shape), jnp.float32)
    return found


def quantize_kernel(kernel: Array, rule: Rule) -> tuple[Array, Array]:
    """A kernel `[..., in, out]` in 8 bits, and its scales `[..., 1, out]`.

    Args:
      kernel: one layer's, or those of all layers.
      rule: of a layer that is quantised.
    """
    if rule.weights is None:
        raise ValueError(f"the rule {rule} quantises nothing")
    if rule.rotates:
        kernel = numerics.rotate(kernel.astype(jnp.float32), axis=-2)
    values, scale = numerics.quantize(kernel, rule.weights, axis=-2)
    if scale.shape != scale_shape(kernel.shape):
        raise ValueError(f"scales {scale.shape} of a kernel {kernel.shape}")
    return values, scale


def quantize_tree(params: Params, recipe: Recipe) -> Params:
    """Quantises a whole tree of a transformer in memory; for one that is too large see `quantize.store`."""
    leaves: dict[str, Array] = {}
    for leaf, array in flatten(params).items():
        rule = rule_for(recipe, leaf)
        if rule is None:
            leaves[leaf] = array
        else:
            leaves[leaf], leaves[_scale_name(leaf)] = quantize_kernel(array, rule)
    return unflatten(leaves)


def cast(params: Params, dtype: str) -> Params:
    """Casts what is neither an 8-bit kernel nor a scale to the precision of the computation."""
    kept = {
        leaf: array if leaf.endswith(f"/{SCALE}") or numerics.kind_of(array) else np.asarray(array, dtype)
        for leaf, array in flatten(params).items()
    }
    return unflatten(kept)


def is_quantized(params: Params) -> bool:
    """Whether any layer of the tree is stored in 8 bits."""
    return any(leaf.endswith(f"/{SCALE}") for leaf in flatten(params))


def _scale_name(kernel: str) -> str:
    return f"{kernel.removesuffix(KERNEL)}{SCALE}"


quantize_on_device = functools.partial(jax.jit, static_argnames="recipe", donate_argnums=0)(quantize_tree)
"""Compiled `quantize_tree`; consumes the parameters."""
