"""The checkpoint directory: the weights of every part in our layout, their shapes and the config.

    config.json                {"format", "version", "config", "parts", "source"}
    transformer.safetensors    one file per part, tensors named by their path in the parameter tree
    tokenizer.json

A checkpoint may hold some parts only (a transformer without a VAE, say); what is missing is named
when it is asked for. `longlive_jax.convert` makes checkpoints from the released files, `create` from
parameter trees.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import numpy as np

from longlive_jax import storage
from longlive_jax.config import PipelineConfig
from longlive_jax.config_dict import from_dict, to_dict
from longlive_jax.errors import UserError, require
from longlive_jax.storage import PathLike, Spec
from longlive_jax.types import Params

FORMAT = "longlive-jax"
VERSION = 1
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

PARTS: Mapping[str, str] = {
    "transformer": "the diffusion transformer",
    "transformer_ema": "its exponential moving average",
    "critic": "the critic of the distillation",
    "text_encoder": "the umT5 text encoder",
    "vae": "the video autoencoder",
    "lora": "the transformer's LoRA, kept apart",
    "critic_lora": "the critic's LoRA",
    "reader": "what reads the toy world's attributes from latents",
}
"""Every part a checkpoint can hold, in the order they are written."""

BUNDLED: Mapping[str, pathlib.Path] = {"toy": pathlib.Path(__file__).parent / "assets/toy"}
"""The checkpoints that come with the package, by the name that stands for them."""

KERNEL_SCALE = "kernel_scale"
"""The tensor beside an 8-bit kernel that holds its scales; see `quantize.tree`."""

_NAMED_LEAVES = 12  # how many wrong leaves one error line names


@dataclasses.dataclass(frozen=True)
class PartInfo:
    """What config.json says about one part.

    Attributes:
      file: its file name inside the directory.
      dtype: the precision of its tensors ("mixed" when they differ).
      parameters: number of parameters, see `count_parameters`.
      digest: BLAKE2b of the file, taken when it was written.
      alpha: for a LoRA, its alpha; the update is alpha / rank * B A.
      rank: for a LoRA, its rank.
    """

    file: str
    dtype: str
    parameters: int
    digest: str
    alpha: float | None = None
    rank: int | None = None

    @property
    def lora_scale(self) -> float:
        """For a LoRA, what the product B A is multiplied by."""
        rank = self.rank or 1
        return (self.alpha or rank) / rank


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint directory; parts are loaded when asked for.

    Attributes:
      path: the directory.
      config: the resolved config of the model.
      parts: what the directory holds, by part name.
      source: what it was made from, as written by whoever made it.
    """

    path: pathlib.Path
    config: PipelineConfig
    parts: Mapping[str, PartInfo]
    source: Mapping[str, Any]

    def part_file(self, part: str) -> storage.TensorFile:
        """The part's tensors, without reading them.

        Raises:
          UserError: the part is not in this checkpoint, or its file is damaged.
        """
        if part not in self.parts:
            raise UserError(
                f"{self.path} has no {part} (it has {', '.join(self.parts) or 'no parts'}); "
                f"convert it together with a source that holds {PARTS.get(part, part)}"
            )
        return storage.open_tensors(self.path / self.parts[part].file)

    def specs(self, part: str) -> Params:
        """The part's parameter tree as `jax.ShapeDtypeStruct`s."""
        return unflatten(self.part_file(part).specs)

    def load(self, part: str, *, dtype: Any = None, expect: Params | None = None) -> Params:
        """Loads one part as a nested dict of numpy arrays.

        Args:
          part: a name of `PARTS`.
          dtype: cast every tensor to this; None keeps the stored precision, and then the arrays are
            read-only views of the mapped file.
          expect: a tree of `jax.ShapeDtypeStruct`s (dtypes are not compared), as `jax.eval_shape`
            gives for the model's initialisation.

        Raises:
          UserError: the part is missing or damaged, or differs from `expect`; the leaves are named.
        """
        file = self.part_file(part)
        if expect is not None:
            _compare(file, expect, part=part)
        arrays = {name: file.map(name) for name in file.specs}
        if dtype is not None:
            arrays = {name: np.asarray(array, dtype=dtype) for name, array in arrays.items()}
        return unflatten(arrays)

    def fingerprint(self, part: str) -> str:
        """A content id of the part that costs nothing to read; for keys of caches."""
        self.part_file(part)
        return self.parts[part].digest

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / TOKENIZER_FILE).is_file()

    @property
    def tokenizer_path(self) -> pathlib.Path:
        """The tokenizer's tokenizer.json.

        Raises:
          UserError: this checkpoint has none.
        """
        require(
            self.has_tokenizer,
            f"{self.path} has no {TOKENIZER_FILE}; copy the one of google/umt5-xxl there, or convert a Wan "
            "folder that holds it",
        )
        return self.path / TOKENIZER_FILE


