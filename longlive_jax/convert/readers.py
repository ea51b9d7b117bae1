"""Readers of tensor files: safetensors without torch, PyTorch files with its weights-only loader.

A file is one or more flat groups of tensors that are read one at a time. A pickle is never executed:
`torch.load(weights_only=True)` rebuilds tensors and plain containers and refuses everything else.
"""

import ctypes
import dataclasses
import functools
import mmap
import pathlib
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax import storage
from longlive_jax.checkpoint import name_some
from longlive_jax.convert import carried
from longlive_jax.convert.reports import LeftOut
from longlive_jax.errors import UserError, require
from longlive_jax.storage import Spec

FLOAT_DTYPES = (
    np.dtype(np.float32),
    np.dtype(np.float16),
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(np.float64),
)

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_WEIGHT_GROUPS = ("generator", "generator_ema", "critic", "generator_lora", "critic_lora", "model")
_TRAINING_STATE = ("step", "optimizer", "scheduler", "epoch", "iteration", "rng")
_ZIP_MAGIC = b"PK\x03\x04"
_MAX_DEPTH = 4  # of dictionaries inside training state


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still in its file.

    Attributes:
      name: its name there, for error messages.
      spec: shape and dtype.
      read: reads it into memory of its own.
    """

    name: str
    spec: Spec
    read: Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Group:
    """A flat set of tensors: a file, the shards of one model, or one entry of a PyTorch file.

    Attributes:
      path: the file (of shards: the index).
      key: the entry inside the file, or None.
      tensors: by name, the names of parallel and compiled wrappers removed.
      step: the training step that a PyTorch file names.
      export: what our export wrote into a PyTorch file, not checked yet; see `carried`.
    """

    path: pathlib.Path
    key: str | None
    tensors: Mapping[str, LazyTensor]
    step: int | None = None
    export: Mapping[str, Any] | None = None

    @property
    def origin(self) -> str:
        return f"{self.path}:{self.key}" if self.key else str(self.path)


def read_groups(path: pathlib.Path) -> tuple[list[Group], list[LeftOut]]:
    """Reads what a file holds, by its content and not by its name; no tensor data is read.

    Args:
      path: a safetensors file, a file written by `torch.save`, or the JSON index of sharded ones.

    Returns:
      The groups of weights, and what the file holds besides.

    Raises:
      UserError: the file is damaged, hostile, or none of these.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if start.startswith(_ZIP_MAGIC):
        return _split(path, _load_torch(path, mapped=True), mapped=True)
    if start[:1] == b"\x80":
        return _split(path, _load_torch(path, mapped=False), mapped=False)
    if start[8:9] == b"{":
        return [_safetensors(path)], []
    if start.lstrip()[:1] == b"{":
        return _sharded(path)
    raise UserError(f"{path}: neither a safetensors file nor a PyTorch file (it may be truncated)")


def is_tensor_file(path: pathlib.Path) -> bool:
    """Whether the file's name is one that tensor files carry (in folders, other files are passed over)."""
    return path.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt") or is_index(path)


def is_index(path: pathlib.Path) -> bool:
    """Whether the file's name is that of an index of shards."""
    return path.name.endswith((".safetensors.index.json", ".bin.index.json"))


def shards(index: pathlib.Path) -> list[pathlib.Path]:
    """The files an index names, all beside it.

    Raises:
      UserError: the index is malformed, points outside its folder, or a shard is missing.
    """
    weight_map = _weight_map(index)
    files = []
    for name in sorted(set(weight_map.values())):
        require(
            pathlib.PurePosixPath(name).name == name and "\\" not in name and name not in (".", ".."),
            f"{index}: names the file {name!r} outside its own folder; refused",
        )
        require((index.parent / name).is_file(), f"{index}: the shard {name} is missing; download it")
        files.append(index.parent / name)
    return files


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    weight_map = storage.read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise UserError(f"{index}: has no weight_map from tensor names to files")
    return weight_map


def _sharded(index: pathlib.Path) -> tuple[list[Group], list[LeftOut]]:
    tensors: dict[str, LazyTensor] = {}
    for shard in shards(index):
        groups, _ = read_groups(shard)
        require(len(groups) == 1, f"{shard}: a shard must be one flat set of tensors")
        for name, tensor in groups[0].tensors.items():
            require(name not in tensors, f"{shard}: {tensor.name} is in another shard as well")
            tensors[name] = tensor
    announced = {_WRAPPERS.sub("", name) for name in _weight_map(index)}
    missing, extra = sorted(announced - set(tensors)), sorted(set(tensors) - announced)
    require(not missing, f"{index}: names tensors that its shards lack: {name_some(missing)}")
    require(not extra, f"{index}: its shards hold tensors that it does not name: {name_some(extra)}")
    return [Group(index, None, tensors)], []


def _safetensors(path: pathlib.Path) -> Group:
    file = storage.open_tensors(path)
    lazy = {
        name: LazyTensor(name, spec, functools.partial(file.read, name)) for name, spec in file.specs.items()
    }
    return Group(path, None, _cleaned(path, lazy))


