"""Files that hold data only: safetensors read lazily and written as a stream, published atomically.

Reading maps or reads one tensor (or one layer of it) at a time, after the header has been checked
against the file's size. Writing appends one piece after the other, so memory stays at one piece
however large the file. Nothing appears under its final name before it is complete and on the disk.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import pathlib
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, TypeAlias

import jax
import ml_dtypes
import numpy as np

from longlive_jax.errors import UserError, require

PathLike: TypeAlias = str | os.PathLike[str]
Spec: TypeAlias = jax.ShapeDtypeStruct
"""Shape and dtype of a tensor that is not in memory."""

_DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES: Mapping[np.dtype, str] = {dtype: code for code, dtype in _DTYPES.items()}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_ALIGNMENT = 64  # the data starts on a cache line, so that mapped arrays can be used in place


# --- reading --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been read and checked; tensors are read on demand.

    Attributes:
      path: the file.
      specs: shape and dtype of every tensor, in file order.
      metadata: the header's free text entries.
      offsets: position of every tensor's first byte in the file.
    """

    path: pathlib.Path
    specs: Mapping[str, Spec]
    metadata: Mapping[str, str]
    offsets: Mapping[str, int]

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Reads one tensor into memory of its own.

        Args:
          name: the tensor.
          index: with a number, only this entry of the leading axis is read.
        """
        spec, offset = self.specs[name], self.offsets[name]
        shape = spec.shape
        if index is not None:
            shape = shape[1:]
            offset += index * math.prod(shape) * spec.dtype.itemsize
        try:
            array = np.fromfile(self.path, dtype=spec.dtype, count=math.prod(shape), offset=offset)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from error
        if array.size != math.prod(shape):
            raise UserError(f"{self.path}: became shorter while it was read; write or download it again")
        return array.reshape(shape)

    def map(self, name: str) -> np.ndarray:
        """One tensor as a read-only view of the mapped file: pages are read when they are touched."""
        spec = self.specs[name]
        if spec.size == 0:
            return np.zeros(spec.shape, spec.dtype)
        array = np.memmap(self.path, dtype=spec.dtype, mode="r", offset=self.offsets[name], shape=spec.shape)
        return array.view(np.ndarray)


def open_tensors(path: PathLike) -> TensorFile:
    """Opens a safetensors file and checks its header against the size of the file.

    Raises:
      UserError: the file cannot be read, is truncated, or its header contradicts itself.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (header_bytes,) = struct.unpack("<Q", file.read(8)) if size >= 8 else (0,)
            if not 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES):
                raise UserError(f"{path}: not a complete safetensors file ({size} bytes); download it again")
            text = file.read(header_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        start = 8 + header_bytes
        specs, offsets = _layout(header, start=start, data_bytes=size - start)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: bad safetensors header ({error}); download it again") from error
    return TensorFile(path, specs, {str(k): str(v) for k, v in metadata.items()}, offsets)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _layout(
    header: Mapping[str, Any], *, start: int, data_bytes: int
) -> tuple[dict[str, Spec], dict[str, int]]:
    """Checks that the tensors tile the data exactly: no overlap, no hole, nothing outside."""
    specs, offsets, position = {}, {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        if not all(type(n) is int and n >= 0 for n in (*shape, *entry["data_offsets"])):
            raise ValueError(f"{name} has the shape {shape} at {entry['data_offsets']}")
        begin, end = entry["data_offsets"]
        if begin != position or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} occupies bytes {begin} to {end}, its shape {shape} says otherwise")
        specs[name], offsets[name], position = Spec(shape, dtype), start + begin, end
    if position != data_bytes:
        raise ValueError(f"{data_bytes} bytes of data where the header announces {position}")
    return specs, offsets


# --- writing --------------------------------------------------------------------------------------


def write_tensors(
    path: PathLike,
    specs: Mapping[str, Spec],
    pieces: Iterable[tuple[str, np.ndarray]],
    *,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Writes a safetensors file piece by piece; memory stays at one piece.

    Args:
      path: the file; it appears only when it is complete and on the disk.
      specs: shape and dtype of every tensor, in the order they are written.
      pieces: (name, array) in the order of `specs`. Consecutive pieces of one name are the slices of
        its leading axes, so a layer-stacked tensor can come layer by layer.
      metadata: free text entries for the header.

    Returns:
      The hexadecimal BLAKE2b digest (128 bits) of the whole file.

    Raises:
      UserError: the disk is full or the place cannot be written.
      ValueError: the pieces do not match `specs`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, spec in specs.items():
        end = position + spec_bytes(spec)
        header[name] = {
            "dtype": _CODES[np.dtype(spec.dtype)], "shape": list(spec.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.blake2b(digest_size=16)
    with new_file(path) as temporary, temporary.open("wb") as file:
        start = memoryview(struct.pack("<Q", len(text)) + text)
        for block in itertools.chain([start], _checked_blocks(specs, pieces)):
            digest.update(block)
            write_bytes(file, block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_bytes(file: BinaryIO, block: bytes | memoryview) -> None:
    """The single place where tensor bytes reach a file (tests simulate a full disk here)."""
    file.write(block)


def _checked_blocks(
    specs: Mapping[str, Spec], pieces: Iterable[tuple[str, np.ndarray]]
) -> Iterator[memoryview]:
    names = iter(specs)
    current, missing = "", 0
    for name, array in pieces:
        while missing == 0 and name != current:
            current = next(names, "")
            if not current:
                raise ValueError(f"{name} was not announced, or comes out of order")
            missing = spec_bytes(specs[current])
        if name != current or array.dtype != specs[name].dtype or array.nbytes > missing:
            raise ValueError(
                f"{name}: {array.dtype}{array.shape} does not continue {current} {specs[current]}"
            )
        missing -= array.nbytes
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    if missing or any(spec_bytes(specs[name]) for name in names):
        raise ValueError("fewer pieces than announced")


def spec_bytes(spec: Spec) -> int:
    """Bytes a tensor occupies in a file."""
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize


# --- publishing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path: PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`; the file takes its final name if the body succeeds.

    The body must flush what it writes; an existing file is replaced in one step.

    Raises:
      UserError: the disk is full or the place cannot be written.
    """
    path = pathlib.Path(path)
    temporary = _temporary_name(path)
    try:
        with _writing(path):
            yield temporary
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it is gone after a success, or was never made
            temporary.unlink()


@contextlib.contextmanager
def new_folder(
    path: PathLike, *, overwrite: bool, replaceable: Callable[[pathlib.Path], bool]
) -> Iterator[pathlib.Path]:
    """Yields a temporary folder beside `path`; it takes the final name if the body succeeds.

    An existing folder stays as it is until then. Replacing it takes two renames, the closest the
    operating system offers everywhere; if the second one fails the first is undone.

    Args:
      path: the folder to make.
      overwrite: whether an existing folder may be replaced.
      replaceable: says whether an existing folder is one of ours (others are never removed).

    Raises:
      UserError: the folder exists, the disk is full, or the place cannot be written.
    """
    path = pathlib.Path(os.path.abspath(path))
    check_destination(path, overwrite=overwrite, replaceable=replaceable)
    temporary, old = _temporary_name(path), _temporary_name(path)
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            if path.exists():
                os.rename(path, old)
            try:
                os.rename(temporary, path)
            except OSError:
                if old.exists():
                    os.rename(old, path)
                raise
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_destination(
    path: pathlib.Path, *, overwrite: bool, replaceable: Callable[[pathlib.Path], bool]
) -> None:
    """Refuses a destination that exists, unless it may be replaced."""
    if not os.path.lexists(path):
        return
    require(overwrite, f"{path} exists already; choose another place or ask to overwrite it")
    require(
        path.is_dir() and not path.is_symlink() and (replaceable(path) or not any(path.iterdir())),
        f"{path} exists and was not written by longlive-jax, so it is not replaced; remove it yourself",
    )


def check_space(folder: PathLike, needed: int) -> None:
    """Refuses to start writing `needed` bytes where the disk has less left."""
    folder = pathlib.Path(os.path.abspath(folder))
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    require(
        free >= needed,
        f"{folder} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are needed; free some space",
    )


def read_json(path: PathLike) -> dict[str, Any]:
    """Reads a JSON object, with one clear line for anything else."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    require(isinstance(value, dict), f"{path}: must hold a JSON object")
    return value


def write_json(path: PathLike, value: Mapping[str, Any]) -> None:
    """Writes a JSON object that appears complete or not at all."""
    with new_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno == errno.ENOSPC else "choose another place"
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from error


def _temporary_name(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


def _sync_folder(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_file(source: PathLike, destination: PathLike) -> None:
    """Copies a file that appears complete or not at all."""
    with new_file(destination) as temporary:
        shutil.copyfile(source, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
