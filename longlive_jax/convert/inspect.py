"""Says what a file, a folder or a checkpoint holds, without reading tensor data."""

import dataclasses
from typing import Any

from longlive_jax.checkpoint import Checkpoint, count_parameters, is_checkpoint, open_checkpoint
from longlive_jax.convert import hub, infer
from longlive_jax.convert.detect import Found, Source, scan
from longlive_jax.convert.reports import InspectReport, PartReport
from longlive_jax.errors import UserError
from longlive_jax.storage import PathLike

_SHAPE_NAMES = {
    "transformer": ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len"),
    "text_encoder": ("vocab_size", "dim", "ffn_dim", "num_heads", "num_layers"),
    "vae": ("family", "dim", "z_dim", "dim_mult", "temporal_downsample"),
}


def inspect(source: PathLike) -> InspectReport:
    """Describes anything that `convert` reads and the checkpoints it writes.

    Args:
      source: a file, a folder, a checkpoint directory, a bundled checkpoint or a hub repository.

    Returns:
      Parts, sizes, precisions and inferred settings; `str()` of it is the text to print.

    Raises:
      UserError: there is no such thing, or a file in it is damaged, hostile or unknown.
    """
    path = hub.resolve(source)
    if is_checkpoint(path):
        return _describe_checkpoint(open_checkpoint(path))
    return _describe_source(scan(path))


def _describe_checkpoint(checkpoint: Checkpoint) -> InspectReport:
    parts = []
    for name, info in checkpoint.parts.items():
        file = checkpoint.part_file(name)
        parts.append(
            PartReport(
                name,
                info.file,
                "longlive-jax",
                tensors=len(file.specs),
                parameters=count_parameters(file.specs),
                dtype=info.dtype,
                rank=info.rank,
            )
        )
    shapes = [
        _shape_line(name, getattr(checkpoint.config, name))
        for name in _SHAPE_NAMES
        if name in checkpoint.parts
    ]
    notes = [f"config: {checkpoint.config.name}"]
    if checkpoint.config.quantization != "none":
        notes.append(f"quantization: {checkpoint.config.quantization}")
    notes += [
        f"{entry['part']}: {'merged from' if entry['merged'] else 'kept from'} {entry['origin']}, "
        f"rank {entry['rank']}, alpha {entry['alpha']:g}"
        for entry in checkpoint.source.get("lora", ())
    ]
    if not checkpoint.has_tokenizer:
        notes.append("no tokenizer.json")
    return InspectReport(checkpoint.path, "longlive-jax", parts, (), shapes, notes)


def _describe_source(source: Source) -> InspectReport:
    shapes, notes = [], []
    described = set()
    for found in source.found:
        kind = found.part if found.part in ("text_encoder", "vae") else "transformer"
        if found.layout == "peft" or kind in described:
            continue
        described.add(kind)
        try:
            shapes.append(_shape_line(kind, _infer(kind, found, source)))
        except UserError as error:
            notes.append(str(error))
    names = [found.part for found in source.found]
    notes += [f"several files hold the {name}" for name in dict.fromkeys(names) if names.count(name) > 1]
    if source.tokenizer is not None:
        notes.append(f"tokenizer: {source.tokenizer}")
    return InspectReport(
        source.path,
        "+".join(dict.fromkeys(found.layout for found in source.found)) or "tokenizer",
        [found.report() for found in source.found],
        source.left_out,
        shapes,
        notes,
    )


def _infer(kind: str, found: Found, source: Source) -> Any:
    if kind == "vae":
        return infer.vae_config(found)
    if kind == "text_encoder":
        return infer.text_encoder_config(found, text_len=int(source.settings.get("text_len", 512)))
    return infer.transformer_config(dataclasses.replace(found, settings=found.settings or source.settings))


def _shape_line(part: str, config: Any) -> str:
    values = " ".join(f"{name}={getattr(config, name)}" for name in _SHAPE_NAMES[part])
    return f"{part}: {values}"
