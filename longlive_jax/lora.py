"""Low-rank adaptation of the transformer's linear layers: W + scale * A B, scale = alpha / rank.

A LoRA is a tree that mirrors the adapted part of the parameters, with `{"a", "b"}` in place of a
linear layer's `{"kernel", "bias"}`:

    blocks/self_attn/q/a  [L, in, rank]        blocks/self_attn/q/b  [L, rank, out]

Layers are stacked like the transformer's. Everything here is a pure function of such trees.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.checkpoint import Checkpoint
from longlive_jax.errors import UserError, require
from longlive_jax.types import Array, Params, PRNGKey

ALL_TARGETS: tuple[str, ...] = (
    *(f"blocks/{attention}/{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "blocks/ffn/fc1",
    "blocks/ffn/fc2",
)
"""Every linear layer of every block: what the released LoRA adapts."""


def init(key: PRNGKey, params: Params, *, rank: int, targets: Sequence[str] = ALL_TARGETS) -> Params:
    """A LoRA that changes nothing yet: `a` random, `b` zero.

    `a` is uniform in +-1/sqrt(in), which is the Kaiming initialisation (negative slope sqrt(5)) of
    the release's PEFT library.

    Args:
      key: random key.
      params: the transformer's parameters, or their `jax.ShapeDtypeStruct`s.
      rank: width of the bottleneck, 1 or more.
      targets: paths of the adapted linear layers.

    Returns:
      The LoRA, float32.

    Raises:
      UserError: the rank is not positive, or a target is not a linear layer of `params`.
    """
    require(rank >= 1, f"lora.rank={rank} must be 1 or more")
    require(len(targets) > 0, "lora.targets is empty; name at least one linear layer")
    tree: Params = {}
    for target, target_key in zip(targets, jax.random.split(key, len(targets)), strict=True):
        layers, inputs, outputs = _kernel(params, target).shape
        bound = 1 / math.sqrt(inputs)
        _set(
            tree,
            target,
            {
                "a": jax.random.uniform(target_key, (layers, inputs, rank), minval=-bound, maxval=bound),
                "b": jnp.zeros((layers, rank, outputs)),
            },
        )
    return tree


def merge(params: Params, lora: Params, *, scale: float | Array) -> Params:
    """Adds the LoRA to the kernels it adapts: float32 sums, cast back to the kernel's precision.

    Args:
      params: the transformer's parameters.
      lora: see the module's docstring.
      scale: alpha / rank.

    Returns:
      New parameters; the leaves that are not adapted are the same arrays.
    """
    merged = params
    for target, update in _targets(lora).items():
        kernel = _kernel(params, target)
        delta = jnp.einsum(
            "lir,lro->lio",
            update["a"].astype(jnp.float32),
            update["b"].astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        new = (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
        merged = _replaced(merged, (*target.split("/"), "kernel"), new)
    return merged


def merge_stored(opened: Checkpoint, params: Params, *, name: str = "lora") -> Params:
    """`params` with the LoRA merged in that a checkpoint keeps apart; unchanged where it keeps none.

    Args:
      opened: the checkpoint.
      params: one of its parts, in float32.
      name: of the LoRA's part, "lora" or "critic_lora".
    """
    if name not in opened.parts:
        return params
    return merge(params, opened.load(name, dtype=np.float32), scale=opened.parts[name].lora_scale)


def rank_of(lora: Params) -> int:
    """The rank of a LoRA; all its targets share it."""
    ranks = {update["a"].shape[-1] for update in _targets(lora).values()}
    require(len(ranks) == 1, f"lora: the layers have ranks {sorted(ranks)}; one rank is supported")
    return ranks.pop()


def parameter_count(lora: Params) -> int:
    """Number of parameters of a LoRA (or of any tree of arrays or shapes)."""
    return sum(leaf.size for leaf in jax.tree.leaves(lora))


def _targets(lora: Params, prefix: str = "") -> dict[str, Params]:
    """The `{"a", "b"}` pairs by the path of the layer they adapt."""
    if set(lora) == {"a", "b"} and not isinstance(lora["a"], Mapping):
        return {prefix.rstrip("/"): lora}
    found: dict[str, Params] = {}
    for name, child in lora.items():
        found.update(_targets(child, f"{prefix}{name}/"))
    return found


def _kernel(params: Params, target: str) -> Array:
    node = params
    for name in (*target.split("/"), "kernel"):
        if not isinstance(node, Mapping) or name not in node:
            raise UserError(f"lora.targets: {target!r} is not a linear layer of the model")
        node = node[name]
    require(node.ndim == 3, f"lora.targets: {target!r} is not a layer-stacked linear layer")
    return node


def _set(tree: dict, target: str, value: Params) -> None:
    *path, last = target.split("/")
    for name in path:
        tree = tree.setdefault(name, {})
    tree[last] = value


def _replaced(tree: Params, path: Sequence[str], value: Array) -> Params:
    if not path:
        return value
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], value)}
