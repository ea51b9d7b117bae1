"""From a training run to a checkpoint directory that `longlive generate` reads."""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping

import jax

from longlive_jax import checkpoint, storage
from longlive_jax.checkpoint import Checkpoint
from longlive_jax.config import PipelineConfig
from longlive_jax.training import processes
from longlive_jax.training.config import DistillTraining, Training, stage_of
from longlive_jax.types import Params

FOLDER = "export"


def export(
    config: Training,
    parts: Mapping[str, Params],
    *,
    adapters: Mapping[str, Params] | None = None,
    merged: Collection[str] = (),
    model: PipelineConfig | None = None,
    tokenizer: pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes `<run.folder>/export`: the base's parts, with the trained ones in their place.

    Args:
      config: of the stage.
      parts: what it trained, by part name.
      adapters: LoRAs it trained, by part name; scaled by the config's `lora`.
      merged: LoRAs of the base that `parts` contain already, so that they are left out.
      model: the model's config, where training has completed it; default the stage's.
      tokenizer: a tokenizer.json; default the base's.

    Returns:
      The checkpoint directory; None of it is visible before it is complete. Only the first process
      writes. Its source does not tell of steps: the run does, see `record_steps`.
    """
    path = pathlib.Path(config.run.folder) / FOLDER
    host = {name: processes.to_host(tree) for name, tree in {**parts, **(adapters or {})}.items()}
    if jax.process_index() != 0:
        return path
    base = checkpoint.open_checkpoint(config.base) if config.base else None
    source = {"stage": stage_of(config), "seed": config.run.seed, "base": config.base}
    with checkpoint.create(path, model or config.model, source=source, overwrite=True) as writer:
        for name in checkpoint.PARTS:
            if adapters and name in adapters:
                assert isinstance(config, DistillTraining), config
                rank = config.lora.rank
                writer.add_tree(name, host[name], alpha=rank * config.lora.scale, rank=rank)
            elif name in host:
                writer.add_tree(name, host[name])
            elif base is not None and name in base.parts and name not in merged:
                info = base.parts[name]
                writer.add_tree(name, base.load(name), alpha=info.alpha, rank=info.rank)
        if tokenizer is not None:
            writer.add_tokenizer(tokenizer)
        elif base is not None and base.has_tokenizer:
            writer.add_tokenizer(base.tokenizer_path)
    return path


def record_steps(path: pathlib.Path, steps: int) -> None:
    """Adds to the source of an export the number of steps it was made after."""
    file = path / checkpoint.CONFIG_FILE
    content = storage.read_json(file)
    content["source"]["steps"] = steps
    storage.write_json(file, content)


def base_model(config: Training, base: Checkpoint) -> PipelineConfig:
    """The stage's model with what only training could know: the base's latent statistics."""
    return dataclasses.replace(config.model, vae=base.config.vae)
