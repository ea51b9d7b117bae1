"""Prompt embeddings: the text encoder runs first, is freed, and its results are kept on disk.

The encoder is several times larger than the model that makes the video (11 GB against 3 GB in
bfloat16), and its output depends on the prompt alone. So its parameters are loaded only when a
prompt is not in the cache, and let go as soon as the caller says so: after each call of a pipeline, and
when nobody has needed them for a while in a live session, which holds a `PromptSource` open.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from longlive_jax import user_cache
from longlive_jax.errors import UserError
from longlive_jax.models import text_encoder
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.tokenizer import Tokenizer, check_prompts, clean_text
from longlive_jax.types import Array, Params

Device = Literal["default", "cpu"]

CACHE_VARIABLE = user_cache.VARIABLE

_logger = logging.getLogger(__name__)


def default_cache_dir() -> pathlib.Path:
    """The folder `prompts` in the user's cache; see `user_cache`."""
    return user_cache.user_cache_dir() / "prompts"


@dataclasses.dataclass
class _Held:
    """The one mutable part of a `PromptEncoder`: parameters, while they are loaded."""

    params: Params | None = None
    last_used: float = 0.0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


@dataclasses.dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts into embeddings, through a cache of embeddings on disk.

    Use it as a context manager, or call `release`, to free the encoder before the video model
    needs the memory:

        with PromptEncoder(tokenizer, module, load_params, fingerprint=...) as encoder:
            text = encoder.encode(["A red ball rolls down a hill."])

    Prompts are encoded one by one with one compiled program, so a prompt's embedding does not
    depend on which others it was encoded with. A cached embedding is used whichever device made
    it: CPU and GPU agree up to rounding.

    Attributes:
      tokenizer: for the same encoder as `module`.
      module: the text encoder; its `dtype` is that of the embeddings.
      load_params: returns the parameters of `module`, best as host arrays. Called at most once
        between two `release`s, and not at all while every prompt is in the cache.
      fingerprint: identifies the weights and shape of the encoder; another one never sees this
        one's cache entries.
      cache_dir: folder of the cache, made when needed; None keeps nothing on disk.
      device: where the encoder runs: JAX's default device, or the CPU (slow, takes no accelerator memory).
    """

    tokenizer: Tokenizer
    module: TextEncoder
    load_params: Callable[[], Params]
    fingerprint: str
    cache_dir: pathlib.Path | None = dataclasses.field(default_factory=default_cache_dir)
    device: Device = "default"
    _held: _Held = dataclasses.field(default_factory=_Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.tokenizer.config != self.module.config:
            raise ValueError("the tokenizer was built for another TextEncoderConfig than the encoder's")

    def __enter__(self) -> "PromptEncoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Lets the parameters go; the next prompt that is not in the cache loads them again."""
        with self._held.lock:
            self._held.params = None

    def release_idle(self, seconds: float) -> None:
        """Lets the parameters go if no prompt has needed them for `seconds`."""
        with self._held.lock:
            if time.monotonic() - self._held.last_used >= seconds:
                self._held.params = None

    def encode(self, prompts: Sequence[str]) -> Array:
        """Embeds prompts.

        Args:
          prompts: any text, see `Tokenizer`; may be empty, may repeat.

        Returns:
          `[B, M, D]` in the encoder's dtype on the default device, zeros beyond a prompt's tokens.

        Raises:
          UserError: `prompts` is not a list of strings, or `device` does not exist.
        """
        check_prompts(prompts)
        rows = {prompt: self._rows(prompt) for prompt in dict.fromkeys(prompts)}
        shape = (len(prompts), self.tokenizer.text_len, self.module.config.dim)
        embeddings = np.zeros(shape, dtype=jnp.dtype(self.module.dtype))
        for index, prompt in enumerate(prompts):
            embeddings[index, : len(rows[prompt])] = rows[prompt]
        return jnp.asarray(embeddings)

    def _rows(self, prompt: str) -> np.ndarray:
        """The embedding of one prompt without its padding, `[length, D]`."""
        ids, lengths = self.tokenizer([prompt])
        length = int(lengths[0])
        file = self._cache_file(prompt, ids[0, :length])
        shape = (length, self.module.config.dim)
        cached = None if file is None else _read_rows(file, shape=shape, dtype=jnp.dtype(self.module.dtype))
        if cached is not None:
            return cached
        with _running_on(self.device) as device:
            embedded = _embed(self.module, self._params(device), ids, lengths)
        rows = np.asarray(embedded)[0, :length]
        self._held.last_used = time.monotonic()
        if file is not None:
            _write_rows(file, rows)
        return rows

    def _params(self, device: jax.Device | None) -> Params:
        with self._held.lock:
            if self._held.params is None:
                self._held.params = jax.device_put(self.load_params(), device)
            self._held.last_used = time.monotonic()
            return self._held.params

    def _cache_file(self, prompt: str, ids: np.ndarray) -> pathlib.Path | None:
        """Entry named by everything the embedding depends on; the ids stand for the tokenizer."""
        if self.cache_dir is None:
            return None
        content = {
            "text": clean_text(prompt),
            "ids": ids.tolist(),
            "text_len": self.tokenizer.text_len,
            "dtype": jnp.dtype(self.module.dtype).name,
            "encoder": self.fingerprint,
        }
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return pathlib.Path(self.cache_dir) / f"{key}.safetensors"


