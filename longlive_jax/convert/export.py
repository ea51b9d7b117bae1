"""Writes a checkpoint in the layouts that PyTorch users load, and beside it what they have no place for."""

import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from longlive_jax import storage
from longlive_jax.checkpoint import Checkpoint, open_checkpoint
from longlive_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, TransformerConfig
from longlive_jax.convert import carried, keys_text_encoder, keys_tiny_vae, keys_transformer, keys_vae
from longlive_jax.convert.readers import import_torch
from longlive_jax.convert.reports import ExportReport, LeftOut, PartReport
from longlive_jax.convert.table import Table
from longlive_jax.errors import require
from longlive_jax.lora import ALL_TARGETS
from longlive_jax.storage import PathLike, Spec, TensorFile

Layout = Literal["longlive", "longlive-ema", "lora", "wan"]

_WAN_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WAN_VAE = "Wan2.1_VAE.pth"
_TINY_VAE = "taew2_1.pth"
_WAN_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
_WAN_TOKENIZER = "google/umt5-xxl/tokenizer.json"


def export(
    source: PathLike | Checkpoint, destination: PathLike, *, layout: Layout, overwrite: bool = False
) -> ExportReport:
    """Writes a checkpoint directory in one of the published layouts.

    Layouts:
      "longlive": a file like longlive_base.pt, `{"generator": {"model.*"}}`, with `generator_ema` and
        `critic` beside it where the checkpoint has them.
      "longlive-ema": a file `{"generator_ema": {"model.*"}}` of the averaged weights (of the
        transformer, where there are no others).
      "lora": a file like lora.pt, `{"generator_lora", "critic_lora", "step"}`, with PEFT's names.
      "wan": a folder in Wan2.1's original layout, with the parts that the checkpoint has.

    Our config goes with them, as an entry of a file or as a file of the folder (see `carried`), so that
    `convert` gives the same model back.

    Tensors keep the precision they are stored in. Files for `torch.load` are assembled in memory (one
    copy of what they hold); safetensors are streamed.

    Args:
      source: the checkpoint, or its directory.
      destination: the file to write; for "wan" the folder.
      layout: see above.
      overwrite: replace an existing file, or an existing folder that looks like Wan's.

    Raises:
      UserError: the checkpoint lacks what the layout needs, torch is missing, or writing fails.
    """
    require(
        layout in get_args(Layout),
        f"layout={layout!r} is unknown; choose one of {', '.join(get_args(Layout))}",
    )
    opened = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    require(
        opened.config.quantization == "none",
        f"{opened.path} is quantised ({opened.config.quantization}), which these layouts cannot hold; export "
        "the checkpoint it was made from",
    )
    target = pathlib.Path(os.path.abspath(destination))
    if layout == "wan":
        return _export_wan(opened, target, overwrite=overwrite)
    require(overwrite or not os.path.lexists(target), f"{target} exists already; choose another name")
    require(not target.is_dir(), f"{target} is a folder; name the file to write")
    require(target.parent.is_dir(), f"{target.parent}: no such folder; make it first")
    contents, parts = _torch_contents(opened, layout)
    _save_torch(contents, target)
    return _export_report(opened, [target], parts, layout=layout)


def _export_report(
    checkpoint: Checkpoint, files: Sequence[pathlib.Path], parts: Sequence[PartReport], *, layout: str
) -> ExportReport:
    written = [part.part for part in parts]
    absent = [part for part in checkpoint.parts if part not in written]
    if checkpoint.has_tokenizer and layout != "wan":
        absent.append("tokenizer")
    left_out = [LeftOut(name, f"layout={layout} has no place for it") for name in absent]
    return ExportReport(files, parts, _torch_notes(checkpoint, written), left_out)


def _torch_notes(checkpoint: Checkpoint, parts: Collection[str]) -> list[str]:
    """What PyTorch programs take for granted and this model does not keep to."""
    config, infos = checkpoint.config, checkpoint.parts
    notes = [
        f"{part}: PyTorch programs must be told alpha={infos[part].alpha:g}"
        for part in ("lora", "critic_lora")
        if part in parts
    ]
    networks = [part for part in parts if part in ("transformer", "transformer_ema", "critic")]
    if networks and config.transformer.prediction != "v":
        notes.append(
            f"{networks[0]}: PyTorch programs must be told prediction={config.transformer.prediction!r}"
        )
    statistics = (config.vae.latent_mean, config.vae.latent_std)
    if "vae" in parts and config.vae.family == "wan" and statistics != (WAN_LATENT_MEAN, WAN_LATENT_STD):
        notes.append("vae: PyTorch programs must be told its latent_mean and latent_std, which are not Wan's")
    return notes


def _torch_contents(checkpoint: Checkpoint, layout: Layout) -> tuple[dict[str, Any], list[PartReport]]:
    """What goes into the file, and a description of it."""
    entries = {
        "longlive": {"generator": "transformer", "generator_ema": "transformer_ema", "critic": "critic"},
        "longlive-ema": {
            "generator_ema": "transformer_ema" if "transformer_ema" in checkpoint.parts else "transformer"
        },
        "lora": {"generator_lora": "lora", "critic_lora": "critic_lora"},
    }[layout]
    first = next(iter(entries.values()))
    contents: dict[str, Any] = {}
    reports = []
    for key, part in entries.items():
        if part not in checkpoint.parts and part != first:
            continue
        prefix = "" if layout == "lora" else "model."
        contents[key] = _state_dict(checkpoint, part, prefix=prefix)
        reports.append(_report(checkpoint, part, tensors=len(contents[key]), layout=layout))
    if layout == "lora":
        steps = checkpoint.source.get("steps", {})
        contents |= {"step": steps["lora"]} if "lora" in steps else {}
    contents[carried.ENTRY] = carried.contents(checkpoint, [report.part for report in reports])
    return contents, reports


