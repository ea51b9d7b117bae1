"""Text in, video out: a checkpoint's parts put together.

    pipe = Pipeline.load("checkpoints/longlive-1.3b")
    video = pipe("A red fox runs through snow.", frames=21, seed=0)
    video.save("fox.mp4")

The text encoder runs first and is freed. Blocks are generated one after the other and decoded as a
stream, so memory does not grow with the length of the video.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import checkpoint as checkpoint_lib
from longlive_jax import config as config_lib
from longlive_jax import lora, video
from longlive_jax.config import PipelineConfig, SwitchConfig, SwitchPolicy
from longlive_jax.diffusion import noise
from longlive_jax.errors import UserError, require
from longlive_jax.inference import rollout
from longlive_jax.inference.prompts import Device, PromptEncoder
from longlive_jax.inference.story import PromptSwitch, Story, as_stories, check_schedule, effective_frame
from longlive_jax.models import text_encoder as text_encoder_lib
from longlive_jax.models import transformer as transformer_lib
from longlive_jax.models import vae as vae_lib
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.models.transformer import Transformer
from longlive_jax.models.vae import WanVAE
from longlive_jax.types import Array, ArrayLike, Params

Weights = Literal["auto", "transformer", "transformer_ema"]


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
    """

    config: PipelineConfig
    params: Params
    vae_params: Params | None
    encode_prompts: Callable[[Sequence[str]], Array]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        overrides: Mapping[str, Any] | None = None,
        weights: Weights = "auto",
        use_lora: bool = True,
        text_device: Device = "default",
    ) -> "Pipeline":
        """Opens a checkpoint directory and loads what generation needs.

        Weights are held once, in the compute precision of the config; the text encoder's are loaded
        when a prompt is not in the embedding cache, and freed after.

        Args:
          path: a directory made by `longlive convert`, or a training export.
          overrides: dotted config names to values, e.g. `{"window.sink_frames": 0}`.
          weights: "transformer", "transformer_ema", or "auto" for the first of these that is there.
          use_lora: add a LoRA that the checkpoint keeps apart.
          text_device: where the text encoder runs, "default" or "cpu".

        Raises:
          UserError: the checkpoint or an override is not usable.
        """
        opened = checkpoint_lib.open_checkpoint(path)
        config = config_lib.override(opened.config, overrides or {})
        part = _choose_weights(opened, weights)
        params = opened.load(
            part, dtype=config.dtype, expect=_shapes(transformer_lib.init_params, transformer_of(config))
        )
        params = jax.tree.map(jnp.asarray, params)
        if use_lora and "lora" in opened.parts:
            info = opened.parts["lora"]
            scale = (info.alpha or info.rank or 1) / (info.rank or 1)
            params = _merge_lora(params, opened.load("lora"), scale=scale)
        vae_params = None
        if "vae" in opened.parts:
            expected = _shapes(vae_lib.init_params, vae_of(config))
            vae_params = jax.tree.map(jnp.asarray, opened.load("vae", dtype=config.dtype, expect=expected))
        return cls(config, params, vae_params, _prompt_encoder(opened, config, device=text_device))

    @functools.cached_property
    def transformer(self) -> Transformer:
        return transformer_of(self.config)

    @functools.cached_property
    def vae(self) -> WanVAE:
        return vae_of(self.config)

    @functools.cached_property
    def generator(self) -> rollout.Generator:
        """The rollout this pipeline runs, for use with `longlive_jax.inference.rollout`."""
        return rollout.Generator(self.transformer, self.config.window, self.config.sampler)

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
        if self.vae_params is None:
            raise UserError("this checkpoint has no vae; convert it with one, or use stream_latents")
        blocks = self.stream_latents(stories, frames=frames, seed=seed, height=height, width=width)
        return self._decoded(blocks, frames)

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
        stories = as_stories(stories)
        block = self.config.window.block_frames
        require(frames > 0, f"frames={frames} must be at least 1")
        for story in stories:
            check_schedule(story, frames=frames, block_frames=block)
        seeds = noise.seed_array(seed, len(stories))
        size = self.config.latent_size(
            self.config.video.height if height is None else height,
            self.config.video.width if width is None else width,
        )
        return self._blocks(stories, -(-frames // block), seeds, size)

    def _blocks(
        self, stories: tuple[Story, ...], blocks: int, seeds: np.ndarray, size: tuple[int, int]
    ) -> Iterator[tuple[int, Array]]:
        block = self.config.window.block_frames
        prompts = [prompt for story in stories for prompt in story.prompts]
        text = dict(zip(prompts, self.encode_prompts(prompts), strict=True))
        with self._precision():
            state = rollout.init(
                self.generator,
                self.params,
                jnp.stack([text[story.prompt] for story in stories]),
                seeds,
                latent_size=size,
                total_frames=blocks * block,
            )
        for frame in range(0, blocks * block, block):
            with self._precision():
                state = self._switch(state, stories, frame, text)
                state, latents = rollout.step(self.generator, self.params, state)
            yield frame, latents

    def _switch(
        self,
        state: rollout.RolloutState,
        stories: tuple[Story, ...],
        frame: int,
        text: Mapping[str, Array],
    ) -> rollout.RolloutState:
        """Applies the switches that take effect at `frame`."""
        due = {i: s for i, story in enumerate(stories) for s in story.switches if self._starts(s, frame)}
        if not due:
            return state
        prompts = jnp.stack([text[due[i].prompt if i in due else s.prompt] for i, s in enumerate(stories)])
        how = {index: self._resolved(switch) for index, switch in due.items()}
        return switch_prompts(self.generator, self.params, state, prompts, how)

    def _resolved(self, switch: PromptSwitch) -> SwitchConfig:
        default = self.config.switch
        return SwitchConfig(
            policy=switch.policy or default.policy,
            keep_sink=default.keep_sink if switch.keep_sink is None else switch.keep_sink,
        )

    def _starts(self, switch: PromptSwitch, frame: int) -> bool:
        return effective_frame(switch.frame, self.config.window.block_frames) == frame

    def _decoded(self, blocks: Iterator[tuple[int, Array]], frames: int) -> Iterator[Chunk]:
        state, pending = None, None
        for frame, latents in blocks:
            if state is None:
                batch, _, height, width, _ = latents.shape
                state = self.vae.init_decode_state(batch, height=height, width=width)
            with self._precision():
                pixels, state = _decode(self.vae, self.vae_params, state, latents)
            if pending is not None:
                yield self._chunk(*pending, frames)
            pending = (frame, latents, pixels)
        if pending is not None:
            yield self._chunk(*pending, frames)

    def _chunk(self, frame: int, latents: Array, pixels: Array, frames: int) -> Chunk:
        """Fetches one block, cut off at the end of the video."""
        vae = self.config.vae
        kept = min(latents.shape[1], frames - frame)
        shown = vae.video_frames(frame + kept) - vae.video_frames(frame)
        return Chunk(frame, np.asarray(latents)[:, :kept], np.asarray(pixels)[:, :shown])

    def _precision(self) -> contextlib.AbstractContextManager[None]:
        return matmul_precision(self.config)


def switch_prompts(
    generator: rollout.Generator,
    params: Params,
    state: rollout.RolloutState,
    text: ArrayLike,
    due: Mapping[int, SwitchConfig],
) -> rollout.RolloutState:
    """Switches some samples of a batch to new prompts, together where their policies agree.

    Args:
      generator: the rollout.
      params: the transformer's parameters.
      state: the state between two blocks; consumed.
      text: `[B, M, text_dim]` new prompt embeddings (any values for the other samples).
      due: sample index to how it switches.

    Returns:
      The state for the next block.
    """
    frame, starts = int(state.frame), np.asarray(state.cache.start)

    def how(index: int) -> tuple[SwitchPolicy, int, bool]:
        if due[index].policy != "recache":
            return due[index].policy, 0, False
        generated = frame - int(starts[index])
        keeps = generator.keeps_sink(generated, due[index].keep_sink)
        return "recache", generator.recache_frames(generated), keeps

    for (policy, frames, keeps), group in itertools.groupby(sorted(due, key=how), key=how):
        mask = np.zeros(len(starts), bool)
        mask[list(group)] = True
        arguments = (generator, params, state, text, mask)
        if policy == "recache":
            state = rollout.recache(*arguments, frames=frames, keep_sink=keeps)
        else:
            state = (rollout.keep if policy == "keep" else rollout.clear)(*arguments)
    return state


def matmul_precision(config: PipelineConfig) -> contextlib.AbstractContextManager[None]:
    """float32 means float32: without this a GPU multiplies float32 matrices in TF32."""
    if config.dtype == "float32":
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def transformer_of(config: PipelineConfig) -> Transformer:
    """The flax module of a config's transformer."""
    return Transformer(config.transformer, dtype=jnp.dtype(config.dtype), attention=config.attention)


def vae_of(config: PipelineConfig) -> WanVAE:
    """The flax module of a config's VAE."""
    return WanVAE(config.vae, dtype=jnp.dtype(config.dtype))


def text_encoder_of(config: PipelineConfig) -> TextEncoder:
    """The flax module of a config's text encoder."""
    return TextEncoder(config.text_encoder, dtype=jnp.dtype(config.dtype))


def _choose_weights(opened: checkpoint_lib.Checkpoint, weights: Weights) -> str:
    if weights != "auto":
        return weights
    return "transformer_ema" if "transformer" not in opened.parts else "transformer"


def _shapes(init: Callable[[Any, Array], Params], module: Any) -> Params:
    return jax.eval_shape(functools.partial(init, module), jax.random.key(0))


@functools.partial(jax.jit, donate_argnums=0, static_argnames="scale")
def _merge_lora(params: Params, adapters: Params, *, scale: float) -> Params:
    return lora.merge(params, adapters, scale=scale)


def _prompt_encoder(
    opened: checkpoint_lib.Checkpoint, config: PipelineConfig, *, device: Device
) -> Callable[[Sequence[str]], Array]:
    def encode(prompts: Sequence[str]) -> Array:
        module = text_encoder_of(config)
        expected = _shapes(text_encoder_lib.init_params, module)
        tokenizer = Tokenizer.from_file(opened.tokenizer_path, config.text_encoder)
        load = functools.partial(opened.load, "text_encoder", dtype=config.dtype, expect=expected)
        fingerprint = opened.fingerprint("text_encoder")
        with PromptEncoder(tokenizer, module, load, fingerprint, device=device) as encoder:
            return encoder.encode(prompts)

    return encode


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(vae: WanVAE, params: Params, state: vae_lib.State, latents: Array) -> tuple[Array, vae_lib.State]:
    """Decodes a block to uint8 pixels."""
    pixels, state = vae.apply({"params": params}, state, latents, method="decode_step")
    return jnp.round((pixels + 1) * 127.5).astype(jnp.uint8), state
