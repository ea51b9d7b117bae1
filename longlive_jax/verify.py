"""A checkpoint against numbers that a user recorded from PyTorch: `longlive verify`.

A recording is an `.npz` file. Every case of a component is a group of arrays `component/array`, or
`component:label/array` where a component has several cases. Arrays are in PyTorch's layouts
(channels first), so they can be stored as they are. `COMPONENTS` lists what there is; docs/verify.md
has the whole table and a snippet that records one.
"""

import contextlib
import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint as checkpoint_lib
from longlive_jax import config_dict
from longlive_jax.config import PipelineConfig
from longlive_jax.diffusion import noise as noise_lib
from longlive_jax.errors import UserError, require
from longlive_jax.inference import parts, pipeline, rollout
from longlive_jax.inference.story import effective_frame
from longlive_jax.inference.switching import switch_prompts
from longlive_jax.models import text_encoder as text_encoder_lib
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.quantize import errors as quantize_errors
from longlive_jax.types import Array

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """A value passes when |ours - theirs| <= atol + rtol |theirs|, everywhere."""

    rtol: float
    atol: float


FLOAT32 = Tolerance(rtol=1e-4, atol=2e-5)
"""One forward pass in float32."""
FLOAT32_CHAINED = Tolerance(rtol=1e-4, atol=1e-4)
"""A whole rollout in float32."""
BFLOAT16 = Tolerance(rtol=5e-2, atol=5e-2)
"""One pass in bfloat16, relative to outputs of order one."""
BFLOAT16_CHAINED = Tolerance(rtol=2e-1, atol=2e-1)
"""A whole rollout in bfloat16, or one pass of a quantised transformer."""
QUANTIZED_CHAINED = Tolerance(rtol=5e-1, atol=5e-1)
"""A whole rollout of a quantised transformer, or over a quantised cache."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Result of one case.

    Attributes:
      name: `component` or `component:label`.
      max_error: largest |ours - theirs|.
      mean_error: mean |ours - theirs|.
      scale: mean |theirs|, to judge the errors by.
      tolerance: what it was held against.
      passed: the verdict.
    """

    name: str
    max_error: float
    mean_error: float
    scale: float
    tolerance: Tolerance
    passed: bool