def _export_wan(checkpoint: Checkpoint, target: pathlib.Path, *, overwrite: bool) -> ExportReport:
    parts = [part for part in ("transformer", "vae", "text_encoder") if part in checkpoint.parts]
    require(len(parts) > 0, f"{checkpoint.path} has none of the parts that this layout holds")
    storage.check_destination(target, overwrite=overwrite, replaceable=_is_wan_folder)
    files, reports = [], []
    with storage.new_folder(target, overwrite=overwrite, replaceable=_is_wan_folder) as folder:
        config = _wan_config(checkpoint.config.transformer)
        storage.write_json(folder / "config.json", config)
        files.append("config.json")
        for part in parts:
            if part == "transformer":
                count = _stream_transformer(checkpoint, folder / _WAN_WEIGHTS)
                files.append(_WAN_WEIGHTS)
            else:
                vae = _TINY_VAE if checkpoint.config.vae.family == "taehv" else _WAN_VAE
                name = vae if part == "vae" else _WAN_TEXT_ENCODER
                contents = _state_dict(checkpoint, part)
                count = len(contents)
                _save_torch(contents, folder / name)
                files.append(name)
            reports.append(_report(checkpoint, part, tensors=count, layout="wan"))
        storage.write_json(folder / carried.FILE, carried.contents(checkpoint, parts))
        files.append(carried.FILE)
        if checkpoint.has_tokenizer:
            (folder / _WAN_TOKENIZER).parent.mkdir(parents=True)
            storage.copy_file(checkpoint.tokenizer_path, folder / _WAN_TOKENIZER)
            files.append(_WAN_TOKENIZER)
    return _export_report(checkpoint, [target / file for file in files], reports, layout="wan")


def _wan_config(config: TransformerConfig) -> dict[str, Any]:
    """Wan's config.json. It has no text_dim: the original class takes 4096."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.latent_channels,
        "model_type": "t2v",
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.latent_channels,
        "text_len": config.text_len,
        **({} if config.text_dim == 4096 else {"text_dim": config.text_dim}),
    }


def _is_wan_folder(path: pathlib.Path) -> bool:
    try:
        return storage.read_json(path / "config.json").get("_class_name") == "WanModel"
    except ValueError:
        return False


def _tensors(checkpoint: Checkpoint, part: str) -> Iterator[tuple[str, np.ndarray]]:
    """The part's tensors in PyTorch's layout and names, one by one."""
    file = checkpoint.part_file(part)
    for name, rule, layer in _table(checkpoint, part, file).sources():
        # Transposed views become contiguous: torch saves the memory behind a tensor as it is.
        yield name, np.ascontiguousarray(rule.to_source(file.read(rule.target, layer)))


def _state_dict(checkpoint: Checkpoint, part: str, *, prefix: str = "") -> dict[str, Any]:
    import_torch(checkpoint.path)
    return {prefix + name: _to_torch(array) for name, array in _tensors(checkpoint, part)}


def _stream_transformer(checkpoint: Checkpoint, path: pathlib.Path) -> int:
    file = checkpoint.part_file("transformer")
    specs = {}
    for name, rule, layer in _table(checkpoint, "transformer", file).sources():
        spec = file.specs[rule.target]
        shape = spec.shape if layer is None else spec.shape[1:]
        specs[name] = Spec(rule.to_source(np.broadcast_to(np.zeros((), np.int8), shape)).shape, spec.dtype)
    # "pt" is what transformers and diffusers ask for before they read a file.
    storage.write_tensors(path, specs, _tensors(checkpoint, "transformer"), metadata={"format": "pt"})
    return len(specs)


def _table(checkpoint: Checkpoint, part: str, file: TensorFile) -> Table:
    config = checkpoint.config
    if part == "vae":
        return (keys_tiny_vae if config.vae.family == "taehv" else keys_vae).table(config.vae)
    if part == "text_encoder":
        return keys_text_encoder.table(config.text_encoder)
    if part in ("lora", "critic_lora"):
        targets = [target for target in ALL_TARGETS if f"{target}/a" in file.specs]
        return keys_transformer.lora_table(config.transformer.num_layers, targets)
    return keys_transformer.table(config.transformer)


def _to_torch(array: np.ndarray) -> Any:
    """A torch tensor over the array's memory; bfloat16 travels as its bits."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _save_torch(contents: Mapping[str, Any], path: pathlib.Path) -> None:
    torch = import_torch(path)
    with storage.new_file(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(contents), file)
        file.flush()
        os.fsync(file.fileno())


def _report(checkpoint: Checkpoint, part: str, *, tensors: int, layout: str) -> PartReport:
    info = checkpoint.parts[part]
    return PartReport(
        part,
        checkpoint.path.name,
        "peft" if layout == "lora" else "wan",
        tensors=tensors,
        parameters=info.parameters,
        dtype=info.dtype,
        rank=info.rank,
    )
