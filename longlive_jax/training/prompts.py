"""The prompts of distillation, from the toy world or from text files, as batches of embeddings.

Batches are made of tokens (by Grain, sharded by process, at a place that checkpoints remember) and
embedded by the frozen text encoder on the devices.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from grain.sharding import ShardOptions

from longlive_jax import sharding
from longlive_jax.errors import UserError, require
from longlive_jax.models import text_encoder as text_lib
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.tokenizer import Tokenizer
from longlive_jax.toy import data as toy_data
from longlive_jax.toy.world import World
from longlive_jax.training import world as worlds
from longlive_jax.training.config import DistillTraining, PromptsConfig, RewardTraining
from longlive_jax.types import Array, Params

PROMPT, SWITCH = "prompt", "switch"
"""Names of what a batch holds, and prefixes of its arrays."""

_CAPTIONS: Mapping[str, str] = {PROMPT: "caption", SWITCH: "switch_caption"}
_CODES: Mapping[str, str] = {PROMPT: "attributes", SWITCH: "switch_attributes"}

TextBatch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class TextEmbedder:
    """The frozen text encoder on the mesh.

    Attributes:
      encoder: the module.
      params: its parameters, sharded.
      mesh: where batches are split.
    """

    encoder: TextEncoder
    params: Params
    mesh: jax.sharding.Mesh

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Embeddings `[B, M, text_dim]` of this process's rows of a batch of `token_batches`."""
        placed = sharding.place_batch(batch, self.mesh)
        names = [name for name in (PROMPT, SWITCH) if f"{name}_ids" in placed]
        return {
            name: _embed(self.encoder, self.params, placed[f"{name}_ids"], placed[f"{name}_lengths"])
            for name in names
        }

    def prompts(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> Array:
        """Embeddings `[K, M, text_dim]` of a few prompts, whole on every device."""
        ids, lengths = tokenizer(prompts)
        everywhere = sharding.replicated(self.mesh)
        whole = jax.jit(text_lib.embed, static_argnums=0, out_shardings=everywhere)
        return whole(self.encoder, self.params, ids=ids, lengths=lengths)


def token_batches(
    config: PromptsConfig, world: World, tokenizer: Tokenizer, *, shard: ShardOptions, with_switch: bool
) -> grain.IterDataset[TextBatch]:
    """Endless batches of tokenised prompts.

    Args:
      config: where they come from.
      world: of the captions.
      tokenizer: of the text encoder.
      shard: this process's share of every batch.
      with_switch: whether each prompt comes with one to switch to.

    Returns:
      Batches {"prompt_ids" int32 [b, M], "prompt_lengths" int32 [b]} and, with `with_switch`,
      "switch_ids" and "switch_lengths". Captions of the toy world come with what they ask for, "prompt_codes"
      int32 [b, 4] and "switch_codes".

    Raises:
      UserError: a file cannot be used.
    """
    make, examples = (
        _file_rows(config, with_switch) if config.prompts else _captions(config, with_switch, world)
    )
    stream = toy_data.DataConfig(
        batch_size=config.batch_size,
        seed=config.seed,
        split=config.split,
        examples=examples,
        threads=config.threads,
        prefetch=config.prefetch,
    )

    def tokens(indices: np.ndarray) -> TextBatch:
        batch: TextBatch = {}
        texts, codes = make(indices)
        for name, lines in texts.items():
            batch[f"{name}_ids"], batch[f"{name}_lengths"] = tokenizer(lines)
        return batch | {f"{name}_codes": rows for name, rows in codes.items()}

    return toy_data.stream(stream, shard, tokens)


def batches(
    config: DistillTraining | RewardTraining, tokenizer: Tokenizer, *, with_switch: bool
) -> Iterator[TextBatch]:
    """This process's `token_batches` of a stage; an iterator of Grain, whose place checkpoints remember."""
    world, shard = worlds.world_of(config.model), worlds.shard()
    return iter(token_batches(config.data, world, tokenizer, shard=shard, with_switch=with_switch))


def read_prompts(path: str | pathlib.Path, *, field: str = "data.prompts") -> list[str]:
    """The lines of a prompt file, without the empty ones at its end.

    Args:
      path: the file.
      field: the setting that names it, for errors.

    Raises:
      UserError: it cannot be read, or a line is empty.
    """
    path = pathlib.Path(path)
    require(path.is_file(), f"{field}={path} is no file; give a text file with one prompt per line")
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(lines, start=1):
        require(line.strip() != "", f"{path}, line {number} is empty; every line must be a prompt")
    require(len(lines) > 0, f"{path} has no prompts")
    return lines


_Texts = Callable[[np.ndarray], tuple[dict[str, list[str]], dict[str, np.ndarray]]]
"""Numbers of prompts to their texts and, where these are captions, the attributes they ask for."""


def _file_rows(config: PromptsConfig, with_switch: bool) -> tuple[_Texts, int]:
    files = {PROMPT: read_prompts(config.prompts)}
    count = len(files[PROMPT])
    require(
        count >= config.batch_size,
        f"data.prompts={config.prompts} has {count} prompts, fewer than data.batch_size={config.batch_size}",
    )
    if with_switch:
        files[SWITCH] = read_prompts(config.switch_prompts, field="data.switch_prompts")
        require(
            len(files[SWITCH]) == count,
            f"data.switch_prompts={config.switch_prompts} has {len(files[SWITCH])} lines and data.prompts="
            f"{config.prompts} {count}; they belong together line by line",
        )
    return lambda rows: ({name: [lines[row] for row in rows] for name, lines in files.items()}, {}), count


def _captions(config: PromptsConfig, with_switch: bool, world: World) -> tuple[_Texts, int]:
    make: Any = toy_data.prompt_maker(world, seed=config.seed, split=config.split, with_switch=with_switch)

    def texts(rows: np.ndarray) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
        batch = make(rows)
        captions = {name: list(batch[key]) for name, key in _CAPTIONS.items() if key in batch}
        return captions, {name: batch[key] for name, key in _CODES.items() if key in batch}

    return texts, config.examples


@functools.partial(jax.jit, static_argnums=0)
def _embed(encoder: TextEncoder, params: Params, ids: Array, lengths: Array) -> Array:
    return text_lib.embed(encoder, params, ids=ids, lengths=lengths)
