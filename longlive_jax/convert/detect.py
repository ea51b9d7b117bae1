"""Finds the parts of a model in files and folders, by the names of the tensors in them."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longlive_jax import storage
from longlive_jax.checkpoint import is_checkpoint, name_some
from longlive_jax.convert import carried, readers
from longlive_jax.convert.carried import Carried
from longlive_jax.convert.keys_text_encoder import TRANSFORMERS_ALIASES
from longlive_jax.convert.readers import Group, LazyTensor
from longlive_jax.convert.reports import LeftOut, PartReport
from longlive_jax.errors import UserError, require

# (part, layout) -> a pattern that some names of that layout match and no name of another does.
_SIGNATURES: Mapping[tuple[str, str], re.Pattern[str]] = {
    ("lora", "peft"): re.compile(r"\.lora_[AB]\."),
    ("transformer", "wan"): re.compile(r"^(model\.)?blocks\.\d+\.(self_attn|cross_attn|ffn\.[02])\."),
    ("transformer", "diffusers"): re.compile(r"^blocks\.\d+\.(attn[12]\.|ffn\.net\.)"),
    ("text_encoder", "wan"): re.compile(r"^blocks\.\d+\.(attn\.[qkvo]|ffn\.(gate|fc[12]))\."),
    ("text_encoder", "transformers"): re.compile(r"^encoder\.block\.\d+\."),
    ("vae", "wan"): re.compile(r"^(encoder\.downsamples|decoder\.upsamples)\."),
    ("vae", "taehv"): re.compile(r"^decoder\.\d+\.conv\.\d+\."),
    ("vae", "diffusers"): re.compile(r"^(encoder\.down_blocks|decoder\.up_blocks)\."),
}

# Entry of a PyTorch file -> which use of the transformer, or of its LoRA, it is.
_ROLES: Mapping[str | None, str] = {
    None: "transformer",
    "generator": "transformer",
    "model": "transformer",
    "generator_ema": "transformer_ema",
    "critic": "critic",
}
_LORA_ROLES: Mapping[str | None, str] = {None: "lora", "generator_lora": "lora", "critic_lora": "critic_lora"}

_PEFT_PREFIX = "base_model.model."
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.(?!weight$)[^.]+\.weight$")
_CONFIG_FILES = ("config.json", "adapter_config.json")


@dataclasses.dataclass(frozen=True)
class Found:
    """One part of a model in a source.

    Attributes:
      part: "transformer", "vae", ... (see `longlive_jax.checkpoint.PARTS`).
      layout: whose names: "wan", "diffusers", "transformers", "taehv" or "peft".
      origin: file and entry, for messages.
      tensors: by the name that the layout's key table uses.
      settings: the config.json beside the file, empty if there is none.
      step: the training step the file names, if it does.
      carried: what our export said about the model, if it is one that we exported.
    """

    part: str
    layout: str
    origin: str
    tensors: Mapping[str, LazyTensor]
    settings: Mapping[str, Any]
    step: int | None = None
    carried: Carried | None = None

    @property
    def short_origin(self) -> str:
        """File name and entry, without the folders."""
        return pathlib.PurePath(self.origin).name

    def report(self) -> PartReport:
        """A description that needs no tensor data."""
        return PartReport(
            self.part,
            self.short_origin,
            self.layout,
            tensors=len(self.tensors),
            parameters=sum(t.spec.size for t in self.tensors.values()),
            dtype="+".join(sorted({str(t.spec.dtype) for t in self.tensors.values()})),
            rank=lora_rank(self) if self.layout == "peft" else None,
        )


@dataclasses.dataclass(frozen=True)
class Source:
    """What one source holds.

    Attributes:
      path: the file or folder.
      found: its parts, in the order of the files.
      tokenizer: its tokenizer.json, if there is one.
      left_out: what is no weight.
      settings: the transformer's config.json, also where the transformer itself is not there.
    """

    path: pathlib.Path
    found: Sequence[Found]
    tokenizer: pathlib.Path | None
    left_out: Sequence[LeftOut]
    settings: Mapping[str, Any]

    @property
    def carried(self) -> Carried | None:
        """What our export said about the model, if any part here is one that we exported."""
        return next((found.carried for found in self.found if found.carried is not None), None)


def scan(path: pathlib.Path) -> Source:
    """Finds what a file or folder holds; no tensor data is read.

    Raises:
      UserError: nothing is found, or a file is damaged, hostile or unknown.
    """
    require(path.exists(), f"{path}: no such file or folder")
    require(
        not is_checkpoint(path),
        f"{path}: is in our format already; use it as it is, or `longlive export` it",
    )
    files = list(_tensor_files(path)) if path.is_dir() else [path]
    found: list[Found] = []
    left_out: list[LeftOut] = []
    for file in files:
        groups, rest = readers.read_groups(file)
        found += [identify(group) for group in groups]
        left_out += rest
    tokenizer = _tokenizer(path) if path.is_dir() else None
    require(
        bool(found) or tokenizer is not None,
        f"{path}: holds no safetensors or PyTorch files; name the folder of a model, or one of its files",
    )
    return Source(path, found, tokenizer, left_out, _model_settings(path, found))


def identify(group: Group) -> Found:
    """Says what a group of tensors is, by their names.

    Raises:
      UserError: it is nothing that is known, or two things at once.
    """
    kinds = [kind for kind, pattern in _SIGNATURES.items() if any(map(pattern.search, group.tensors))]
    sample = name_some(group.tensors)
    require(len(kinds) > 0, f"{group.origin}: its tensors belong to no part that is known ({sample})")
    require(len(kinds) == 1, f"{group.origin}: mixes tensors of {' and '.join(map(' '.join, kinds))}")
    (part, layout), roles = kinds[0], _LORA_ROLES if kinds[0][0] == "lora" else _ROLES
    if part in ("lora", "transformer"):
        require(group.key in roles, f"{group.origin}: a {part} is not expected in this entry")
        part = roles[group.key]
    else:
        require(group.key in (None, "model"), f"{group.origin}: a {part} is not expected in this entry")
    tensors = _renamed(group, layout)
    settings = _settings(group.path, layout)
    return Found(part, layout, group.origin, tensors, settings, group.step, _carried(group))


def lora_rank(found: Found) -> int:
    """The rank of a LoRA, from the shapes of its tensors.

    Raises:
      UserError: its layers have different ranks.
    """
    shapes = {name: t.spec.shape for name, t in found.tensors.items() if ".lora_A." in name}
    ranks = {shape[0] for shape in shapes.values() if len(shape) == 2}
    require(
        len(ranks) == 1,
        f"{found.origin}: its layers have the ranks {sorted(ranks)}; one rank for all is supported",
    )
    return ranks.pop()


def _renamed(group: Group, layout: str) -> dict[str, LazyTensor]:
    """Gives the tensors the names of the layout's key table."""
    if layout == "peft":
        names = {name: _peft_name(name) for name in group.tensors}
    elif layout == "transformers":
        names = {name: TRANSFORMERS_ALIASES.get(name, name) for name in group.tensors}
    elif all(name.startswith("model.") for name in group.tensors):
        names = {name: name.removeprefix("model.") for name in group.tensors}
    else:
        names = {name: name for name in group.tensors}
    renamed: dict[str, LazyTensor] = {}
    for name, new in names.items():
        if new in renamed and name in TRANSFORMERS_ALIASES:
            continue  # the tied embedding under its second name
        tied = new in renamed and renamed[new].name in TRANSFORMERS_ALIASES
        require(tied or new not in renamed, f"{group.origin}: holds {new} twice")
        renamed[new] = group.tensors[name]
    return renamed


