"""Quantised checkpoints: `longlive quantize`, tensor by tensor.

The new directory is complete by itself: the transformer in small form, stored once, and copies of the text
encoder, the VAE and the tokenizer. What only training needs (critic, LoRAs) stays behind; a LoRA of the
transformer is merged first. Memory stays at one layer of one tensor (or one tensor that is copied).
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint, lora, storage
from longlive_jax.checkpoint import Checkpoint
from longlive_jax.config import PipelineConfig, Recipe
from longlive_jax.convert.reports import LeftOut, Progress
from longlive_jax.errors import require
from longlive_jax.quantize import numerics, tree
from longlive_jax.quantize.recipes import RECIPES
from longlive_jax.storage import PathLike, Spec, TensorFile, spec_bytes

_TRANSFORMERS = ("transformer", "transformer_ema")
_COPIED = ("text_encoder", "vae")


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """Result of a quantisation; `str(report)` is what the command line prints.

    Attributes:
      path: the checkpoint directory.
      config: the config stored in it.
      stored_in: precision of the source's transformer file.
      disk: bytes of the transformer's file, before and after.
      memory: bytes of its arrays once it is loaded in the precision of `config`, before and after.
      layers: linear layers that are 8-bit numbers now (a stack counts once per layer).
      kept: linear layers that are not; they are in the precision of `config`.
      left_out: parts of the source that were not taken over.
      notes: things worth knowing, one line each.
      seconds: wall time.
    """

    path: pathlib.Path
    config: PipelineConfig
    stored_in: str
    disk: tuple[int, int]
    memory: tuple[int, int]
    layers: int
    kept: int
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        dtype = self.config.dtype
        lines = [
            f"wrote {self.path} ({self.config.quantization}, {self.seconds:.1f} s)",
            f"  transformer on disk: {_change(self.disk, self.stored_in)}",
            f"  transformer in memory: {_change(self.memory, dtype)}",
            f"  {self.layers} linear layers in 8 bits, {self.kept} in {dtype}",
            *(f"  {item}" for item in self.left_out),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def quantize_checkpoint(
    source: PathLike,
    destination: PathLike,
    *,
    recipe: Recipe,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Writes a quantised copy of a checkpoint directory.

    Args:
      source: a checkpoint directory, or the name of a bundled one.
      destination: the directory to make.
      recipe: a name of `recipes.RECIPES`, not "none".
      overwrite: replace an existing checkpoint at `destination`, in the end and in one step.
      progress: called while weights are written.

    Raises:
      UserError: the source has no transformer or is quantised already, or the destination cannot be made;
        nothing is left there then.
    """
    start = time.monotonic()
    known = ", ".join(name for name in RECIPES if name != "none")
    require(recipe in RECIPES and recipe != "none", f"recipe={recipe!r} is unknown; choose one of {known}")
    opened = checkpoint.open_checkpoint(source)
    config = opened.config
    parts = [part for part in _TRANSFORMERS if part in opened.parts]
    require(bool(parts), f"{opened.path} has no transformer to quantise; name a checkpoint that has one")
    require(
        config.quantization == "none",
        f"{opened.path} is quantised already ({config.quantization}); name the checkpoint it was made from",
    )
    target = pathlib.Path(os.path.abspath(destination))
    storage.check_destination(target, overwrite=overwrite, replaceable=checkpoint.is_checkpoint)
    part = parts[0]  # the one that is generated with
    plan = _Plan.make(opened, part, recipe)
    copied = [name for name in _COPIED if name in opened.parts]
    total = plan.memory[1] + sum(map(spec_bytes, _specs(opened, copied)))
    storage.check_space(target.parent, total)
    report = progress or (lambda part, done, total: None)
    record = {**opened.source, "quantized": {"recipe": recipe, "from": opened.parts[part].digest}}
    quantized = dataclasses.replace(config, quantization=recipe)
    with checkpoint.create(target, quantized, source=record, overwrite=overwrite) as writer:
        counted = _Counter(report, total)
        writer.add("transformer", plan.target, counted.over("transformer", plan.pieces()))
        for name in copied:
            file = opened.part_file(name)
            writer.add(name, file.specs, counted.over(name, _copies(file)))
        if opened.has_tokenizer:
            writer.add_tokenizer(opened.tokenizer_path)
    return QuantizeReport(
        target,
        quantized,
        stored_in=opened.parts[part].dtype,
        disk=(_file_bytes(opened, part), _file_bytes(checkpoint.open_checkpoint(target), "transformer")),
        memory=plan.memory,
        layers=plan.count(quantized=True),
        kept=plan.count(quantized=False),
        left_out=tuple(_left_out(opened, [part, *copied])),
        notes=tuple(plan.notes),
        seconds=time.monotonic() - start,
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What happens to every tensor of one transformer.

    Attributes:
      file: its tensors.
      target: the leaves to write, in order.
      recipe: the recipe.
      dtype: precision of what stays.
      adapters: LoRA factors by the kernel they are added to, or nothing.
      scale: of the LoRA.
    """

    file: TensorFile
    target: Mapping[str, Spec]
    recipe: Recipe
    dtype: np.dtype
    adapters: Mapping[str, tuple[np.ndarray, np.ndarray]]
    scale: float

    @classmethod
    def make(cls, opened: Checkpoint, part: str, recipe: Recipe) -> "_Plan":
        file, dtype = opened.part_file(part), np.dtype(jnp.dtype(opened.config.dtype))
        plain = {name: Spec(spec.shape, dtype) for name, spec in file.specs.items()}
        adapters, scale = {}, 0.0
        if "lora" in opened.parts:
            scale, factors = opened.parts["lora"].lora_scale, checkpoint.flatten(opened.load("lora"))
            layers = {name.rpartition("/")[0] for name in factors}
            unknown = sorted(layer for layer in layers if f"{layer}/{tree.KERNEL}" not in file.specs)
            require(
                not unknown,
                f"{opened.path}: the LoRA adapts {', '.join(unknown)}, which the {part} does not have",
            )
            adapters = {
                f"{layer}/{tree.KERNEL}": (factors[f"{layer}/a"], factors[f"{layer}/b"]) for layer in layers
            }
        return cls(file, tree.quantized_specs(plain, recipe), recipe, dtype, adapters, scale)

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of the loaded arrays, before and after; those after are written as they are."""
        before = sum(spec.size for spec in self.file.specs.values()) * self.dtype.itemsize
        return before, sum(map(spec_bytes, self.target.values()))

    @property
    def notes(self) -> list[str]:
        return [f"a LoRA was merged into {len(self.adapters)} kernels first"] if self.adapters else []

    def count(self, *, quantized: bool) -> int:
        """Linear layers that become 8-bit numbers, or that do not."""
        layers = 0
        for name, spec in self.file.specs.items():
            is_quantized = numerics.kind_of(self.target[name]) is not None
            if name.endswith(f"/{tree.KERNEL}") and is_quantized == quantized:
                layers += spec.shape[0] if spec.ndim == 3 else 1
        return layers

    def pieces(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every leaf of `target` in its order, kernels layer by layer."""
        for name, spec in self.file.specs.items():
            rule = tree.rule_for(self.recipe, name)
            if rule is None and name not in self.adapters:
                yield name, self.file.read(name).astype(self.dtype, copy=False)
                continue
            scales = []
            for index in range(spec.shape[0]) if spec.ndim == 3 else (None,):
                kernel = self._merged(name, index)
                if rule is None:
                    yield name, kernel.astype(self.dtype)
                    continue
                values, scale = (np.asarray(x) for x in _quantize(kernel, rule))
                scales.append(scale)
                yield name, values
            for scale in scales:
                yield f"{name.removesuffix(tree.KERNEL)}{tree.SCALE}", scale

    def _merged(self, name: str, index: int | None) -> np.ndarray:
        """One layer of a kernel, with its LoRA, rounded as generation without `quantize` rounds it."""
        kernel = self.file.read(name, index).astype(self.dtype, copy=False)
        if name not in self.adapters:
            return kernel
        a, b = self.adapters[name]
        one = {"layer": {"kernel": kernel[None]}}
        update = {"layer": {"a": np.asarray(a[index])[None], "b": np.asarray(b[index])[None]}}
        return np.asarray(lora.merge(one, update, scale=self.scale)["layer"]["kernel"])[0]


_quantize = functools.partial(jax.jit, static_argnames="rule")(tree.quantize_kernel)


@dataclasses.dataclass
class _Counter:
    """Tells `report` how far the writing is."""

    report: Progress
    total: int
    done: int = 0

    def over(self, part: str, pieces: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
        for name, array in pieces:
            yield name, array
            self.done += array.nbytes
            self.report(part, self.done, self.total)


def _copies(file: TensorFile) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, file.read(name)) for name in file.specs)


def _file_bytes(opened: Checkpoint, part: str) -> int:
    return opened.part_file(part).path.stat().st_size


def _change(sizes: tuple[int, int], dtype: str) -> str:
    """Bytes before, in `dtype`, and after, in words."""
    before, after = sizes
    unit, name = (2**30, "GiB") if before >= 2**30 else (2**20, "MiB")
    sizes_text = f"{before / unit:.2f} {name} ({dtype}) -> {after / unit:.2f} {name}"
    return f"{sizes_text}, {before / after:.2f}x smaller"


def _specs(opened: Checkpoint, parts: list[str]) -> Iterator[Spec]:
    for part in parts:
        yield from opened.part_file(part).specs.values()


def _left_out(opened: Checkpoint, used: list[str]) -> Iterator[LeftOut]:
    reasons = {
        "transformer_ema": "generation uses the transformer",
        "critic": "only training needs it",
        "critic_lora": "only training needs it",
        "reader": "only training needs it",
    }
    return (LeftOut(part, reasons[part]) for part in opened.parts if part not in used and part in reasons)
