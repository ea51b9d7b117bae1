"""The transformer with 8-bit linear layers: the same module, its linear layers intercepted.

Model code knows nothing of this. While a `QuantizedTransformer` is applied, every `flax.linen.Dense` whose
parameters hold a `kernel_scale` multiplies in 8 bits as its rule in the recipe says; the others run as
always.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from longlive_jax.config import Recipe
from longlive_jax.models.transformer import Transformer
from longlive_jax.quantize import numerics, tree
from longlive_jax.quantize.recipes import Rule, rule_of
from longlive_jax.types import Array


class QuantizedTransformer(Transformer):
    """A `Transformer` on parameters as `quantize.tree` describes them.

    Attributes:
      recipe: the recipe the parameters were quantised by.
    """

    recipe: Recipe = "int8"

    @nn.nowrap
    def apply(self, *args: Any, **options: Any) -> Any:
        """`Transformer.apply` with 8-bit linear layers."""
        with nn.intercept_methods(interceptor(self.recipe)):
            return super().apply(*args, **options)

    @nn.nowrap
    def init(self, *args: Any, **options: Any) -> Any:
        """`Transformer.init`, and the parameters quantised: for shapes, and for tests."""
        variables = super().init(*args, **options)
        return {**variables, "params": tree.quantize_tree(variables["params"], self.recipe)}


def quantized(transformer: Transformer, recipe: Recipe) -> Transformer:
    """The module that runs a quantised tree; the very same one for the recipe "none"."""
    if recipe == "none":
        return transformer
    return QuantizedTransformer(**fields_of(Transformer, transformer), recipe=recipe)


def fields_of(module: type[nn.Module], source: nn.Module) -> dict[str, Any]:
    """The arguments of a module that another one has under the same names."""
    names = [field.name for field in dataclasses.fields(module) if field.init]
    return {name: getattr(source, name) for name in names if name not in ("parent", "name")}


Next = Callable[..., Any]


def interceptor(recipe: Recipe, *, prefix: str = "") -> Callable[..., Any]:
    """A method interceptor of Flax that runs the recipe's linear layers in 8 bits.

    Args:
      recipe: the recipe.
      prefix: what the paths of the applied module's layers begin with in the whole model.
    """

    def intercept(next_function: Next, args: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        is_call = isinstance(module, nn.Dense) and context.method_name == "__call__"
        if not (is_call and module.has_variable("params", tree.SCALE)):
            return next_function(*args, **options)
        rule = rule_of(recipe, prefix + "/".join(module.path))
        return dense(args[0], module.variables["params"], rule, dtype=module.dtype)

    return intercept


def dense(x: Array, params: Mapping[str, Array], rule: Rule, *, dtype: Any) -> Array:
    """A quantised `flax.linen.Dense`: `[..., in]` to `[..., out]`, as the layer's rule says."""
    return numerics.linear(
        x,
        params[tree.KERNEL],
        params[tree.SCALE],
        bias=params.get("bias"),
        quantizes_input=rule.quantizes_input,
        rotates=rule.rotates,
        dtype=dtype,
    )
