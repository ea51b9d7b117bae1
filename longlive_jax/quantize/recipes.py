"""Which linear layers become 8-bit numbers and which stay as they are: an ordered table per recipe.

A layer is named by its path in the parameter tree ("blocks/self_attn/q"). The first rule whose pattern
matches the whole path decides; a layer that no rule names is an error, so that a new layer cannot slip
through. Everything that is not a linear layer (norm gains, modulation, biases) stays.
"""

import dataclasses
import re
from collections.abc import Mapping

from longlive_jax.config import Recipe
from longlive_jax.quantize.numerics import EightBit


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the linear layers of a pattern.

    Attributes:
      pattern: regular expression for a whole path.
      weights: format of the kernel; None leaves it as it is.
      quantizes_input: whether the product is one of 8-bit numbers, or only the storage.
      why: the reason.
      rotates: mix input channels first, see `numerics.rotate`.
    """

    pattern: str
    weights: EightBit | None
    quantizes_input: bool
    why: str
    rotates: bool = False


def _keep(pattern: str, why: str) -> Rule:
    return Rule(pattern, None, False, why)


_KEPT = (
    _keep("patch_embed|head/proj", "first and last layer: their error is seen in every pixel; 0.01% of 1.3B"),
    _keep(
        "time_embed/.*|time_proj", "scales, shifts and gates of whole frames, one token each; 1.2% of 1.3B"
    ),
    _keep("text_embed/.*", "runs once for a prompt; 0.6% of 1.3B"),
)

_BLOCKS = r"blocks/(self_attn|cross_attn)/[qkvo]|blocks/ffn/fc[12]"


def _recipe(weights: EightBit, *, quantizes_input: bool, why: str, rotates: bool = False) -> tuple[Rule, ...]:
    return (*_KEPT, Rule(_BLOCKS, weights, quantizes_input, why, rotates))


RECIPES: Mapping[Recipe, tuple[Rule, ...]] = {
    "none": (_keep(".*", "nothing is quantised"),),
    "int8": _recipe("int8", quantizes_input=True, why="98% of 1.3B, and all large products"),
    "int8-rotated": _recipe("int8", quantizes_input=True, why="98% of 1.3B, outliers spread", rotates=True),
    "int8-weight-only": _recipe("int8", quantizes_input=False, why="98% of 1.3B; products stay as they are"),
    "fp8": _recipe("fp8", quantizes_input=True, why="98% of 1.3B, and all large products"),
    "fp8-weight-only": _recipe("fp8", quantizes_input=False, why="98% of 1.3B; products stay as they are"),
}


def rule_of(recipe: Recipe, layer: str) -> Rule:
    """The rule that decides about a linear layer.

    Args:
      recipe: a name of `RECIPES`.
      layer: its path in the parameter tree.

    Raises:
      ValueError: no rule of the recipe names the layer.
    """
    for rule in RECIPES[recipe]:
        if re.fullmatch(rule.pattern, layer):
            return rule
    raise ValueError(f"recipe {recipe!r} has no rule for the linear layer {layer!r}")