@dataclasses.dataclass(frozen=True)
class Component:
    """One thing that can be verified.

    Attributes:
      required: arrays a case must have.
      optional: arrays it may have.
      expected: the required array that holds PyTorch's result.
      chained: whether errors add up over many passes.
      run: computes our value of `expected`, in its layout.
      about: one line for the documentation.
      quantized: whether a quantised transformer or cache has a part in it.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    expected: str
    chained: bool
    run: Callable[["_Models", Arrays], Array | np.ndarray]
    about: str
    quantized: bool = False


def verify(
    checkpoint: str | os.PathLike[str],
    recording: str | os.PathLike[str],
    *,
    overrides: Mapping[str, Any] | None = None,
    tolerance: Tolerance | None = None,
) -> list[Row]:
    """Runs every case of a recording and compares.

    Args:
      checkpoint: a checkpoint directory.
      recording: the `.npz` file.
      overrides: dotted config names to values; `{"dtype": "float32"}` compares in float32.
      tolerance: for every case; default by the config's dtype and by whether the case is chained.

    Returns:
      A row per case, in the file's order.

    Raises:
      UserError: the file is no recording, or a case does not fit the checkpoint.
    """
    opened = checkpoint_lib.open_checkpoint(checkpoint)
    config = config_dict.override(opened.config, overrides or {})
    cases = read_recording(recording)
    models = _Models(opened, config)
    return [_compare(models, name, arrays, tolerance) for name, arrays in cases.items()]


def verify_layers(
    checkpoint: str | os.PathLike[str],
    reference: str | os.PathLike[str] | None = None,
    *,
    recording: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> quantize_errors.LayerTable:
    """The error of quantisation, linear layer by linear layer and block by block.

    Args:
      checkpoint: a quantised checkpoint, or any with `quantization` among the overrides.
      reference: the checkpoint in full precision that it was made from; None is `checkpoint` itself.
      recording: take the inputs from the first transformer case of this file; default noise.
      overrides: dotted config names to values.

    Raises:
      UserError: nothing is quantised, the reference is, or the two are of different shapes.
    """
    overrides = dict(overrides or {})
    config = config_dict.override(checkpoint_lib.open_checkpoint(checkpoint).config, overrides)
    require(
        config.quantization != "none",
        f"{checkpoint} is not quantised; add --set quantization=int8, or name a quantised checkpoint",
    )
    source = checkpoint_lib.open_checkpoint(checkpoint if reference is None else reference)
    require(
        source.config.quantization == "none",
        f"{source.path} is quantised; name the checkpoint in full precision that it was made from",
    )
    require(
        source.config.transformer == config.transformer,
        f"{source.path} has a transformer of another shape than {checkpoint}",
    )
    inputs = quantize_errors.random_inputs(config.transformer)
    if recording is not None:
        inputs = _recorded_inputs(recording)
    full = pipeline.Pipeline.load(
        source.path, overrides={**overrides, "dtype": config.dtype, "quantization": "none"}
    )
    rounded = pipeline.Pipeline.load(checkpoint, overrides=overrides)
    with pipeline.matmul_precision(config):
        return quantize_errors.layer_table(
            full.transformer, full.params, rounded.params, recipe=config.quantization, inputs=inputs
        )


def _recorded_inputs(recording: str | os.PathLike[str]) -> quantize_errors.Inputs:
    cases = [arrays for name, arrays in read_recording(recording).items() if name.startswith("transformer")]
    require(bool(cases), f"recording={recording} has no transformer case to take inputs from")
    timestep = cases[0]["timestep"].astype(np.float32)
    return quantize_errors.Inputs(
        _channels_last(cases[0]["latents"]).astype(np.float32),
        timestep[:, None] if timestep.ndim == 1 else timestep,
        cases[0]["text"].astype(np.float32),
    )


def read_recording(path: str | os.PathLike[str]) -> dict[str, dict[str, np.ndarray]]:
    """Reads and checks a recording: case name to arrays by name.

    Raises:
      UserError: not an `.npz` file, an unknown component, or arrays missing or unknown.
    """
    path = pathlib.Path(path)
    cases: dict[str, dict[str, np.ndarray]] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in file.files:
                case, _, array = key.rpartition("/")
                cases.setdefault(case, {})[array] = file[key]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"recording={path} cannot be read as .npz ({error}); see docs/verify.md") from error
    require(bool(cases), f"recording={path} holds no arrays; see docs/verify.md for what to store")
    for case, arrays in cases.items():
        component = case.split(":")[0]
        if component not in COMPONENTS:
            known = ", ".join(COMPONENTS)
            raise UserError(f"recording={path}: {case!r} is not a component; choose from {known}")
        spec = COMPONENTS[component]
        missing = [name for name in spec.required if name not in arrays]
        extra = [name for name in arrays if name not in spec.required + spec.optional]
        require(not missing, f"recording={path}: {case} lacks {', '.join(missing)}")
        require(not extra, f"recording={path}: {case} does not know {', '.join(extra)}")
    return cases


def _compare(models: "_Models", name: str, arrays: Arrays, tolerance: Tolerance | None) -> Row:
    component = COMPONENTS[name.split(":")[0]]
    expected = arrays[component.expected].astype(np.float64)
    with models.precision():
        found = np.asarray(component.run(models, arrays)).astype(np.float64)
    require(
        found.shape == expected.shape,
        f"{name}: ours has shape {found.shape}, the recorded {component.expected} {expected.shape}",
    )
    if tolerance is None:
        tolerance = _default_tolerance(models.config, component)
    error = np.abs(found - expected)
    passed = bool((error <= tolerance.atol + tolerance.rtol * np.abs(expected)).all())
    return Row(
        name, float(error.max()), float(error.mean()), float(np.abs(expected).mean()), tolerance, passed
    )


def _default_tolerance(config: PipelineConfig, component: Component) -> Tolerance:
    if component.quantized and (config.quantization, config.cache_dtype) != ("none", "same"):
        return QUANTIZED_CHAINED if component.chained else BFLOAT16_CHAINED
    if config.dtype == "float32":
        return FLOAT32_CHAINED if component.chained else FLOAT32
    return BFLOAT16_CHAINED if component.chained else BFLOAT16


class _Models:
    """The checkpoint's parts, loaded when a case first needs them."""

    def __init__(self, opened: checkpoint_lib.Checkpoint, config: PipelineConfig) -> None:
        self.config = config
        self._opened = opened
        self._pipeline: pipeline.Pipeline | None = None

    def precision(self) -> contextlib.AbstractContextManager[None]:
        return pipeline.matmul_precision(self.config)

    def pipeline(self) -> pipeline.Pipeline:
        if self._pipeline is None:
            fields = dataclasses.fields(self.config)
            overrides = {field.name: getattr(self.config, field.name) for field in fields}
            self._pipeline = pipeline.Pipeline.load(self._opened.path, overrides=overrides)
        return self._pipeline

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(self._opened.tokenizer_path, self.config.text_encoder)

    def embed(self, ids: np.ndarray, lengths: np.ndarray) -> Array:
        module = parts.text_encoder_of(self.config)
        params = self._opened.load("text_encoder", dtype=self.config.dtype)
        return text_encoder_lib.embed(module, params, ids=ids, lengths=lengths)

    def vae(self, method: str, x: np.ndarray) -> Array:
        pipe = self.pipeline()
        if pipe.vae_params is None:
            raise UserError(f"{self._opened.path} has no vae to verify")
        run = jax.jit(lambda params, x: pipe.vae.apply({"params": params}, x, method=method))
        return run(pipe.vae_params, x)