def locate(checkpoint: PathLike) -> pathlib.Path:
    """The directory that a checkpoint is in: the one of that path, else the bundled one of that name.

    Raises:
      UserError: the name is a bundled one, and this installation lacks it.
    """
    path = pathlib.Path(checkpoint)
    if str(path) not in BUNDLED or (path / CONFIG_FILE).is_file():
        return path
    bundled = BUNDLED[str(path)]
    require(
        (bundled / CONFIG_FILE).is_file(),
        f"checkpoint={path}: the bundled model is not in this installation (no {bundled / CONFIG_FILE}); "
        "install the package again, or make the model with `make toy toy-bundle`",
    )
    return bundled


def open_checkpoint(path: PathLike, *, field: str = "checkpoint") -> Checkpoint:
    """Opens a checkpoint directory; reads config.json only.

    Args:
      path: the directory, or the name of a bundled checkpoint (see `locate`).
      field: the setting that names it, for errors.

    Raises:
      UserError: there is none, or it was written by something newer.
    """
    path = locate(path)
    require(
        (path / CONFIG_FILE).is_file(),
        f"{field}={path} is no checkpoint directory (no {CONFIG_FILE}); make one with `longlive convert` or "
        "`longlive train`, or name toy, the bundled model",
    )
    values = storage.read_json(path / CONFIG_FILE)
    require(
        values.get("format") == FORMAT,
        f"{field}={path} is not in our format; convert it first with `longlive convert`",
    )
    require(
        values.get("version") == VERSION,
        f"{field}={path} has version {values.get('version')}, not {VERSION}; convert it again",
    )
    config = from_dict(PipelineConfig, values.get("config", {}), where="")
    return Checkpoint(path, config, _parts(path, values.get("parts", {})), values.get("source", {}))


def is_checkpoint(path: PathLike) -> bool:
    """Whether `path` is a directory in our format (of any version)."""
    try:
        return storage.read_json(pathlib.Path(path) / CONFIG_FILE).get("format") == FORMAT
    except UserError:
        return False


def _parts(path: pathlib.Path, entries: Any) -> dict[str, PartInfo]:
    parts = {}
    for name, entry in entries.items():
        try:
            parts[name] = PartInfo(**entry)
        except TypeError as error:
            raise UserError(f"{path / CONFIG_FILE}: bad entry for part {name} ({error})") from error
        file = parts[name].file
        require(
            pathlib.PurePath(file).name == file,
            f"{path / CONFIG_FILE}: part {name} has the file {file!r}; it must be a plain name",
        )
    return parts


