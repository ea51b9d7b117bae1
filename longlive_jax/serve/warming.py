"""Compiles in the background what sessions may ask for, once per setting."""

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import get_args

from longlive_jax.config import PipelineConfig, SwitchPolicy
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.session.warm_up import warm_up

_LOG = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_POLICIES: tuple[SwitchPolicy, ...] = get_args(SwitchPolicy)


class Warming:
    """Which settings and policies run without compiling. Shared by all sessions of a process."""

    def __init__(self, pipe: Pipeline, *, is_on: bool) -> None:
        self._pipe, self._is_on = pipe, is_on
        self._changed = threading.Condition()
        self._done: dict[PipelineConfig, set[SwitchPolicy | None]] = {}
        self._one = threading.Lock()  # a second one at a time would only take memory

    def start(self, config: PipelineConfig, prompt: str) -> None:
        """Begins, unless that was done before."""
        key = _key(config)
        with self._changed:
            if not self._is_on or key in self._done:
                return
            self._done[key] = set()
        threading.Thread(
            target=self._run, args=(key, config, prompt), name="longlive-warm-up", daemon=True
        ).start()

    def is_ready(self, config: PipelineConfig, policy: SwitchPolicy | None) -> bool:
        """Whether a switch under a policy (None: a block) would not compile anything."""
        with self._changed:
            return not self._is_on or policy in self._done.get(_key(config), ())

    def wait(
        self, config: PipelineConfig, policy: SwitchPolicy | None, *, gives_up: Callable[[], bool]
    ) -> None:
        """Waits until then, or until `gives_up` says so."""
        while not self.is_ready(config, policy) and not gives_up():
            with self._changed:
                self._changed.wait(_POLL_SECONDS)

    def _run(self, key: PipelineConfig, config: PipelineConfig, prompt: str) -> None:
        try:
            with self._one:
                for policy in warm_up(dataclasses.replace(self._pipe, config=config), prompt):
                    self._mark(key, (policy,))
        except Exception as error:  # too little memory for another video, say
            _LOG.warning("could not compile ahead: %s", error)
        finally:
            self._mark(key, (None, *_POLICIES))

    def _mark(self, key: PipelineConfig, policies: tuple[SwitchPolicy | None, ...]) -> None:
        with self._changed:
            self._done[key].update(policies)
            self._changed.notify_all()


def _key(config: PipelineConfig) -> PipelineConfig:
    """What programs depend on: not which policy is the default."""
    return dataclasses.replace(config, switch=dataclasses.replace(config.switch, policy="recache"))