def _peft_name(name: str) -> str:
    """The name without the adapter's, and with the prefix of PEFT's wrapper."""
    return _PEFT_PREFIX + _ADAPTER_NAME.sub(r"\1.weight", name).removeprefix(_PEFT_PREFIX)


def _settings(path: pathlib.Path, layout: str) -> dict[str, Any]:
    """The config file beside the weights, if it is one that describes weights of this layout."""
    file = path.parent / _CONFIG_FILES[layout == "peft"]
    if not file.is_file():
        return {}
    return storage.read_json(file)


def _carried(group: Group) -> Carried | None:
    """What our export wrote into the file, else beside it."""
    if group.export is None:
        return carried.beside(group.path)
    return carried.parse(group.export, where=f"{group.path}:{carried.ENTRY}")


def _model_settings(path: pathlib.Path, found: Sequence[Found]) -> Mapping[str, Any]:
    """The transformer's settings: beside its weights, or (Wan's folder without them) at the top."""
    for part in found:
        if part.part in set(_ROLES.values()) and part.settings:
            return part.settings
    file = path / "config.json"
    settings = storage.read_json(file) if path.is_dir() and file.is_file() else {}
    return settings if "num_heads" in settings else {}


def _tensor_files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Tensor files of a folder and its subfolders; files that an index names come with the index."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if readers.is_tensor_file(file)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    indexed = {shard for file in files if readers.is_index(file) for shard in readers.shards(file)}
    yield from (file for file in files if file not in indexed)


def _tokenizer(folder: pathlib.Path) -> pathlib.Path | None:
    """The folder's tokenizer.json."""
    paths = [path for path in sorted(folder.rglob("tokenizer.json")) if path.is_file()]
    require(len(paths) <= 1, f"{folder}: holds several tokenizers ({name_some(map(str, paths))}); keep one")
    for path in paths:
        check_tokenizer(path)
    return paths[0] if paths else None


def check_tokenizer(path: pathlib.Path) -> None:
    """Refuses a tokenizer.json that is not one."""
    try:
        model = json.loads(path.read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a tokenizer.json ({error}); download it again") from error
    require(
        isinstance(model, Mapping) and "vocab" in model, f"{path}: not a tokenizer.json; download it again"
    )
