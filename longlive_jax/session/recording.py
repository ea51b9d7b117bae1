"""The file of a session: what was asked for and when, enough to make the same frames again.

JSON, with nothing in it that is executed. Events stand with the block they took effect at, so a replay
does not depend on how fast the machine is.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import longlive_jax
from longlive_jax import config_dict, storage
from longlive_jax.config import PipelineConfig, SwitchPolicy
from longlive_jax.errors import UserError, require
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.inference.story import BlendCurve, check_switch
from longlive_jax.provenance import Origin, differences, generation_settings, versions
from longlive_jax.storage import PathLike

FORMAT = "longlive-jax session"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class SwitchEvent:
    """A prompt that took over.

    Attributes:
      block: the first block that it changed.
      prompt: the text.
      policy: what happened to the cache.
      keep_sink: whether a recache left the sink alone.
      blend_frames: latent frames on the way to it; 0 for a plain switch.
      curve: the way.
    """

    block: int
    prompt: str
    policy: SwitchPolicy
    keep_sink: bool
    blend_frames: int = 0
    curve: BlendCurve = "linear"

    def __post_init__(self) -> None:
        values = dataclasses.asdict(self)
        del values["block"]
        check_switch(**values)


@dataclasses.dataclass(frozen=True)
class ChangeEvent:
    """Another seed or other settings.

    Attributes:
      block: the first block that they changed.
      seed: the new seed, or None.
      settings: dotted names to values.
    """

    block: int
    seed: int | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Event = SwitchEvent | ChangeEvent
_EVENTS: Mapping[str, type[SwitchEvent] | type[ChangeEvent]] = {"switch": SwitchEvent, "change": ChangeEvent}


@dataclasses.dataclass(frozen=True)
class Recording:
    """A session from its first block on.

    Attributes:
      prompt: the first prompt.
      seed: the first seed.
      height: pixels.
      width: pixels.
      config: at the start.
      blocks: how many were generated.
      events: in order.
      origin: the checkpoint, if there was one.
      versions: of the packages then.
    """

    prompt: str
    seed: int
    height: int
    width: int
    config: PipelineConfig
    blocks: int
    events: tuple[Event, ...]
    origin: Origin | None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def save(self, path: PathLike) -> None:
        """Writes the file, complete or not at all."""
        names = {kind: name for name, kind in _EVENTS.items()}
        values = {
            "format": FORMAT,
            "version": VERSION,
            **{name: getattr(self, name) for name in ("prompt", "seed", "height", "width", "blocks")},
            "events": [{"event": names[type(event)], **_settings(event)} for event in self.events],
            "config": config_dict.to_dict(self.config),
            "origin": None if self.origin is None else dataclasses.asdict(self.origin),
            "versions": versions_now(),
        }
        storage.write_json(path, values)

    @classmethod
    def read(cls, path: PathLike) -> "Recording":
        """Reads a file.

        Raises:
          UserError: it is not such a file, or is damaged.
        """
        values = storage.read_json(path)
        require(
            values.get("format") == FORMAT and values.get("version") == VERSION,
            f"session={path} is not a session file of this version; `Session.save` writes them",
        )
        try:
            origin = values["origin"]
            return cls(
                prompt=values["prompt"],
                **{name: _whole(values, name) for name in ("seed", "height", "width", "blocks")},
                config=config_dict.from_dict(PipelineConfig, values["config"]),
                events=tuple(_event(entry) for entry in values["events"]),
                origin=None if origin is None else Origin(**origin),
                versions=dict(values["versions"]),
            )
        except (KeyError, TypeError, AttributeError, UserError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__} {error}"
            raise UserError(f"session={path} is damaged: {reason}") from error

    def pipeline(self, path: PathLike, pipe: Pipeline | None) -> Pipeline:
        """The pipeline as it was recorded.

        Args:
          path: where the recording was read; for errors.
          pipe: one that is loaded already, under any settings; None loads the recorded checkpoint.

        Raises:
          UserError: the weights or the model are not those recorded.
        """
        shape = config_dict.to_dict(self.config)
        settings = generation_settings(shape)
        if pipe is not None:
            pipe = dataclasses.replace(pipe, config=config_dict.override(pipe.config, settings))
        elif self.origin is not None:
            pipe = Pipeline.load(
                self.origin.checkpoint,
                overrides=settings,
                weights=self.origin.weights,  # type: ignore[arg-type]
                use_lora=self.origin.use_lora,
                vae=self.origin.vae,
            )
        else:
            raise UserError(f"session={path} was not made from a checkpoint; give the pipeline")
        recorded = {"weights": self.origin.fingerprints if self.origin else {}, "config": shape}
        found = differences(recorded, pipe.origin.fingerprints if pipe.origin else {}, pipe.config)
        require(not found, f"session={path}: {', '.join(found)}; give the checkpoint it was made with")
        return pipe

    def remarks(self) -> list[str]:
        """What may make a replay differ by rounding: packages of another version."""
        now = versions_now()
        return [
            f"{name} was {then} and is {now.get(name, 'absent')}"
            for name, then in self.versions.items()
            if now.get(name) != then
        ]


def versions_now() -> dict[str, str]:
    """Versions of this package and of those that may change a result."""
    return {"longlive-jax": longlive_jax.__version__, **versions()}


def _settings(event: Event) -> dict[str, Any]:
    values = dataclasses.asdict(event)
    if isinstance(event, ChangeEvent):
        values["settings"] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in event.settings.items()
        }
    return values


def _event(entry: Mapping[str, Any]) -> Event:
    kind = entry["event"]
    require(kind in _EVENTS, f"event {kind!r} is not known")
    _whole(entry, "block")
    return _EVENTS[kind](**{name: value for name, value in entry.items() if name != "event"})


def _whole(values: Mapping[str, Any], name: str) -> int:
    value = values[name]
    require(type(value) is int and value >= 0, f"{name}={value!r} must be a whole number")
    return value