def _tokenize(models: _Models, arrays: Arrays) -> np.ndarray:
    return models.tokenizer()([str(prompt) for prompt in arrays["prompts"]]).ids


def _text_encoder(models: _Models, arrays: Arrays) -> Array:
    mask = arrays["mask"].astype(np.int32)
    return models.embed(arrays["ids"].astype(np.int32), mask.sum(axis=1))


def _transformer(models: _Models, arrays: Arrays) -> Array:
    pipe = models.pipeline()
    latents = _channels_last(arrays["latents"])
    first = int(arrays.get("start_frame", np.zeros((), int)))

    @jax.jit
    def run(params: Any, latents: Array, timestep: Array, text: Array) -> Array:
        context = pipe.transformer.apply({"params": params}, text, method="text_context")
        positions = first + jnp.arange(latents.shape[1], dtype=jnp.int32)
        return pipe.transformer.apply({"params": params}, latents, timestep, context, positions=positions)[0]

    timestep = arrays["timestep"].astype(np.float32)
    timestep = timestep[:, None] if timestep.ndim == 1 else timestep
    velocity = run(pipe.params, latents, timestep, arrays["text"].astype(np.float32))
    return _channels_first(velocity)


def _vae_decode(models: _Models, arrays: Arrays) -> Array:
    return _channels_first(models.vae("decode", _channels_last(arrays["latents"])))


def _vae_encode(models: _Models, arrays: Arrays) -> Array:
    return _channels_first(models.vae("encode", _channels_last(arrays["video"])))


@dataclasses.dataclass(frozen=True, eq=False)
class _RecordedNoise:
    """A rollout's noise from a recording instead of from seeds."""

    initial: np.ndarray  # [B, F, h, w, C]
    fresh: np.ndarray  # [blocks, steps - 1, B, n, h, w, C]

    def __call__(self, seeds: Array, positions: Array, step: Array, shape: tuple[int, int, int]) -> Array:
        block = positions[0] // self.fresh.shape[3]
        again = jnp.asarray(self.fresh)[block, jnp.clip(step - 1, 0, self.fresh.shape[1] - 1)]
        initial = jnp.take(jnp.asarray(self.initial), positions, axis=1)
        return jnp.where(step == noise_lib.INITIAL_STEP, initial, again)


