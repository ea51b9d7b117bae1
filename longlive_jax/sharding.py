"""Where arrays live on many devices: a mesh of two axes and a short table of rules.

`data` splits the batch; `fsdp` splits the batch *and* the parameters, the optimiser state and their
moving averages, which are gathered layer by layer when they are used. A rule is a regular expression,
searched in a leaf's "/"-joined path, and the partition of that leaf. The first rule that matches
decides; what no rule names is replicated, and so is an axis whose size the mesh does not divide.

Optimiser states repeat the paths of the parameters they belong to, so the same rules shard them.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from longlive_jax.errors import require

AXES = ("data", "fsdp")
BATCH = AXES
"""A batch is split over every device."""

Rules: TypeAlias = Sequence[tuple[str, P]]

RULES: Rules = (
    # The sequences that long tuning carries have an axis of micro-batches in front.
    (r"^extra/(.*/)?cache/(key|value|sink_key)$", P(None, None, BATCH)),
    (r"^extra/", P(None, BATCH)),
    # A rollout: keys and values [L, B, S, P, N, H], everything else of it begins with the batch.
    (r"cache/(key|value|sink_key)$", P(None, BATCH)),
    (r"(^|/)text/(key|value)$", P(None, BATCH)),
    (r"(^|/)(text|history|seeds|latents)$", P(BATCH)),
    # Layer-stacked kernels [L, in, out] are split along the side that is not summed over most often.
    (r"blocks/((self|cross)_attn/o|ffn/fc2|attn/o)/kernel$", P(None, None, "fsdp")),
    (r"blocks/.*kernel$", P(None, "fsdp", None)),
    (r"blocks/.*/a$", P(None, "fsdp", None)),
    (r"blocks/.*/b$", P(None, None, "fsdp")),
    (r"token_embedding$", P("fsdp", None)),
    # Linear layers outside of the blocks [in, out]; convolutions have more axes and stay whole.
    (r"(patch_embed|embed/fc[12]|time_proj|proj)/kernel$", P("fsdp", None)),
)
"""Partition of every large leaf of the models, of their training state and of a carried rollout."""

T = TypeVar("T")


def make_mesh(*, data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a run.

    Args:
      data: size of the data axis; -1 takes the devices that `fsdp` leaves.
      fsdp: size of the fsdp axis; -1 takes the devices that `data` leaves.
      devices: default all devices of all processes.

    Raises:
      UserError: the sizes do not use exactly the devices there are.
    """
    found = list(jax.devices() if devices is None else devices)
    require(
        data != -1 or fsdp != -1,
        f"mesh.data={data} and mesh.fsdp={fsdp}: only one of them can be -1 (the rest)",
    )
    sizes = {"data": data, "fsdp": fsdp}
    for name, other in (("data", fsdp), ("fsdp", data)):
        if sizes[name] == -1 and other > 0:
            sizes[name] = len(found) // other
    require(
        min(sizes.values()) > 0 and sizes["data"] * sizes["fsdp"] == len(found),
        f"mesh.data={data} and mesh.fsdp={fsdp} do not use the {len(found)} devices exactly; "
        "their product must be that number (-1 is what the other leaves)",
    )
    return Mesh(np.array(found).reshape(sizes["data"], sizes["fsdp"]), AXES)


def partition(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = RULES) -> P:
    """The partition of one leaf.

    Args:
      path: "/"-joined path in its tree.
      shape: its shape.
      mesh: gives the axis sizes; an axis of the shape that they do not divide stays whole.
      rules: ordered (pattern, partition) pairs.
    """
    for pattern, spec in rules:
        if re.search(pattern, path):
            return _fitting(spec, shape, mesh)
    return P()


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES, *, prefix: str = "") -> Any:
    """`NamedSharding`s of a tree of arrays or `jax.ShapeDtypeStruct`s; `prefix` is where the tree belongs."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        name = "/".join(filter(None, (prefix, jax.tree_util.keystr(path, simple=True, separator="/"))))
        return NamedSharding(mesh, partition(name, leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(of, tree)


def init_sharded(init: Callable[..., T], *arguments: Any, mesh: Mesh, rules: Rules = RULES) -> T:
    """Runs `init` so that its result is made where it belongs, and never whole on one device.

    Args:
      init: function of `arguments` to a tree of arrays.
      *arguments: arrays.
      mesh: where.
      rules: how.
    """
    shapes = jax.eval_shape(init, *arguments)
    return jax.jit(init, out_shardings=shardings(shapes, mesh, rules))(*arguments)


def place(tree: T, mesh: Mesh, rules: Rules = RULES) -> T:
    """Puts host arrays (the same in every process) on the mesh."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, functools.partial(_piece, host))

    return jax.tree.map(put, tree, shardings(tree, mesh, rules))


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins every process's rows into global arrays that are split along their first axis.

    Args:
      batch: this process's rows, arrays `[b, ...]`; strings are left out.
      mesh: where.
    """
    sharding = batch_sharding(mesh)
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in arrays.items()
        if value.dtype.kind not in "USO"
    }


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis over every device."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def constrain(tree: T, mesh: Mesh, rules: Rules = RULES, *, prefix: str = "") -> T:
    """Inside of a jitted function: keeps a tree where the rules put it."""
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings(tree, mesh, rules, prefix=prefix))


def _piece(host: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    return host[index]


def _fitting(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` cut to the rank, without the axes that do not divide."""
    axes = []
    for size, axis in zip(shape, tuple(spec), strict=False):
        names = axis if isinstance(axis, tuple) else (axis,)
        ways = int(np.prod([mesh.shape[name] for name in names if name is not None]))
        axes.append(axis if size % ways == 0 else None)
    return P(*axes)
