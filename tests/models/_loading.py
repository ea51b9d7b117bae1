"""Recorded PyTorch tensors as our parameter tree, through the key table under test."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from longlive_jax.convert.table import Table


def load_tree(table: Table, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Builds the nested dict of leaves that `table` describes from `arrays`, by PyTorch name.

    Rules with `{layer}` become one leaf with a leading layer axis. Every array must be used.

    Raises:
      KeyError: a tensor that the table names is missing.
      ValueError: tensors are left over.
    """
    leaves: dict[str, list[np.ndarray]] = {}
    stacked: dict[str, bool] = {}
    used = set()
    for name, rule, _ in table.sources():
        leaves.setdefault(rule.target, []).append(rule.to_ours(np.asarray(arrays[name])))
        stacked[rule.target] = rule.is_stacked
        used.add(name)
    if left := sorted(set(arrays) - used):
        raise ValueError(f"{len(left)} tensors are not in the table, the first is {left[0]}")
    tree: dict[str, Any] = {}
    for path, tensors in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = np.stack(tensors) if stacked[path] else tensors[0]
    return tree