def _rollout(models: _Models, arrays: Arrays) -> Array:
    pipe, config = models.pipeline(), models.config
    block, steps = config.window.block_frames, len(config.sampler.steps)
    initial = _channels_last(arrays["noise"]).astype(np.float32)
    batch, frames = initial.shape[:2]
    fresh = np.moveaxis(arrays["renoise"], -3, -1).astype(np.float32)
    expected = (frames // block, steps - 1, batch, block, *initial.shape[2:])
    require(
        fresh.shape == expected and frames % block == 0,
        f"rollout/renoise has shape {arrays['renoise'].shape}; it must be "
        f"[blocks, steps - 1, B, block, C, h, w] = {(*expected[:4], expected[6], *expected[4:6])}",
    )
    text = arrays["text"].astype(np.float32)  # [segments, B, M, D]
    switches = arrays.get("switch_frames", np.zeros(0, int)).tolist()
    require(
        len(text) == len(switches) + 1,
        f"rollout/text has {len(text)} segments for {len(switches)} switch frames",
    )
    generator = dataclasses.replace(pipe.generator, noise=_RecordedNoise(initial, fresh))
    state = rollout.init(
        generator,
        pipe.params,
        text[0],
        np.zeros(batch, np.uint32),
        latent_size=initial.shape[2:4],
        total_frames=frames,
    )
    starts = {effective_frame(frame, block): segment for segment, frame in enumerate(switches, start=1)}
    latents = []
    for frame in range(0, frames, block):
        if frame in starts:
            due = dict.fromkeys(range(batch), config.switch)
            state = switch_prompts(generator, pipe.params, state, text[starts[frame]], due)
        state, result = rollout.step(generator, pipe.params, state)
        latents.append(result)
    return _channels_first(jnp.concatenate(latents, axis=1))


def _channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def _channels_first(x: Array) -> Array:
    return jnp.moveaxis(x, -1, -3)


COMPONENTS: Mapping[str, Component] = {
    "tokenizer": Component(
        required=("prompts", "ids"),
        optional=(),
        expected="ids",
        chained=False,
        run=_tokenize,
        about="prompts [B] (text) to ids [B, M]",
    ),
    "text_encoder": Component(
        required=("ids", "mask", "embeddings"),
        optional=(),
        expected="embeddings",
        chained=False,
        run=_text_encoder,
        about="ids and mask [B, M] to embeddings [B, M, D], zero beyond the mask",
    ),
    "transformer": Component(
        required=("latents", "timestep", "text", "flow"),
        optional=("start_frame",),
        expected="flow",
        chained=False,
        run=_transformer,
        about="latents [B, F, C, h, w], timestep [B] or [B, F] and text [B, M, D] to flow [B, F, C, h, w], "
        "without a cache",
        quantized=True,
    ),
    "vae_decode": Component(
        required=("latents", "video"),
        optional=(),
        expected="video",
        chained=False,
        run=_vae_decode,
        about="latents [B, F, C, h, w] to video [B, V, 3, Y, X]",
    ),
    "vae_encode": Component(
        required=("video", "latents"),
        optional=(),
        expected="latents",
        chained=False,
        run=_vae_encode,
        about="video [B, V, 3, Y, X] to latents [B, F, C, h, w]",
    ),
    "rollout": Component(
        required=("noise", "renoise", "text", "latents"),
        optional=("switch_frames",),
        expected="latents",
        chained=True,
        run=_rollout,
        about="noise [B, F, C, h, w], renoise [blocks, steps - 1, B, block, C, h, w], "
        "text [segments, B, M, D] and switch_frames [segments - 1] to latents [B, F, C, h, w]",
        quantized=True,
    ),
}
