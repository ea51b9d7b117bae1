"""Compiles ahead of a session what a prompt switch would otherwise hold the video for."""

import dataclasses
from collections.abc import Iterator

import jax

from longlive_jax.config import SwitchConfig, SwitchPolicy
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.session import turn
from longlive_jax.session.types import Moment


def warm_up(
    pipe: Pipeline, prompt: str, *, height: int | None = None, width: int | None = None
) -> Iterator[SwitchPolicy | None]:
    """Runs on a scratch video everything that a session of this pipeline may run.

    What it takes is one more session's state and a copy of it, until it is through.

    Args:
      pipe: the models, under the config of the session.
      prompt: any text, best one whose embedding is needed anyway.
      height: pixels; default from the config.
      width: pixels; default from the config.

    Yields:
      None when blocks run, then each policy when a switch under it runs, whatever came before it.

    Raises:
      UserError: an argument does not fit.
    """
    size = turn.check_start(pipe.config, prompt, seed=0, height=height, width=width)
    moment = _advanced(pipe, turn.begin(pipe, prompt, seed=0, **size))
    if pipe.config.sampler.opening_steps:  # the other blocks are another program
        moment = _advanced(pipe, moment)
    yield None
    moment = _filled(pipe, moment)
    yield "recache"
    for policy in ("keep", "clear"):
        _switched(pipe, moment, policy)
        yield policy
    # The frames since a flush are as many as never were before it: recaches of other sizes.
    _filled(pipe, _advanced(pipe, _switched(pipe, moment, "flush")))
    yield "flush"
    _advanced(pipe, _switched(pipe, moment, "cut"))
    yield "cut"


def _filled(pipe: Pipeline, moment: Moment) -> Moment:
    """Fills the window, recaching a copy before every block."""
    window = pipe.config.window
    for _ in range(-(-window.window_frames // window.block_frames) + 1):
        _switched(pipe, moment, "recache")
        moment = _advanced(pipe, moment)
    _switched(pipe, moment, "recache")
    return moment


def _switched(pipe: Pipeline, moment: Moment, policy: SwitchPolicy) -> Moment:
    """A copy of the moment after a switch to the text it has."""
    how = SwitchConfig(policy, pipe.config.switch.keep_sink)
    stream = pipe.switch(turn.copied(moment.stream, "device"), [moment.track], {0: how})
    return dataclasses.replace(moment, stream=jax.block_until_ready(stream))


def _advanced(pipe: Pipeline, moment: Moment) -> Moment:
    moment, flight = turn.advance(pipe, moment, requested=None, dispatched=0.0)
    jax.block_until_ready(flight.pixels)
    return moment