class PromptSource:
    """One shared `PromptEncoder`, made when it is first needed; call it with prompts.

    The encoder's parameters are let go after every call, so that the video model has the memory, unless
    somebody holds them open. Safe to use from several threads.
    """

    def __init__(self, make: Callable[[], PromptEncoder]) -> None:
        self._make = make
        self._encoder: PromptEncoder | None = None
        self._holders = 0
        self._lock = threading.Lock()

    def __call__(self, prompts: Sequence[str]) -> Array:
        """Embeddings `[B, M, D]`, see `PromptEncoder.encode`."""
        with self._lock:
            if self._encoder is None:
                self._encoder = self._make()
            encoder = self._encoder
        try:
            return encoder.encode(prompts)
        finally:
            with self._lock:
                if not self._holders:
                    encoder.release()

    @contextlib.contextmanager
    def hold_open(self) -> Iterator[None]:
        """Keeps the parameters from the first prompt that needs them until the last holder leaves."""
        with self._lock:
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._encoder is not None and not self._holders:
                    self._encoder.release()

    def release_idle(self, seconds: float) -> None:
        """Lets the parameters go, held or not, if no prompt has needed them for `seconds`."""
        if self._encoder is not None:
            self._encoder.release_idle(seconds)


@functools.partial(jax.jit, static_argnums=0)
def _embed(module: TextEncoder, params: Params, ids: Array, lengths: Array) -> Array:
    return text_encoder.embed(module, params, ids=ids, lengths=lengths)


@contextlib.contextmanager
def _running_on(device: Device) -> Iterator[jax.Device | None]:
    """Makes `device` the default, so that a loader that creates JAX arrays creates them there."""
    if device == "default":
        yield None
        return
    try:
        chosen = jax.local_devices(backend=device)[0]
    except RuntimeError as error:
        raise UserError(f"device={device!r} does not exist here; add it to JAX_PLATFORMS") from error
    with jax.default_device(chosen):
        yield chosen


def _read_rows(file: pathlib.Path, *, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray | None:
    """The rows in `file`, or None where it is absent, damaged or of another shape or dtype."""
    try:
        with safetensors.safe_open(file, framework="numpy") as entry:
            rows, digest = entry.get_tensor("rows"), (entry.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
        _logger.warning("cached prompt %s is unreadable and is computed again: %s", file, error)
        return None
    if (rows.shape, rows.dtype, digest) != (shape, dtype, _digest(rows)):
        _logger.warning("cached prompt %s is damaged and is computed again", file)
        return None
    return rows


def _write_rows(file: pathlib.Path, rows: np.ndarray) -> None:
    """Stores `rows` so that readers see the whole entry or none; a full disk costs only the cache."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        data = safetensors.numpy.save({"rows": np.ascontiguousarray(rows)}, {"sha256": _digest(rows)})
        try:
            temporary.write_bytes(data)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _logger.warning("the prompt cache %s cannot be written: %s", file.parent, error)


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
