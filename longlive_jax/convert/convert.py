"""Converts published checkpoints into our directory format.

Every tensor of a source is used, or reported as left out, or named in an error; every leaf of the
target is filled. All of that is checked from names and shapes before anything is written; then the
tensors stream by one at a time.
"""

import dataclasses
import os
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from longlive_jax import checkpoint, storage
from longlive_jax.checkpoint import PARTS
from longlive_jax.config import DType, PipelineConfig
from longlive_jax.convert import hub, infer
from longlive_jax.convert.detect import Found, Source, lora_rank, scan
from longlive_jax.convert.plan import Plan, make_plan, make_update
from longlive_jax.convert.reports import ConvertReport, LeftOut, PartReport, Progress
from longlive_jax.errors import require
from longlive_jax.storage import PathLike

LoraMode = Literal["merge", "keep"]
Weights = Literal["both", "generator", "ema"]

TOKENIZER = "tokenizer"
_TRANSFORMERS = ("transformer", "transformer_ema", "critic")
_NO_OVERRIDES: Mapping[str, Any] = MappingProxyType({})


def convert(
    source: PathLike | Sequence[PathLike],
    destination: PathLike,
    *,
    dtype: DType | None = None,
    lora: LoraMode = "merge",
    lora_alpha: float | None = None,
    weights: Weights = "both",
    parts: Collection[str] | None = None,
    preset: str | None = None,
    overrides: Mapping[str, Any] = _NO_OVERRIDES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Converts one or several sources into one checkpoint directory.

    A source is a file, a folder, or a repository of the Hugging Face hub ("org/name"): the original
    Wan2.1 folder, its diffusers form, LongLive's or Self-Forcing's .pt files, a trainer's
    checkpoint, a LoRA, or any single file of these. What a file is, its tensors say. Where two
    sources hold the same part, the later one wins. The usual case is three: the Wan folder,
    longlive_base.pt and lora.pt.

    Args:
      source: one source or a sequence of them.
      destination: the checkpoint directory to make.
      dtype: precision of all weights; None keeps what each tensor has.
      lora: "merge" adds a LoRA to the transformer (and a critic's to the critic) in float32;
        "keep" stores it as a part of its own.
      lora_alpha: the LoRA's alpha, where the source does not say; None is its rank.
      weights: which weights of a file that has both: "both" keeps the averaged ones as the part
        `transformer_ema`, "generator" drops them, "ema" makes them the transformer. A file that has
        only averaged weights gives them to the transformer in any case.
      parts: convert only these (names of `checkpoint.PARTS`, and "tokenizer"); None is all.
      preset: a preset that decides what tensors and config files do not say (with a model that we exported:
        nothing, its config comes along).
      overrides: dotted settings, e.g. {"transformer.num_heads": 12}; they win.
      overwrite: replace an existing checkpoint at `destination`, in the end and in one step.
      progress: called while weights are written.

    Returns:
      What was written, and what was left out.

    Raises:
      UserError: one line that names the file, what is wrong and the remedy; nothing is left at
        `destination` then, and what was there is untouched.
    """
    start = time.monotonic()
    _check_arguments(dtype, lora=lora, weights=weights, parts=parts, lora_alpha=lora_alpha)
    infer.check_names(overrides)
    target = pathlib.Path(os.path.abspath(destination))
    storage.check_destination(target, overwrite=overwrite, replaceable=checkpoint.is_checkpoint)
    listed = [source] if isinstance(source, str | os.PathLike) else list(source)
    require(len(listed) > 0, "source is empty; name at least one file, folder or repository")
    sources = [scan(hub.resolve(path)) for path in listed]

    choice = _choose(sources, weights=weights, parts=parts)
    settings = next((item.settings for item in sources if item.settings), {})
    config = infer.pipeline_config(choice.found, preset=preset, overrides=overrides, settings=settings)
    planned = _plan(choice, config, dtype=dtype, lora=lora, lora_alpha=lora_alpha)
    total = sum(plan.bytes for plan in planned.plans)
    storage.check_space(target.parent, total)
    with checkpoint.create(target, config, source=planned.record, overwrite=overwrite) as writer:
        done = 0
        for plan in planned.plans:
            part = plan.found.part
            pieces = _counted(plan, done=done, total=total, progress=progress)
            writer.add(part, plan.specs, pieces, **planned.lora_facts.get(part, {}))
            done += plan.bytes
        if choice.tokenizer is not None:
            writer.add_tokenizer(choice.tokenizer)
    return ConvertReport(
        target,
        config,
        parts=[_report(plan) for plan in planned.plans],
        left_out=[*choice.left_out, *planned.left_out],
        notes=[*choice.notes, *_carried_notes(choice, preset), *planned.notes],
        bytes_written=total,
        seconds=time.monotonic() - start,
    )


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which part comes from where."""

    found: Mapping[str, Found]
    tokenizer: pathlib.Path | None
    left_out: Sequence[LeftOut]
    notes: Sequence[str]


@dataclasses.dataclass(frozen=True)
class _Planned:
    """Everything that will be written, checked."""

    plans: Sequence[Plan]
    lora_facts: Mapping[str, Mapping[str, Any]]
    record: Mapping[str, Any]
    left_out: Sequence[LeftOut]
    notes: Sequence[str]


def _check_arguments(
    dtype: str | None, *, lora: str, weights: str, parts: Collection[str] | None, lora_alpha: float | None
) -> None:
    for name, value, known in (
        ("dtype", dtype, (None, *get_args(DType))),
        ("lora", lora, get_args(LoraMode)),
        ("weights", weights, get_args(Weights)),
    ):
        names = ", ".join(str(choice) for choice in known if choice)
        require(value in known, f"{name}={value!r} is unknown; choose one of {names}")
    unknown = [part for part in parts or () if part not in (*PARTS, TOKENIZER)]
    require(not unknown, f"parts={unknown} are unknown; choose from {', '.join((*PARTS, TOKENIZER))}")
    require(lora_alpha is None or lora_alpha > 0, f"lora_alpha={lora_alpha} must be positive")


def _choose(sources: Sequence[Source], *, weights: Weights, parts: Collection[str] | None) -> _Choice:
    """Picks one origin per part: the last source that has it."""
    chosen: dict[str, Found] = {}
    left_out = [item for source in sources for item in source.left_out]
    notes: list[str] = []
    for source in sources:
        mine, dropped = _select(source, weights=weights)
        left_out += dropped
        for part, found in mine.items():
            if part in chosen:
                left_out.append(
                    LeftOut(f"{part} of {chosen[part].short_origin}", f"{found.short_origin} comes later")
                )
            chosen[part] = _with_settings(found, sources)
    tokenizers = [source.tokenizer for source in sources if source.tokenizer is not None]
    if parts is not None:
        left_out += [
            LeftOut(f"{p} of {f.short_origin}", "not asked for") for p, f in chosen.items() if p not in parts
        ]
        chosen = {part: found for part, found in chosen.items() if part in parts}
        absent = [part for part in parts if part not in chosen and part != TOKENIZER]
        require(not absent, f"parts={', '.join(absent)}: no source holds this; name a source that does")
    wants_tokenizer = parts is None or TOKENIZER in parts
    tokenizer = tokenizers[-1] if tokenizers and wants_tokenizer else None
    if "text_encoder" in chosen and tokenizer is None:
        notes.append("no tokenizer.json: text cannot be encoded until it is added (google/umt5-xxl)")
    require(bool(chosen) or tokenizer is not None, "the sources hold nothing to convert")
    ordered = {part: chosen[part] for part in PARTS if part in chosen}
    return _Choice(ordered, tokenizer, left_out, notes)


def _select(source: Source, *, weights: Weights) -> tuple[dict[str, Found], list[LeftOut]]:
    """One source's parts by name, with `weights` applied; two files for one part are ambiguous."""
    mine: dict[str, Found] = {}
    dropped: list[LeftOut] = []
    for found in source.found:
        other = mine.get(found.part, found).origin
        require(
            found.part not in mine,
            f"{source.path}: both {other} and {found.origin} hold the {found.part}; name the file you want",
        )
        mine[found.part] = found
    ema, plain = mine.get("transformer_ema"), mine.get("transformer")
    if ema is not None and plain is None:
        mine["transformer"] = dataclasses.replace(mine.pop("transformer_ema"), part="transformer")
    elif ema is not None and plain is not None and weights == "ema":
        dropped.append(LeftOut(plain.short_origin, "weights=ema"))
        mine["transformer"] = dataclasses.replace(mine.pop("transformer_ema"), part="transformer")
    elif ema is not None and weights == "generator":
        dropped.append(LeftOut(mine.pop("transformer_ema").short_origin, "weights=generator"))
    return mine, dropped


def _with_settings(found: Found, sources: Sequence[Source]) -> Found:
    """LongLive's files come without a config.json: the Wan folder's speaks for them."""
    if found.settings or found.carried or found.part not in _TRANSFORMERS:
        return found
    speaking = [source for source in sources if source.settings] or [s for s in sources if s.carried]
    if not speaking:
        return found
    return dataclasses.replace(found, settings=speaking[0].settings, carried=speaking[0].carried)


def _carried_notes(choice: _Choice, preset: str | None) -> list[str]:
    """Says that an exported config was used, and that it left a preset nothing to decide."""
    used = dict.fromkeys(found.carried.short_where for found in choice.found.values() if found.carried)
    unused = f"; preset={preset} adds nothing to it" if preset and used else ""
    return [f"config: as exported, from {' and '.join(used)}{unused}"] if used else []


def _plan(
    choice: _Choice,
    config: PipelineConfig,
    *,
    dtype: DType | None,
    lora: LoraMode,
    lora_alpha: float | None,
) -> _Planned:
    """Plans every part; LoRAs are checked whether they are merged or kept."""
    precision = {None: None, "float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}[dtype]
    left_out, notes, updates, facts = [], [], {}, {}
    plans: dict[str, Plan] = {}
    loras: list[dict[str, Any]] = []
    for part, base in (("lora", "transformer"), ("critic_lora", "critic")):
        if part not in choice.found:
            continue
        found = choice.found[part]
        if lora == "merge" and base not in choice.found:
            require(
                part != "lora",
                f"{found.origin}: a LoRA has nothing to be merged into here; add the base model as a source, "
                "or keep the LoRA apart (lora=keep)",
            )
            left_out.append(LeftOut(found.short_origin, "no critic to merge it into; lora=keep stores it"))
            continue
        plan = make_plan(found, config, dtype=precision)
        rank = lora_rank(found)
        said = found.carried.alphas.get(part) if found.carried else None
        alpha = lora_alpha or said or float(found.settings.get("lora_alpha", rank))
        facts[part] = {"alpha": alpha, "rank": rank}
        loras.append({"part": part, "origin": found.short_origin, "merged": lora == "merge", **facts[part]})
        if lora == "merge":
            updates[base] = make_update(plan, scale=alpha / rank)
            notes.append(f"{base}: merged {found.short_origin} (rank {rank}, alpha {alpha:g})")
        else:
            plans[part] = plan
    for part, found in choice.found.items():
        if "lora" not in part:
            plans[part] = make_plan(found, config, dtype=precision, update=updates.get(part))
    if "lora" in choice.found and lora == "merge" and "transformer_ema" in plans:
        notes.append("transformer_ema: the LoRA is merged into the transformer only")
    record = {
        "files": {part: plan.found.short_origin for part, plan in plans.items()},
        "layouts": {part: plan.found.layout for part, plan in plans.items()},
        "lora": loras,
        "steps": {p: found.step for p, found in choice.found.items() if found.step is not None},
    }
    ordered = [plans[part] for part in PARTS if part in plans]
    return _Planned(ordered, facts, record, left_out, notes)


def _counted(
    plan: Plan, *, done: int, total: int, progress: Progress | None
) -> Iterator[tuple[str, np.ndarray]]:
    for name, array in plan.pieces():
        yield name, array
        done += array.nbytes
        if progress is not None:
            progress(plan.found.part, done, total)


def _report(plan: Plan) -> PartReport:
    dtypes = sorted({str(np.dtype(spec.dtype)) for spec in plan.specs.values()})
    parameters = sum(spec.size for spec in plan.specs.values())
    return dataclasses.replace(plan.found.report(), parameters=parameters, dtype="+".join(dtypes))
