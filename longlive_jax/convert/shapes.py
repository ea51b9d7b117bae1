"""The parameter trees that the models expect, as shapes.

Tracing a model for its shapes alone costs a second or two of every start, so they are remembered in the
user's cache folder, under a key that stands for the model's config and for the code that makes the shapes.
"""

import contextlib
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping

import flax
import jax

from longlive_jax import lora, storage, user_cache
from longlive_jax.checkpoint import flatten, unflatten
from longlive_jax.config import PipelineConfig
from longlive_jax.config_dict import to_dict
from longlive_jax.models import text_encoder, transformer, vae_families
from longlive_jax.storage import Spec
from longlive_jax.types import Params


def expected(part: str, config: PipelineConfig) -> dict[str, Spec]:
    """Shapes of the leaves of one part, by path; for LoRAs see `lora.init`.

    Args:
      part: a full part of `longlive_jax.checkpoint.PARTS`.
      config: the model's config.
    """
    return flatten(expected_tree(part, config))


def expected_tree(part: str, config: PipelineConfig) -> Params:
    """Like `expected`, as a nested dict."""
    file = user_cache.user_cache_dir() / "shapes" / f"{_key(part, config)}.json"
    # What cannot be read, or written, is traced: the folder may be another user's, or a file half a file.
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        stored = json.loads(file.read_text())
        specs = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (shape, dtype) in stored.items()}
        return unflatten(specs)
    tree = _traced(part, config)
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        leaves = flatten(tree)
        storage.write_json(file, {name: [leaf.shape, str(leaf.dtype)] for name, leaf in leaves.items()})
    return tree


def _key(part: str, config: PipelineConfig) -> str:
    section = {"vae": "vae", "text_encoder": "text_encoder"}.get(part, "transformer")
    content = [part, to_dict(getattr(config, section)), flax.__version__, _code()]
    return f"{part}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}"


@functools.cache
def _code() -> str:
    """Fingerprint of the modules that decide the shapes."""
    files = sorted(pathlib.Path(transformer.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _traced(part: str, config: PipelineConfig) -> Params:
    key = jax.eval_shape(jax.random.key, 0)  # a shape too: nothing here runs on a device
    if part == "text_encoder":
        module = text_encoder.TextEncoder(config.text_encoder)
        ids = jax.ShapeDtypeStruct((1, 1), "int32")
        return jax.eval_shape(module.init, key, ids)["params"]
    if part == "vae":
        autoencoder = vae_families.make(config.vae)
        return jax.eval_shape(functools.partial(vae_families.init_params, autoencoder), key)
    if part in ("transformer", "transformer_ema", "critic"):
        model = transformer.Transformer(config.transformer)
        return jax.eval_shape(functools.partial(transformer.init_params, model), key)
    raise ValueError(f"{part} has no fixed shapes")


def expected_lora(config: PipelineConfig, *, rank: int, targets: tuple[str, ...]) -> Mapping[str, Spec]:
    """Shapes of a LoRA of the given rank on the given layers."""
    params = expected_tree("transformer", config)
    init = functools.partial(lora.init, params=params, rank=rank, targets=targets)
    return flatten(jax.eval_shape(init, jax.eval_shape(jax.random.key, 0)))
