"""Text in, video out: a checkpoint's parts put together.

    pipe = Pipeline.load("checkpoints/longlive-1.3b")
    video = pipe("A red fox runs through snow.", frames=21, seed=0)
    video.save("fox.mp4")

The text encoder runs first and is freed. Blocks are generated one after the other and decoded as a
stream, so memory does not grow with the length of the video.

`begin`, `switch` and `advance` are the three things that happen to a running video. They only hand work
to the device; `stream` calls them for stories that are known in advance, a `Session` for live ones.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint as checkpoint_lib
from longlive_jax import config as config_lib
from longlive_jax import config_dict, video
from longlive_jax.config import PipelineConfig, SwitchConfig
from longlive_jax.diffusion import noise
from longlive_jax.errors import require
from longlive_jax.inference import parallel, parts, rollout
from longlive_jax.inference.prompts import Device, PromptSource
from longlive_jax.inference.story import (
    PromptSwitch,
    Story,
    as_stories,
    blend_blocks,
    check_schedule,
    effective_frame,
)
from longlive_jax.inference.switching import PromptTrack, switch_prompts
from longlive_jax.models import vae as vae_lib
from longlive_jax.models.tiny_vae import TinyVAE
from longlive_jax.models.transformer import Transformer
from longlive_jax.models.vae import WanVAE
from longlive_jax.provenance import Origin, fingerprints, place
from longlive_jax.types import Array, ArrayLike, Params, pytree

T = TypeVar("T")


@pytree
class StreamState:
    """Everything the next block of running videos depends on, apart from the weights and the prompts.

    Attributes:
      rollout: the rollout's state.
      decoder: the VAE's, or None where latents are all that is wanted.
    """

    rollout: rollout.RolloutState
    decoder: vae_lib.State | None


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One block of a running video.

    Attributes:
      frame: position of its first latent frame.
      latents: float32 `[B, n, h, w, C]`.
      video: uint8 `[B, v, Y, X, 3]`.
    """

    frame: int
    latents: np.ndarray
    video: np.ndarray