# --- writing --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Writer:
    """Fills a new checkpoint directory part by part; use it through `create`."""

    path: pathlib.Path
    config: PipelineConfig
    source: Mapping[str, Any]
    parts: dict[str, PartInfo] = dataclasses.field(default_factory=dict)

    def add(
        self,
        part: str,
        specs: Mapping[str, Spec],
        pieces: Iterable[tuple[str, np.ndarray]],
        *,
        alpha: float | None = None,
        rank: int | None = None,
    ) -> PartInfo:
        """Streams one part to its file.

        Args:
          part: a name of `PARTS`.
          specs: "/"-joined path to shape and dtype, in the order of `pieces`.
          pieces: see `storage.write_tensors`.
          alpha: for a LoRA, its alpha.
          rank: for a LoRA, its rank.
        """
        if part not in PARTS or part in self.parts:
            raise ValueError(f"{part} is not a part, or was added already")
        file = f"{part}.safetensors"
        digest = storage.write_tensors(self.path / file, specs, pieces, metadata={"format": FORMAT})
        dtypes = {str(np.dtype(spec.dtype)) for spec in specs.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else "mixed"
        self.parts[part] = PartInfo(file, dtype, count_parameters(specs), digest, alpha=alpha, rank=rank)
        return self.parts[part]

    def add_tree(
        self, part: str, params: Params, *, alpha: float | None = None, rank: int | None = None
    ) -> PartInfo:
        """Writes a parameter tree (numpy or device arrays), leaf by leaf."""
        leaves = flatten(params)
        specs = {name: Spec(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        pieces = ((name, np.asarray(leaf)) for name, leaf in leaves.items())
        return self.add(part, specs, pieces, alpha=alpha, rank=rank)

    def add_tokenizer(self, path: PathLike) -> None:
        """Copies a tokenizer.json."""
        storage.copy_file(path, self.path / TOKENIZER_FILE)


@contextlib.contextmanager
def create(
    path: PathLike, config: PipelineConfig, *, source: Mapping[str, Any], overwrite: bool = False
) -> Iterator[Writer]:
    """Makes a checkpoint directory that appears, complete, when the body succeeds.

    Args:
      path: the directory.
      config: stored as the checkpoint's config.
      source: where the weights come from (JSON values); the program's version is added.
      overwrite: replace an existing checkpoint.

    Raises:
      UserError: `path` exists, or cannot be written.
    """
    with storage.new_folder(path, overwrite=overwrite, replaceable=is_checkpoint) as folder:
        writer = Writer(folder, config, source)
        yield writer
        storage.write_json(
            folder / CONFIG_FILE,
            {
                "format": FORMAT,
                "version": VERSION,
                "config": to_dict(config),
                "parts": {name: _entry(info) for name, info in writer.parts.items()},
                "source": {**source, "written_by": f"longlive-jax {_version()}"},
            },
        )


def _entry(info: PartInfo) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(info).items() if v is not None}


def _version() -> str:
    try:
        return metadata.version("longlive-jax")
    except metadata.PackageNotFoundError:
        return "unknown"


# --- trees ----------------------------------------------------------------------------------------


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """A nested dict as one dict of "/"-joined paths, in the order of the keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves.update(flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value})
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
            require(isinstance(node, dict), f"tensor names: {name!r} lies below another tensor")
        require(last not in node, f"tensor names: {name!r} is both a tensor and a group")
        node[last] = value
    return tree


def count_parameters(specs: Mapping[str, Spec]) -> int:
    """Parameters in a part's tensors: every number but the scales of 8-bit kernels.

    Args:
      specs: "/"-joined path to shape and dtype.
    """
    return sum(spec.size for name, spec in specs.items() if not name.endswith(f"/{KERNEL_SCALE}"))


def name_some(names: Iterable[str]) -> str:
    """Names joined by commas, the first dozen of them, with the number of the others."""
    names = list(names)
    more = len(names) - _NAMED_LEAVES
    return ", ".join(names[:_NAMED_LEAVES]) + (f" and {more} more" if more > 0 else "")


def differences(found: Mapping[str, Spec], expected: Mapping[str, Spec]) -> str:
    """What is missing, extra or of another shape in `found`, as one phrase; empty if nothing is."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in found
        if name in expected and tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    kinds = {"missing": missing, "unexpected": extra, "wrong shape": wrong}
    return "; ".join(f"{kind}: {name_some(names)}" for kind, names in kinds.items() if names)


def _compare(file: storage.TensorFile, expect: Params, *, part: str) -> None:
    found = differences(file.specs, flatten(expect))
    require(not found, f"{file.path}: the {part} does not fit its config ({found}); convert it again")
