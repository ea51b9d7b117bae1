"""One turn of a session: functions from the moment before a block to the moment after it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config_dict
from longlive_jax.config import PipelineConfig, SwitchConfig
from longlive_jax.diffusion import noise
from longlive_jax.errors import require
from longlive_jax.inference import rollout
from longlive_jax.inference.pipeline import Pipeline, StreamState
from longlive_jax.inference.story import blend_blocks, check_switch
from longlive_jax.inference.switching import PromptTrack
from longlive_jax.session.recording import ChangeEvent, SwitchEvent
from longlive_jax.session.types import BlockInfo, Flight, Moment, Place, SwitchRequest, Timings
from longlive_jax.types import Array


def begin(pipe: Pipeline, prompt: str, *, seed: int, height: int, width: int) -> Moment:
    """The moment before the first block."""
    text = pipe.encode_prompts([prompt])
    stream = pipe.begin(text, noise.seed_array(seed, 1), height=height, width=width)
    return Moment(stream, PromptTrack(text[0]), prompt, pipe.config, seed)


def switched(moment: Moment, event: SwitchEvent, text: Array) -> Moment:
    """The moment when a switch has been taken up; `advance` carries it out."""
    track = moment.track.switched(
        text,
        SwitchConfig(event.policy, event.keep_sink),
        blocks=blend_blocks(event.blend_frames, moment.config.window.block_frames),
        curve=event.curve,
    )
    return dataclasses.replace(moment, track=track, prompt=event.prompt, events=(*moment.events, event))


def changed(pipe: Pipeline, moment: Moment, event: ChangeEvent) -> Moment:
    """The moment under another seed or other settings."""
    config = config_dict.override(moment.config, event.settings)
    state, seed = moment.stream.rollout, moment.seed if event.seed is None else event.seed
    if config.window != moment.config.window:
        state = rollout.resize(_under(pipe, config).generator, state)
    if seed != moment.seed:
        state = dataclasses.replace(state, seeds=jnp.array(noise.seed_array(seed, 1)))
    return dataclasses.replace(
        moment,
        stream=dataclasses.replace(moment.stream, rollout=state),
        config=config,
        seed=seed,
        events=(*moment.events, event),
    )


def advance(
    pipe: Pipeline, moment: Moment, *, requested: float | None, dispatched: float
) -> tuple[Moment, Flight]:
    """Hands the next block to the device.

    Args:
      pipe: the models.
      moment: consumed.
      requested: see `Flight`.
      dispatched: see `Timings`.

    Returns:
      The moment after it, and the block.
    """
    pipe = _under(pipe, moment.config)
    track, how = moment.track.next_block()
    stream = pipe.switch(moment.stream, [track], {} if how is None else {0: how})
    stream, latents, pixels = pipe.advance(stream, is_first=moment.block == 0)
    assert pixels is not None  # a session's streams decode
    info = BlockInfo(
        block=moment.block,
        frame=moment.frame,
        prompt=moment.prompt,
        policy=None if how is None else how.policy,
        weight=track.weight,
        seed=moment.seed,
        timings=Timings(dispatched, dispatched, None, None),
    )
    flight = Flight(pipe.config.vae.video_frames(moment.frame), pixels, info, requested)
    after = dataclasses.replace(
        moment,
        stream=stream,
        track=track,
        block=moment.block + 1,
        frame=moment.frame + latents.shape[1],
    )
    return after, flight


def event_of(request: SwitchRequest, moment: Moment) -> SwitchEvent:
    """What a request comes to when it is taken up; what it leaves open is the config's."""
    default = moment.config.switch
    return SwitchEvent(
        block=moment.block,
        prompt=request.prompt,
        policy=request.policy or default.policy,
        keep_sink=default.keep_sink if request.keep_sink is None else request.keep_sink,
        blend_frames=request.blend_frames,
        curve=request.curve,
    )


def copied(stream: StreamState, place: Place) -> StreamState:
    """A copy that blocks to come do not consume."""
    require(place in ("device", "host"), f"place={place!r} must be 'device' or 'host'")
    if place == "device":
        return jax.tree.map(jnp.copy, stream)
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), stream)


def on_device(stream: StreamState) -> StreamState:
    """A copy on the device that the next block may consume; of a copy in either place."""
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), stream)


def check_start(
    config: PipelineConfig, prompt: str, *, seed: int, height: int | None, width: int | None
) -> dict[str, int]:
    """Refuses what no session can begin with; returns its {"height", "width"} in pixels."""
    check_switch(prompt)
    check_window(config)
    noise.seed_array(seed, 1)
    size = {
        "height": config.video.height if height is None else height,
        "width": config.video.width if width is None else width,
    }
    config.latent_size(**size)
    return size


def check_window(config: PipelineConfig) -> None:
    """Refuses a window that only a video of known length can have."""
    require(
        config.window.is_bounded,
        "window.window_frames=-1 keeps everything, and a session has no end; give it a number of frames",
    )


def _under(pipe: Pipeline, config: PipelineConfig) -> Pipeline:
    return pipe if config == pipe.config else dataclasses.replace(pipe, config=config)