def _cleaned(path: pathlib.Path, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Removes wrapper names; two tensors must not become one."""
    cleaned: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        clean = _WRAPPERS.sub("", name)
        if clean in cleaned:
            raise UserError(f"{path}: {cleaned[clean].name} and {name} are the same tensor")
        if tensor.spec.dtype not in FLOAT_DTYPES:
            raise UserError(
                f"{path}: {name} has dtype {tensor.spec.dtype}; float32, float16 or bfloat16 is read"
            )
        cleaned[clean] = tensor
    return cleaned


# --- PyTorch files --------------------------------------------------------------------------------


def import_torch(path: pathlib.Path) -> Any:
    """Imports torch, or says how to get it."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: PyTorch files need torch; install it with `pip install longlive-jax[convert]`"
        ) from error
    return torch


def _load_torch(path: pathlib.Path, *, mapped: bool) -> Any:
    """Loads a PyTorch file without executing it; `mapped` leaves the tensors in the file.

    Files of the format before PyTorch 1.6 cannot be mapped and are read whole.
    """
    torch = import_torch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        detail = f" ({blocked.group(1)})" if blocked else ""
        raise UserError(
            f"{path}: refused, its pickle asks for more than tensors{detail}; save the weights alone"
        ) from error
    except Exception as error:  # whatever else a damaged file makes the loader raise
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: damaged or truncated PyTorch file ({reason}); download it again") from error


def _split(path: pathlib.Path, value: Any, *, mapped: bool) -> tuple[list[Group], list[LeftOut]]:
    """Separates the weights in a loaded PyTorch file from everything else in it."""
    torch = import_torch(path)
    require(
        isinstance(value, Mapping), f"{path}: holds a {type(value).__name__}, not a dictionary of tensors"
    )
    flat = {str(name): item for name, item in value.items() if isinstance(item, torch.Tensor)}
    step = value.get("step") if type(value.get("step")) is int else None
    export = value.get(carried.ENTRY)
    require(
        export is None or (isinstance(export, Mapping) and not _holds_tensors(export, torch)),
        f"{path}: the entry {carried.ENTRY!r} is not what `longlive export` writes; remove it",
    )
    groups, left_out = [], []
    if flat:
        groups.append(Group(path, None, _lazy(path, flat, mapped=mapped), step, export))
    for name, item in value.items():
        if name in flat or name == carried.ENTRY:
            continue
        if name in _WEIGHT_GROUPS and isinstance(item, Mapping):
            strangers = [str(k) for k, v in item.items() if not isinstance(v, torch.Tensor)]
            require(
                not strangers, f"{path}: {name} holds something other than tensors: {name_some(strangers)}"
            )
            tensors = _lazy(path, dict(item), mapped=mapped)
            groups.append(Group(path, str(name), tensors, step, export))
        elif any(word in str(name) for word in _TRAINING_STATE):
            left_out.append(LeftOut(f"{path.name}:{name}", "training state"))
        elif _holds_tensors(item, torch):
            raise UserError(
                f"{path}: the entry {name!r} is not one that is known; known are {', '.join(_WEIGHT_GROUPS)}"
            )
        else:
            left_out.append(LeftOut(f"{path.name}:{name}", f"a {type(item).__name__}, not weights"))
    require(len(groups) > 0, f"{path}: holds no weights ({name_some(map(str, value)) or 'it is empty'})")
    return groups, left_out


def _holds_tensors(item: Any, torch: Any, depth: int = 0) -> bool:
    if isinstance(item, torch.Tensor):
        return True
    children = item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
    return depth < _MAX_DEPTH and any(_holds_tensors(child, torch, depth + 1) for child in children)


def _lazy(path: pathlib.Path, tensors: Mapping[str, Any], *, mapped: bool) -> dict[str, LazyTensor]:
    torch = import_torch(path)
    lazy = {}
    for name, tensor in tensors.items():
        dtype = _numpy_dtype(tensor)
        if dtype is None or tensor.layout != torch.strided:
            raise UserError(f"{path}: {name} is {tensor.dtype}; dense float32, float16 or bfloat16 is read")
        # A view with strides of zero can announce terabytes that the file does not hold.
        require(
            tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes(),
            f"{path}: {name} has shape {tuple(tensor.shape)}, more than its data; save it without views",
        )
        read = functools.partial(_read_torch, tensor, dtype, mapped=mapped)
        lazy[str(name)] = LazyTensor(str(name), Spec(tuple(tensor.shape), dtype), read)
    return _cleaned(path, lazy)


def _numpy_dtype(tensor: Any) -> np.dtype | None:
    return {f"torch.{dtype}": dtype for dtype in FLOAT_DTYPES}.get(str(tensor.dtype))


def _read_torch(tensor: Any, dtype: np.dtype, *, mapped: bool) -> np.ndarray:
    """Copies a tensor out of the file; the pages of a mapped file go back to the system."""
    import torch

    # numpy has no bfloat16 that torch knows: hand the bits over as integers.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    array = np.array(tensor.detach().contiguous().view(bits).numpy()).view(dtype)
    if mapped and tensor.is_contiguous():
        _release(tensor.data_ptr(), array.nbytes)
    return array


def _release(address: int, size: int) -> None:
    """Drops mapped pages, so that one tensor at a time counts as memory and not the whole file.

    The mapping is private and nobody writes to it: a page that is needed again is read again.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    start = address - address % mmap.PAGESIZE
    length = ctypes.c_size_t(address + size - start)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(start), length, mmap.MADV_DONTNEED)
