"""Plans the conversion of one part: every name and shape is checked before a byte is written."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from longlive_jax.checkpoint import name_some
from longlive_jax.config import PipelineConfig
from longlive_jax.convert import keys_text_encoder, keys_tiny_vae, keys_transformer, keys_vae, shapes
from longlive_jax.convert.detect import Found, lora_rank
from longlive_jax.convert.readers import LazyTensor
from longlive_jax.convert.table import Table
from longlive_jax.errors import require
from longlive_jax.lora import ALL_TARGETS
from longlive_jax.storage import Spec, spec_bytes

_TABLES: Mapping[str, Callable[[PipelineConfig], Table]] = {
    "transformer wan": lambda config: keys_transformer.table(config.transformer),
    "transformer diffusers": lambda config: keys_transformer.diffusers_table(config.transformer),
    "text_encoder wan": lambda config: keys_text_encoder.table(config.text_encoder),
    "text_encoder transformers": lambda config: keys_text_encoder.transformers_table(config.text_encoder),
    "vae wan": lambda config: keys_vae.table(config.vae),
    "vae diffusers": lambda config: keys_vae.diffusers_table(config.vae),
    "vae taehv": lambda config: keys_tiny_vae.table(config.vae),
}


@dataclasses.dataclass(frozen=True)
class Update:
    """A LoRA to be merged while the weights stream by.

    Attributes:
      factors: (our path of a kernel, layer) to the tensors lora_A `[rank, in]` and lora_B `[out, rank]`.
      scale: alpha / rank.
    """

    factors: Mapping[tuple[str, int | None], tuple[LazyTensor, LazyTensor]]
    scale: float

    def __call__(self, kernel: np.ndarray, target: str, layer: int | None) -> np.ndarray:
        """Adds the update to one layer's kernel `[in, out]`; what it does not adapt is passed through."""
        if (target, layer) not in self.factors:
            return kernel
        a, b = (tensor.read().astype(np.float32) for tensor in self.factors[target, layer])
        return kernel.astype(np.float32) + np.float32(self.scale) * (a.T @ b.T)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one part is written.

    Attributes:
      found: where it comes from.
      table: names on both sides.
      specs: our leaves, in the order they are written.
      update: a LoRA to merge.
    """

    found: Found
    table: Table
    specs: Mapping[str, Spec]
    update: Update | None = None

    @property
    def bytes(self) -> int:
        return sum(map(spec_bytes, self.specs.values()))

    def pieces(self) -> Iterator[tuple[str, np.ndarray]]:
        """Reads the tensors one by one, in our layout and precision; stacked leaves layer by layer."""
        for name, rule, layer in self.table.sources():
            array = rule.to_ours(self.found.tensors[name].read())
            if self.update is not None:
                array = self.update(array, rule.target, layer)
            yield rule.target, array.astype(self.specs[rule.target].dtype, copy=False)


def make_plan(
    found: Found, config: PipelineConfig, *, dtype: np.dtype | None, update: Update | None = None
) -> Plan:
    """Checks one part against its key table and the model, and plans its conversion.

    Args:
      found: the part.
      config: the model's config.
      dtype: precision of all tensors; None keeps each as it is.
      update: a LoRA to merge into it.

    Raises:
      UserError: tensors are missing, unknown or of the wrong shape; they are named.
    """
    table = _table(found, config)
    wanted = {name for name, _, _ in table.sources()}
    missing = [name for name, _, _ in table.sources() if name not in found.tensors]
    extra = [tensor.name for name, tensor in found.tensors.items() if name not in wanted]
    require(not missing, f"{found.origin}: {len(missing)} tensors are missing: {name_some(missing)}")
    require(not extra, f"{found.origin}: {len(extra)} tensors are unknown: {name_some(extra)}")
    if found.layout == "peft":
        expected = shapes.expected_lora(config, rank=lora_rank(found), targets=lora_targets(found))
    else:
        expected = shapes.expected(found.part, config)
    return Plan(found, table, _specs(found, table, expected, dtype=dtype), update)


def make_update(lora: Plan, *, scale: float) -> Update:
    """The merge of a LoRA that has been planned, and so checked; `scale` is alpha / rank."""
    tensors = {(rule.target, layer): lora.found.tensors[name] for name, rule, layer in lora.table.sources()}
    factors = {
        (target.removesuffix("/a") + "/kernel", layer): (a, tensors[target.removesuffix("a") + "b", layer])
        for (target, layer), a in tensors.items()
        if target.endswith("/a")
    }
    return Update(factors, scale)


def lora_targets(found: Found) -> tuple[str, ...]:
    """The layers a LoRA adapts, by our paths."""
    table = keys_transformer.lora_table(1, ALL_TARGETS)
    names = {name.rpartition(".blocks.")[2].partition(".")[2] for name in found.tensors}
    return tuple(
        rule.target.rpartition("/")[0]
        for rule in table.rules
        if rule.target.endswith("/a") and rule.source.rpartition("{layer}.")[2] in names
    )


def _table(found: Found, config: PipelineConfig) -> Table:
    if found.layout == "peft":
        return keys_transformer.lora_table(config.transformer.num_layers, lora_targets(found))
    kind = found.part if found.part in ("text_encoder", "vae") else "transformer"
    return _TABLES[f"{kind} {found.layout}"](config)


def _specs(
    found: Found, table: Table, expected: Mapping[str, Spec], *, dtype: np.dtype | None
) -> dict[str, Spec]:
    """Checks every tensor's shape against the model's, and gives our leaves in writing order."""
    if names := sorted({rule.target for rule in table.rules} ^ set(expected)):
        # The names on the source's side matched the table, so this is our fault and not the file's.
        raise ValueError(f"the key table and the model disagree about {name_some(names)}")
    wrong: list[str] = []
    dtypes: dict[str, np.dtype] = {}
    for name, rule, layer in table.sources():
        shape = expected[rule.target].shape[0 if layer is None else 1 :]
        wanted = rule.to_source(_no_memory(shape)).shape
        spec = found.tensors[name].spec
        if spec.shape != wanted:
            wrong.append(f"{found.tensors[name].name} {spec.shape} instead of {wanted}")
        dtypes[rule.target] = dtype or _common(dtypes.get(rule.target, spec.dtype), spec.dtype)
    require(not wrong, f"{found.origin}: tensors of the wrong shape: {name_some(wrong)}")
    return {name: Spec(expected[name].shape, dtypes[name]) for name in dtypes}


def _common(a: np.dtype, b: np.dtype) -> np.dtype:
    """A precision that holds both, for layers that differ (no two 16-bit formats contain each other)."""
    return a if a == b else np.promote_types(np.float32, max(a, b, key=lambda dtype: dtype.itemsize))


def _no_memory(shape: tuple[int, ...]) -> np.ndarray:
    """An array of any shape that occupies one byte, to try layout changes on."""
    return np.broadcast_to(np.zeros((), np.int8), shape)
