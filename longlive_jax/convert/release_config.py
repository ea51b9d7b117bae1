"""The release's YAML configs in our terms, field by field.

`FIELDS` says of every field what it is here; a field or a value that it does not know is named, not guessed.
Upstream: `configs/*.yaml` of LongLive v1.0, where `default_config.yaml` is merged below every other file.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from longlive_jax.config import preset
from longlive_jax.config_dict import override
from longlive_jax.config_module import flatten, public_module
from longlive_jax.errors import UserError, require
from longlive_jax.inference.generation import Generation
from longlive_jax.training.config import InitTraining, LongTraining, PromptsConfig, RunConfig, Training
from longlive_jax.training.paper import EVALUATION, MESH, SCORES, optimizer

Convert = Callable[[Any, Mapping[str, Any]], Any]
"""A field's value, beside all fields of the file, in our terms."""

CHECKPOINT = "checkpoints/longlive-1.3b"

DEFAULTS: Mapping[str, Any] = {
    "warp_denoising_step": False,
    "weight_decay": 0.01,
    "num_training_frames": 21,
    "context_noise": 0,
}
"""What the release's default_config.yaml says where a file is silent, of what matters here."""


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field of the release is here.

    Attributes:
      targets: dotted names of our settings; none for a field without a counterpart.
      note: what became of it, where that is not plain from the names.
      only: the values that can be translated; empty is all.
      convert: to our value.
    """

    targets: tuple[str, ...] = ()
    note: str = ""
    only: tuple[Any, ...] = ()
    convert: Convert = lambda value, every: value


def _to(*targets: str, convert: Callable[[Any], Any] = lambda value: value, note: str = "") -> Field:
    return Field(targets, note, convert=lambda value, every: convert(value))


def _fixed(*values: Any, note: str) -> Field:
    return Field((), note, values)


def _integers(value: Any) -> tuple[int, ...]:
    """A YAML list, or numbers in text with commas between them."""
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(int(part) for part in parts)


def _checkpoint(value: Any) -> str:
    """A file of weights as the directory it is converted to."""
    return str(pathlib.PurePosixPath(str(value)).with_suffix(""))


def _updates(value: Any, every: Mapping[str, Any]) -> int:
    """Iterations, of which one in so many updates the generator, as updates of the generator."""
    return int(value) // int(every.get("dfake_gen_update_ratio", 1))


_ELSEWHERE = "the command's --out"
_SOURCE = "a source of `longlive convert`, which makes `checkpoint`"

COMMON: Mapping[str, Field] = {
    "denoising_step_list": _to("sampler.steps", convert=_integers),
    "warp_denoising_step": _to("sampler.warp_steps"),
    "num_frame_per_block": _to("window.block_frames"),
    "model_kwargs.local_attn_size": _to("window.window_frames"),
    "model_kwargs.sink_size": _to("window.sink_frames"),
    "model_kwargs.timestep_shift": _to("sampler.shift", convert=float),
    "context_noise": _to("sampler.context_noise", convert=float),
    "height": _to("video.height"),
    "width": _to("video.width"),
    "seed": _to("seed"),
    "independent_first_frame": _fixed(False, note="the models here generate whole blocks"),
    "i2v": _fixed(False, note="text to video only"),
    "causal": _fixed(True, note="the student is causal"),
    "same_step_across_blocks": _to("rollout.is_exit_shared"),
    "last_step_only": _fixed(False, note="the step that carries the gradient is drawn"),
    "adapter.type": _fixed("lora", note="the only kind"),
    "adapter.dropout": _fixed(0.0, 0, note="the LoRA has no dropout"),
    "adapter.dtype": Field(note="parameters that are trained are float32"),
    "adapter.verbose": Field(note="no counterpart"),
}

GENERATION: Mapping[str, Field] = {
    **COMMON,
    "model_name": _fixed("Wan2.1-T2V-1.3B", note="the checkpoint says it"),
    "model_kwargs.use_infinite_attention": _to(
        "window.rope", convert=lambda value: "relative" if value else "absolute"
    ),
    "data_path": _to("prompts"),
    "prompt_path": _to("prompts"),
    "prompt_name": Field(note="the prompt file says it"),
    "output_folder": Field(note=_ELSEWHERE),
    "save_with_index": Field(note=_ELSEWHERE),
    "inference_iter": _fixed(-1, note="all prompts of the file; cut the file for fewer"),
    "num_output_frames": _to("frames"),
    "num_frames": Field(
        ("frames",), "video frames, 4 (F - 1) + 1", convert=lambda value, every: (int(value) - 1) // 4 + 1
    ),
    "use_ema": _to("weights", convert=lambda value: "transformer_ema" if value else "transformer"),
    "num_samples": _fixed(1, note="one video per prompt; run again with another --seed"),
    "global_sink": _to("switch.keep_sink"),
    "switch_frame_indices": _to("switch_frames", convert=_integers),
    "generator_ckpt": Field(note=_SOURCE),
    "lora_ckpt": Field(note=_SOURCE),
    "adapter.rank": Field(note="the checkpoint says it"),
    "adapter.alpha": Field(note="the checkpoint says it"),
    "same_step_across_blocks": Field(note="training only"),
    "weight_decay": Field(note="training only"),
    "discriminator_lr_multiplier": Field(note="training only, and unused there"),
    "num_training_frames": Field(note="training only"),
    "max_iters": Field(note="training only"),
    "gc_interval": Field(note="no counterpart: nothing has to be collected"),
    "ckpt_step": Field(note="no counterpart: `checkpoint` is a directory"),
    "eval_first_n": Field(note="no counterpart: cut the prompt file"),
}
"""The fields of a config of generation."""

TRAINING: Mapping[str, Field] = {
    **COMMON,
    "seed": _to("run.seed"),
    "generator_ckpt": _to("base", convert=_checkpoint, note="convert it first: a directory of this name"),
    "generator_fsdp_wrap_strategy": Field(note="`mesh` says how weights are split"),
    "real_score_fsdp_wrap_strategy": Field(note="`mesh` says how weights are split"),
    "fake_score_fsdp_wrap_strategy": Field(note="`mesh` says how weights are split"),
    "text_encoder_fsdp_wrap_strategy": Field(note="prompts are encoded once, before training"),
    "sharding_strategy": Field(note="`mesh` says how weights are split"),
    "real_name": Field(
        ("scores.teacher_preset", "scores.teacher"),
        "a directory of `longlive convert`",
        ("Wan2.1-T2V-14B", "Wan2.1-T2V-1.3B"),
    ),
    "fake_name": _fixed("Wan2.1-T2V-1.3B", note="scores.critic, in the student's shape"),
    "ts_schedule": _fixed(False, note="timesteps are drawn over the whole range"),
    "num_train_timestep": _fixed(1000, note="the schedule has 1000"),
    "timestep_shift": _to("dmd.shift", convert=float),
    "guidance_scale": _to("dmd.guidance", convert=float, note="cond + g (cond - uncond), as there"),
    "denoising_loss_type": _fixed("flow", note="the critic's loss"),
    "mixed_precision": _to("scores.dtype", convert=lambda value: "bfloat16" if value else "float32"),
    "wandb_key": Field(note="metrics go to files and TensorBoard"),
    "wandb_entity": Field(note="metrics go to files and TensorBoard"),
    "wandb_project": Field(note="metrics go to files and TensorBoard"),
    "lr": _to("optimizer.learning_rate", convert=float),
    "lr_critic": _to("critic_optimizer.learning_rate", convert=float),
    "beta1": Field(
        ("optimizer.betas",), "with beta2", convert=lambda value, every: (float(value), float(every["beta2"]))
    ),
    "beta2": Field(note="with beta1"),
    "beta1_critic": Field(
        ("critic_optimizer.betas",),
        "with beta2_critic",
        convert=lambda value, every: (float(value), float(every["beta2_critic"])),
    ),
    "beta2_critic": Field(note="with beta1_critic"),
    "weight_decay": _to("optimizer.weight_decay", "critic_optimizer.weight_decay", convert=float),
    "data_path": _to("data.prompts"),
    "switch_prompt_path": _to("data.switch_prompts"),
    "batch_size": _fixed(1, note="per device there; data.batch_size counts all"),
    "total_batch_size": _to("data.batch_size"),
    "gradient_accumulation_steps": _to("run.micro_batches"),
    "ema_weight": _to("optimizer.ema_decay", convert=float),
    "ema_start_step": Field(("optimizer.ema_start",), "updates of the generator", convert=_updates),
    "log_iters": _to("run.checkpoint_every"),
    "max_checkpoints": _to("run.keep"),
    "max_iters": _to("run.steps"),
    "negative_prompt": _to("scores.negative_prompt"),
    "dfake_gen_update_ratio": _to("scores.critic_updates"),
    "image_or_video_shape": Field(
        ("video.height", "video.width"),
        "rows and columns of latents times 8",
        convert=lambda value, every: (8 * int(value[3]), 8 * int(value[4])),
    ),
    "distribution_loss": _fixed("dmd", "dmd_switch", note="the stage: init, or long with switches"),
    "trainer": _fixed("score_distillation", note="the stages init and long"),
    "gradient_checkpointing": _to("remat", convert=lambda value: "full" if value else "none"),
    "load_raw_video": _fixed(False, note="prompts only"),
    "vis_interval": _to("run.eval_every"),
    "vis_ema": Field(note="the average is evaluated where there is one"),
    "vis_video_lengths": _to("evaluation.frames", convert=lambda value: int(value[0]), note="the first"),
    "val_batch_size": _to("evaluation.batch_size"),
    "val_data_path": Field(note="evaluations take prompts of their own"),
    "val_switch_prompt_path": Field(note="evaluations take prompts of their own"),
    "min_num_training_frames": _fixed(21, note="clips have one length"),
    "num_training_frames": _to("rollout.clip_frames"),
    "slice_last_frames": _fixed(21, note="the teacher sees clips of rollout.clip_frames"),
    "global_sink": _to("streaming.keep_sink"),
    "switch_mode": _fixed("random_choice", note="a frame of streaming.switch_frames"),
    "switch_choices": _to("streaming.switch_frames", convert=_integers),
    "streaming_training": _fixed(True, note="the stage long"),
    "streaming_chunk_size": _to("rollout.clip_frames"),
    "streaming_max_length": _to("streaming.sequence_frames"),
    "streaming_min_new_frame": _to("streaming.new_frames", convert=lambda value: (int(value),)),
    "train_first_chunk": _fixed(True, note="every clip of a sequence is trained on"),
    "adapter.rank": _to("lora.rank"),
    "adapter.alpha": _to("lora.alpha", convert=float),
    "adapter.apply_to_critic": _to("lora.is_critic_adapted"),
    "discriminator_lr_multiplier": Field(note="unused there"),
    "gc_interval": Field(note="no counterpart: nothing has to be collected"),
}
"""The fields of a config of training."""

_TEACHERS = {
    "Wan2.1-T2V-14B": ("wan_14b", "checkpoints/wan2.1-t2v-14b"),
    "Wan2.1-T2V-1.3B": ("", "checkpoints/wan2.1-t2v-1.3b"),
}
_MODEL_SECTIONS = ("sampler", "window", "switch", "video")


def read_yaml(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a YAML file that holds a table.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    import yaml

    try:
        values = yaml.safe_load(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a YAML file ({reason})") from error
    require(isinstance(values, dict) and bool(values), f"{path}: must hold a table of settings")
    return dict(values)


@dataclasses.dataclass(frozen=True)
class Translation:
    """A release config in our terms.

    Attributes:
      config: ours.
      problems: what could not be translated, one line each.
      left_out: fields without a counterpart, and why none is needed.
    """

    config: Generation | Training
    problems: tuple[str, ...]
    left_out: Mapping[str, str]


def translate(values: Mapping[str, Any]) -> Translation:
    """Translates the fields of a release YAML.

    Args:
      values: the file's content.

    Raises:
      UserError: a value does not fit our settings.
    """
    flat = flatten(values)
    is_training = "trainer" in flat or "distribution_loss" in flat
    fields = TRAINING if is_training else GENERATION
    given = {**{k: v for k, v in DEFAULTS.items() if k in fields}, **flat}
    settings: dict[str, Any] = {}
    problems, left_out = [], {}
    for name, value in given.items():
        field = fields.get(name)
        if field is None:
            problems.append(f"{name}={value!r} is not a field we know")
        elif field.only and value not in field.only:
            allowed = " or ".join(map(repr, field.only))
            problems.append(f"{name}={value!r} must be {allowed} ({field.note})")
        elif field.targets:
            settings |= _settings(name, field, value, given)
        elif name in flat and not field.only:
            left_out[name] = field.note
    make = _training if is_training else _generation
    return Translation(make(settings, flat), tuple(problems), left_out)


def _settings(name: str, field: Field, value: Any, every: Mapping[str, Any]) -> dict[str, Any]:
    """Our settings that one field stands for."""
    try:
        result = _TEACHERS[value] if name == "real_name" else field.convert(value, every)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{name}={value!r} cannot be read ({type(error).__name__}: {error})") from error
    if len(field.targets) == 1 or not isinstance(result, tuple):
        return dict.fromkeys(field.targets, result)
    return dict(zip(field.targets, result, strict=True))


def _generation(settings: Mapping[str, Any], flat: Mapping[str, Any]) -> Generation:
    own = {field.name for field in dataclasses.fields(Generation)}
    model = {name: value for name, value in settings.items() if name not in own}
    values = {"frames": 21, "prompts": "prompts.txt", **{k: v for k, v in settings.items() if k in own}}
    return Generation(checkpoint=CHECKPOINT, settings=model, **values)


def _training(settings: Mapping[str, Any], flat: Mapping[str, Any]) -> Training:
    is_long = bool(flat.get("streaming_training", False))
    stage = "long" if is_long else "init"
    base = {
        "model": preset("wan_1_3b"),
        "run": RunConfig(folder=f"runs/wan/{stage}", steps=1),
        "optimizer": optimizer(1.0),
        "critic_optimizer": optimizer(1.0),
        "data": PromptsConfig(batch_size=64, prompts="prompts.txt", switch_prompts="switch.txt"),
        "scores": dataclasses.replace(SCORES, critic="") if is_long else SCORES,
        "mesh": MESH,
        "evaluation": EVALUATION,
    }
    if not is_long:
        base["data"] = PromptsConfig(batch_size=64, prompts="prompts.txt")
    config: Training = LongTraining(**base) if is_long else InitTraining(**base)  # type: ignore[arg-type]
    changes = {
        f"model.{name}" if name.partition(".")[0] in _MODEL_SECTIONS else name: value
        for name, value in settings.items()
    }
    # Both averages and samplers follow the student's; a stage without streaming has no such section.
    known = {field.name for field in dataclasses.fields(config)}
    return override(config, {name: v for name, v in changes.items() if name.partition(".")[0] in known})


# --- as a Python file -------------------------------------------------------------------------------


def to_source(config: Generation | Training, *, title: str) -> str:
    """The Python text of a config file; running it gives the config again.

    Args:
      config: what `get_config()` returns.
      title: the first line of the file's docstring.
    """
    names: set[tuple[str, str]] = set()
    value = _source(config, names, indent=4)
    command = "generate --config" if isinstance(config, Generation) else "train"
    imports = "\n".join(f"from {module} import {name}" for module, name in sorted(names))
    kind = type(config).__name__
    return (
        f'"""{title}\n\n    longlive {command} THIS_FILE.py\n"""\n\n{imports}\n\n\n'
        f"def get_config() -> {kind}:\n    return {value}\n"
    )


def _source(value: Any, names: set[tuple[str, str]], *, indent: int) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if value == preset("wan_1_3b"):
            names.add(("longlive_jax.config", "preset"))
            return 'preset("wan_1_3b")'
        if type(value).__name__ == "PipelineConfig":
            return _overridden(value, names, indent=indent)
        names.add((public_module(type(value)), type(value).__name__))
        entries = [
            f"{field.name}={_source(getattr(value, field.name), names, indent=indent + 4)}"
            for field in dataclasses.fields(value)
            if not _is_default(field, getattr(value, field.name))
        ]
        return _call(f"{type(value).__name__}(", entries, ")", indent)
    if isinstance(value, Mapping):
        entries = [f"{name!r}: {_source(one, names, indent=indent + 4)}" for name, one in value.items()]
        return _call("{", entries, "}", indent)
    return repr(value)


def _call(opening: str, entries: list[str], closing: str, indent: int) -> str:
    if not entries:
        return f"{opening}{closing}"
    pad = " " * (indent + 4)
    lines = "".join(f"{pad}{entry},\n" for entry in entries)
    return f"{opening}\n{lines}{' ' * indent}{closing}"


def _is_default(field: Any, value: Any) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(field.default == value)
    return field.default_factory is not dataclasses.MISSING and field.default_factory() == value


def _overridden(config: Any, names: set[tuple[str, str]], *, indent: int) -> str:
    """The preset, and what differs from it."""
    names |= {("longlive_jax.config", "override"), ("longlive_jax.config", "preset")}
    base = flatten(dataclasses.asdict(preset("wan_1_3b")))
    changes = {k: v for k, v in flatten(dataclasses.asdict(config)).items() if base[k] != v}
    table = _source(changes, names, indent=indent)
    return f'override(preset("wan_1_3b"), {table})'