@dataclasses.dataclass(frozen=True)
class Video:
    """Finished videos of one call.

    Attributes:
      frames: uint8 `[B, V, Y, X, 3]`.
      latents: float32 `[B, F, h, w, C]`.
      fps: video frames per second.
    """

    frames: np.ndarray
    latents: np.ndarray
    fps: int

    def save(self, path: str | os.PathLike[str]) -> list[pathlib.Path]:
        """Writes every video; the format is chosen by the suffix (see `longlive_jax.video`).

        Args:
          path: the file. Several videos are numbered: `name-0.mp4`, `name-1.mp4`, ...

        Returns:
          The files written.
        """
        path, count = pathlib.Path(path), len(self.frames)
        names = [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]
        for name, frames in zip(names, self.frames, strict=True):
            with video.open_writer(name, fps=self.fps, height=frames.shape[1], width=frames.shape[2]) as out:
                out.write(frames)
        return names


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The models of a checkpoint, ready to generate.

    Every part is usable alone: `transformer`, `vae` and the functions of `inference.rollout` take the
    parameters held here.

    Attributes:
      config: everything that affects the result but the weights, the prompts and the seed.
      params: the transformer's parameters.
      vae_params: the VAE's parameters; None generates latents only (`stream_latents`).
      encode_prompts: prompts to embeddings `[B, M, text_dim]`.
      origin: the checkpoint all this was loaded from, if it was.
      devices: how many devices a call is spread over; see `over`.
      vae_device: the device that decodes, see `over`; None is JAX's default.
    """

    config: PipelineConfig
    params: Params
    vae_params: Params | None
    encode_prompts: Callable[[Sequence[str]], Array]
    origin: Origin | None = None
    devices: int = 1
    vae_device: jax.Device | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        overrides: Mapping[str, Any] | None = None,
        weights: parts.Weights = "auto",
        use_lora: bool = True,
        text_device: Device = "default",
        vae: str | os.PathLike[str] | None = None,
    ) -> "Pipeline":
        """Opens a checkpoint directory and loads what generation needs.

        Weights are held once, in the compute precision of the config; the text encoder's are loaded
        when a prompt is not in the embedding cache, and freed after.

        Args:
          path: a directory made by `longlive convert`, or a training export.
          overrides: dotted config names to values, e.g. `{"window.sink_frames": 0}`. With "quantization" a
            checkpoint in full precision is quantised as it is loaded.
          weights: "transformer", "transformer_ema", or "auto" for the first of these that is there.
          use_lora: add a LoRA that the checkpoint keeps apart.
          text_device: where the text encoder runs, "default" or "cpu".
          vae: another checkpoint directory to take the VAE from, e.g. a small one's (`longlive convert
            taew2_1.pth checkpoints/taew2_1`).

        Raises:
          UserError: the checkpoint or an override is not usable.
        """
        opened = checkpoint_lib.open_checkpoint(path)
        config = config_dict.override(opened.config, overrides or {})
        decoder = opened
        if vae is not None:
            decoder = checkpoint_lib.open_checkpoint(vae, field="vae")
            decoder.part_file("vae")
            config = config_lib.with_vae(config, decoder.config, str(decoder.path))
        part = parts.choose_weights(opened, weights)
        params = parts.load_transformer(opened, part, config, use_lora=use_lora)
        origin = Origin(
            place(opened.path),
            weights,
            use_lora,
            fingerprints(opened, vae=decoder),
            vae=None if vae is None else place(decoder.path),
        )
        prompts = parts.prompt_source(opened, config, device=text_device)
        return cls(config, params, parts.load_vae(decoder, config), prompts, origin)

    @functools.cached_property
    def transformer(self) -> Transformer:
        return parts.transformer_of(self.config)

    @functools.cached_property
    def vae(self) -> WanVAE | TinyVAE:
        return parts.decoder_of(self.config)

    @functools.cached_property
    def generator(self) -> rollout.Generator:
        """The rollout this pipeline runs, for use with `longlive_jax.inference.rollout`."""
        config = self.config
        settings = (self.transformer, config.window, config.sampler.running)
        if self.devices == 1:
            return rollout.Generator(*settings, cache_dtype=config.cache_dtype)
        found = parallel.available(self.devices)
        return parallel.SpreadGenerator(*settings, cache_dtype=config.cache_dtype, devices=found)

    @functools.cached_property
    def opening_generator(self) -> rollout.Generator:
        """The rollout of a video's first block: equal to `generator` without `sampler.opening_steps`."""
        return dataclasses.replace(self.generator, sampler=self.config.sampler.opening)

    def over(self, devices: int = 1, *, decodes_apart: bool = False) -> "Pipeline":
        """The same pipeline over several devices of this process: `pipe.over(devices=8)`.

        Videos of a call go to different devices first; what is left of these shares each video, by heads and
        by tokens (`inference.parallel`).

        Args:
          devices: how many; every one gets a copy of the transformer.
          decodes_apart: one more device has the VAE and decodes a block while these denoise the next one. By
            default the first of them decodes in between.

        Raises:
          UserError: there are fewer.
        """
        found = parallel.available(devices, decodes_apart=decodes_apart)
        vae_device = found[-1] if decodes_apart else found[0]
        return dataclasses.replace(
            self,
            params=parallel.replicate(self.params, found[:devices]),
            vae_params=jax.device_put(self.vae_params, vae_device),
            devices=devices,
            vae_device=vae_device,
        )

    def __call__(
        self,
        stories: str | Story | Sequence[str | Story],
        *,
        frames: int,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> Video:
        """Generates videos and returns them whole; the arguments are those of `stream`."""
        chunks = list(self.stream(stories, frames=frames, seed=seed, height=height, width=width))
        return Video(
            frames=np.concatenate([chunk.video for chunk in chunks], axis=1),
            latents=np.concatenate([chunk.latents for chunk in chunks], axis=1),
            fps=self.config.video.fps,
        )

    def stream(
        self,
        stories: str | Story | Sequence[str | Story],
        *,
        frames: int,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[Chunk]:
        """Generates videos block by block.

        The next block is under way on the device while the caller handles the last one.

        Args:
          stories: a prompt or `Story` per video; they may switch prompts at different frames.
          frames: latent frames per video; F of them decode to `temporal_stride * (F - 1) + 1` frames.
          seed: of the first video (the next ones count up), or one for each; in [0, 2**32).
          height: pixels; default from the config.
          width: pixels; default from the config.

        Yields:
          A `Chunk` per block of `config.window.block_frames` latents (the last one may be shorter).

        Raises:
          UserError: an argument does not fit, before anything is computed.
        """
        self.check_vae()
        blocks = self._blocks(*self._checked(stories, frames, seed), self._size(height, width), decodes=True)
        return (self._chunk(*block, frames) for block in one_ahead(blocks))

    def stream_latents(
        self,
        stories: str | Story | Sequence[str | Story],
        *,
        frames: int,
        seed: int | Sequence[int] = 0,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[tuple[int, Array]]:
        """Like `stream`, without the VAE: yields (position, float32 `[B, block_frames, h, w, C]`).

        The last block is whole even where `frames` is not a multiple of it.
        """
        blocks = self._blocks(*self._checked(stories, frames, seed), self._size(height, width), decodes=False)
        return ((frame, latents) for frame, latents, _ in blocks)

    # --- block by block ------------------------------------------------------------------------------

    def begin(
        self,
        text: Array,
        seeds: ArrayLike,
        *,
        height: int | None = None,
        width: int | None = None,
        total_frames: int | None = None,
        decodes: bool = True,
    ) -> StreamState:
        """The state before the first block.

        Args:
          text: `[B, M, text_dim]` prompt embeddings.
          seeds: uint32 `[B]`.
          height: pixels; default from the config.
          width: pixels; default from the config.
          total_frames: latent frames of the whole video; only an unbounded window needs it.
          decodes: whether blocks are decoded to pixels.
        """
        rows, columns = self._size(height, width)
        if self.devices > 1:
            batch = text.shape[0]  # refuses what does not fit
            parallel.layout_of(self.config, devices=self.devices, batch=batch, latent_size=(rows, columns))
        with self._precision():
            state = rollout.init(
                self.generator,
                self.params,
                text,
                seeds,
                latent_size=(rows, columns),
                total_frames=total_frames,
            )
        decoder = None
        if decodes:
            self.check_vae()
            decoder = self.vae.init_decode_state(text.shape[0], height=rows, width=columns)
            if self.vae_device is not None:
                decoder = jax.device_put(decoder, self.vae_device)
        return StreamState(state, decoder)

    def switch(
        self, state: StreamState, tracks: Sequence[PromptTrack], due: Mapping[int, SwitchConfig]
    ) -> StreamState:
        """Puts some videos under other texts between two blocks.

        Args:
          state: consumed.
          tracks: one per video; those in `due` already stand at the next block, see `next_block`.
          due: index of each video that changes to what happens to its cache.
        """
        if not due:
            return state
        text = jnp.stack([track.shown for track in tracks])
        with self._precision():
            changed = switch_prompts(self.generator, self.params, state.rollout, text, due)
        return dataclasses.replace(state, rollout=changed)

    def advance(
        self, state: StreamState, *, is_first: bool = False
    ) -> tuple[StreamState, Array, Array | None]:
        """Generates and decodes the next block. Returns at once; the device works on.

        Args:
          state: consumed.
          is_first: whether it is the first one, which takes `sampler.opening_steps`.

        Returns:
          The next state, the latents float32 `[B, n, h, w, C]`, and the pixels uint8 `[B, v, Y, X, 3]`
          (None without a decoder).
        """
        with self._precision():
            generator = self.opening_generator if is_first else self.generator
            generated, latents = rollout.step(generator, self.params, state.rollout)
            # A cut's gap is over with its block; without it the next ones run the plain programs again.
            generated = dataclasses.replace(generated, gap=None)
            if self.vae_device is not None:
                latents = jax.device_put(latents, self.vae_device)
            if state.decoder is None:
                return StreamState(generated, None), latents, None
            pixels, decoder = _decode(self.vae, self.vae_params, state.decoder, latents)
        return StreamState(generated, decoder), latents, pixels

    def check_vae(self) -> None:
        """Refuses to decode without a VAE."""
        require(
            self.vae_params is not None,
            "this checkpoint has no vae; convert it with one, or use stream_latents",
        )

    @contextlib.contextmanager
    def text_encoder_open(self) -> Iterator[None]:
        """Keeps the text encoder's weights between calls, from the first prompt that needs them on."""
        source = self.encode_prompts
        with source.hold_open() if isinstance(source, PromptSource) else contextlib.nullcontext():
            yield

    def release_text_encoder(self, *, idle_seconds: float) -> None:
        """Lets the text encoder's weights go if no prompt has needed them for so long."""
        if isinstance(self.encode_prompts, PromptSource):
            self.encode_prompts.release_idle(idle_seconds)

    # --- stories -------------------------------------------------------------------------------------

    def _checked(
        self, stories: str | Story | Sequence[str | Story], frames: int, seed: int | Sequence[int]
    ) -> tuple[tuple[Story, ...], int, np.ndarray]:
        """The stories, how many blocks they take, and the seeds; UserError if they do not fit."""
        stories, block = as_stories(stories), self.config.window.block_frames
        require(frames > 0, f"frames={frames} must be at least 1")
        for story in stories:
            check_schedule(story, frames=frames, block_frames=block)
        return stories, -(-frames // block), noise.seed_array(seed, len(stories))

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        video = self.config.video
        return self.config.latent_size(
            video.height if height is None else height, video.width if width is None else width
        )

    def _blocks(
        self,
        stories: tuple[Story, ...],
        blocks: int,
        seeds: np.ndarray,
        size: tuple[int, int],
        *,
        decodes: bool,
    ) -> Iterator[tuple[int, Array, Array | None]]:
        """Yields (position, latents, pixels) of each block as soon as the device has been told."""
        block, stride = self.config.window.block_frames, self.config.vae.spatial_stride
        prompts = [prompt for story in stories for prompt in story.prompts]
        text = dict(zip(prompts, self.encode_prompts(prompts), strict=True))
        tracks = [PromptTrack(text[story.prompt]) for story in stories]
        state = self.begin(
            jnp.stack([track.shown for track in tracks]),
            seeds,
            height=size[0] * stride,
            width=size[1] * stride,
            total_frames=blocks * block,
            decodes=decodes,
        )
        for frame in range(0, blocks * block, block):
            tracks, due = self._turn(tracks, stories, frame, text)
            state = self.switch(state, tracks, due)
            state, latents, pixels = self.advance(state, is_first=frame == 0)
            yield frame, latents, pixels

    def _turn(
        self,
        tracks: Sequence[PromptTrack],
        stories: tuple[Story, ...],
        frame: int,
        text: Mapping[str, Array],
    ) -> tuple[list[PromptTrack], dict[int, SwitchConfig]]:
        """The tracks under the block at `frame`, and what happens to the caches of those that change."""
        block = self.config.window.block_frames
        moved, due = [], {}
        for index, (track, story) in enumerate(zip(tracks, stories, strict=True)):
            for switch in story.switches:
                if effective_frame(switch.frame, block) == frame:
                    track = track.switched(
                        text[switch.prompt],
                        resolved(switch, self.config.switch),
                        blocks=blend_blocks(switch.blend_frames, block),
                        curve=switch.curve,
                    )
            track, how = track.next_block()
            moved.append(track)
            if how is not None:
                due[index] = how
        return moved, due

    def _chunk(self, frame: int, latents: Array, pixels: Array | None, frames: int) -> Chunk:
        """Fetches one block, cut off at the end of the video."""
        vae = self.config.vae
        kept = min(latents.shape[1], frames - frame)
        shown = vae.video_frames(frame + kept) - vae.video_frames(frame)
        return Chunk(frame, np.asarray(latents)[:, :kept], np.asarray(pixels)[:, :shown])

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return matmul_precision(self.config)


def resolved(switch: PromptSwitch, default: SwitchConfig) -> SwitchConfig:
    """What a switch does to the cache: as it says, else as the config does."""
    return SwitchConfig(
        policy=switch.policy or default.policy,
        keep_sink=default.keep_sink if switch.keep_sink is None else switch.keep_sink,
    )


def one_ahead(blocks: Iterator[T]) -> Iterator[T]:
    """Asks for each item before it yields the one before: the device never waits for the host."""
    pending = list(itertools.islice(blocks, 1))
    for item in blocks:
        yield pending.pop()
        pending.append(item)
    yield from pending


def matmul_precision(config: PipelineConfig) -> contextlib.AbstractContextManager[None]:
    """float32 means float32: without this a GPU multiplies float32 matrices in TF32."""
    if config.dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    vae: WanVAE | TinyVAE, params: Params, state: vae_lib.State, latents: Array
) -> tuple[Array, vae_lib.State]:
    """Decodes a block to uint8 pixels."""
    pixels, state = vae.apply({"params": params}, state, latents, method="decode_step")
    return jnp.round((pixels + 1) * 127.5).astype(jnp.uint8), state
