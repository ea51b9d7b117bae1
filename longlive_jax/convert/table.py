"""Key tables: how one PyTorch tensor name and layout maps to one leaf of our parameter tree.

A table is an ordered tuple of `Rule`s. Rules whose names contain `{layer}` describe one tensor per
layer on the PyTorch side and one leaf with a leading layer axis on ours (our layers are scanned).
The mapping is a bijection: every transform has an inverse, and `Table` refuses duplicates.
"""

import dataclasses
import enum
from collections.abc import Iterator

import numpy as np

from longlive_jax.errors import UserError


class Transform(enum.Enum):
    """Layout change between a PyTorch tensor and our leaf (for one layer)."""

    SAME = "same"
    LINEAR = "linear"  # [out, in] <-> [in, out]
    CONV1D = "conv1d"  # [out, in, k] <-> [k, in, out]
    CONV2D = "conv2d"  # [out, in, y, x] <-> [y, x, in, out]
    CONV3D = "conv3d"  # [out, in, t, y, x] <-> [t, y, x, in, out]
    POINTWISE = "pointwise"  # [out, in, 1, 1(, 1)] <-> [in, out]; the axes of size 1 come from Rule.ones
    PATCH = "patch"  # [out, in, 1, y, x] <-> [y * x * in, out]; (y, x) comes from Rule.patch
    VECTOR = "vector"  # [d, 1, 1(, 1)] or [1, ..., d] <-> [d]; the axes of size 1 come from Rule.ones
    DROP_FIRST = "drop_first"  # [1, ...] <-> [...]

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a key table.

    Attributes:
      source: PyTorch name, possibly with `{layer}`.
      target: our path with "/" between levels; stacked over layers when `source` has `{layer}`.
      transform: the layout change.
      ones: for POINTWISE and VECTOR, how many axes of size 1 the PyTorch tensor carries at the end.
      patch: for PATCH, (rows, columns).
    """

    source: str
    target: str
    transform: Transform = Transform.SAME
    ones: int = 0
    patch: tuple[int, int] = (1, 1)

    @property
    def is_stacked(self) -> bool:
        return "{layer}" in self.source

    def source_name(self, layer: int | None) -> str:
        return self.source.replace("{layer}", str(layer)) if self.is_stacked else self.source

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """Lays one PyTorch tensor out as ours (one layer, no layer axis). Returns a view where it can."""
        match self.transform:
            case Transform.SAME:
                return tensor
            case Transform.LINEAR:
                return _ranked(tensor, 2, self).T
            case Transform.CONV1D:
                return _ranked(tensor, 3, self).transpose(2, 1, 0)
            case Transform.CONV2D:
                return _ranked(tensor, 4, self).transpose(2, 3, 1, 0)
            case Transform.CONV3D:
                return _ranked(tensor, 5, self).transpose(2, 3, 4, 1, 0)
            case Transform.POINTWISE:
                return _ranked(tensor, 2 + self.ones, self).reshape(tensor.shape[:2]).T
            case Transform.PATCH:
                _ranked(tensor, 5, self)
                return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, tensor.shape[0])
            case Transform.VECTOR:
                return _ranked(tensor, 1 + self.ones, self).reshape(tensor.shape[0])
            case Transform.DROP_FIRST:
                if tensor.ndim < 1 or tensor.shape[0] != 1:
                    raise UserError(f"{self.source}: shape {tensor.shape} must start with 1")
                return tensor[0]

    def to_source(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        match self.transform:
            case Transform.SAME:
                return leaf
            case Transform.LINEAR:
                return leaf.T
            case Transform.CONV1D:
                return leaf.transpose(2, 1, 0)
            case Transform.CONV2D:
                return leaf.transpose(3, 2, 0, 1)
            case Transform.CONV3D:
                return leaf.transpose(4, 3, 0, 1, 2)
            case Transform.POINTWISE:
                return leaf.T.reshape(leaf.shape[::-1] + (1,) * self.ones)
            case Transform.PATCH:
                rows, columns = self.patch
                return leaf.reshape(1, rows, columns, -1, leaf.shape[-1]).transpose(4, 3, 0, 1, 2)
            case Transform.VECTOR:
                return leaf.reshape(leaf.shape + (1,) * self.ones)
            case Transform.DROP_FIRST:
                return leaf[None]


@dataclasses.dataclass(frozen=True)
class Table:
    """An ordered, duplicate-free set of rules for a model with `num_layers` scanned layers."""

    rules: tuple[Rule, ...]
    num_layers: int = 0

    def __post_init__(self) -> None:
        for side in ("source", "target"):
            names = [getattr(rule, side) for rule in self.rules]
            if len(set(names)) != len(names):
                doubled = sorted({n for n in names if names.count(n) > 1})
                raise ValueError(f"key table names {doubled[0]} twice")

    def sources(self) -> Iterator[tuple[str, Rule, int | None]]:
        """Yields (PyTorch name, rule, layer or None) for every tensor of the PyTorch side."""
        for rule in self.rules:
            if rule.is_stacked:
                for layer in range(self.num_layers):
                    yield rule.source_name(layer), rule, layer
            else:
                yield rule.source, rule, None


def _ranked(tensor: np.ndarray, rank: int, rule: Rule) -> np.ndarray:
    if tensor.ndim != rank:
        raise UserError(f"{rule.source}: shape {tensor.shape} must have {rank} axes")
    return tensor
