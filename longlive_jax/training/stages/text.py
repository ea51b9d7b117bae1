"""Stage `text`: the text encoder, by naming what a caption describes.

Nothing of this size reads text on its own, so the encoder is trained to tell the four prompted
attributes from the mean of a caption's embeddings, and frozen afterwards, like the pretrained encoder
of the real model. The naming heads are dropped.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from longlive_jax import checkpoint, sharding, toy
from longlive_jax.inference.parts import text_encoder_of
from longlive_jax.models import text_encoder as text_lib
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.tokenizer import Tokenizer, train_word_tokenizer
from longlive_jax.toy import data as toy_data
from longlive_jax.training import export as export_lib
from longlive_jax.training import processes
from longlive_jax.training import state as states
from longlive_jax.training import world as worlds
from longlive_jax.training.config import TextTraining
from longlive_jax.training.loop import Resume, TrainingRun, check_base, make_mesh
from longlive_jax.training.state import Metrics, TrainState
from longlive_jax.types import Array, Params, PRNGKey

PART = "text_encoder"
TOKENIZER_FILE = "tokenizer.json"


def train(config: TextTraining, *, resume: Resume = "never", is_quiet: bool = False) -> dict[str, Any]:
    """Trains the text encoder and exports it with its tokenizer; returns the report."""
    check_base(config, "vae")
    mesh = make_mesh(config)
    encoder = text_encoder_of(config.model)
    step_fn = jax.jit(functools.partial(train_step, config, encoder), donate_argnums=0)
    with TrainingRun(config, resume=resume, is_quiet=is_quiet) as run:
        tokenizer = make_tokenizer(config)
        prompts = iter(
            toy_data.prompts(
                worlds.world_of(config.model),
                worlds.stream_config(config.data),
                tokenizer=lambda texts: tokenizer(texts).ids,
                shard=worlds.shard(),
            )
        )
        state = sharding.init_sharded(functools.partial(init, config, encoder), mesh=mesh)
        state = run.start(state, prompts)
        for step in run.steps():
            batch = next(prompts)
            batch = sharding.place_batch(
                {"ids": batch["caption_tokens"], "attributes": batch["attributes"]}, mesh
            )
            state, metrics = step_fn(state, batch)
            run.after(step, state, metrics, frames=0)
            if run.is_evaluation_due(step):
                params = processes.to_host(state.networks[PART].best)
                run.evaluated(step, evaluate(config, encoder, tokenizer, params))
            if run.is_early_export_due(step):
                run.exported(step, export(config, state.networks[PART].best))
        return run.finish(export=export(config, state.networks[PART].best))


def make_tokenizer(config: TextTraining) -> Tokenizer:
    """Writes the tokenizer of all captions into the run's folder, and opens it."""
    file = _tokenizer_file(config)
    if jax.process_index() == 0:
        train_word_tokenizer(
            worlds.caption_table(), vocab_size=config.model.text_encoder.vocab_size, path=file
        )
    processes.sync("tokenizer")
    return Tokenizer.from_file(file, config.model.text_encoder)


def init(config: TextTraining, encoder: TextEncoder) -> TrainState:
    """The state before the first step: the encoder and one linear head per attribute."""
    sizes = [len(toy.VALUES[field]) for field in toy.FIELDS]
    keys = jax.random.split(jax.random.key(config.run.seed), 1 + len(sizes))
    dim = config.model.text_encoder.dim
    heads = {
        field: {"kernel": jax.random.normal(key, (dim, size)) * dim**-0.5}
        for field, key, size in zip(toy.FIELDS, keys[1:], sizes, strict=True)
    }
    params = {"encoder": text_lib.init_params(encoder, keys[0]), "heads": heads}
    network = states.init_network(params, config.optimizer, steps=config.run.steps)
    return states.init_state({PART: network}, config.run)


def train_step(
    config: TextTraining, encoder: TextEncoder, state: TrainState, batch: dict[str, Array]
) -> tuple[TrainState, Metrics]:
    """One update on `{"ids" [B, M], "attributes" [B, 4]}`."""
    loss = functools.partial(loss_fn, config, encoder)
    return states.train_alone(config, PART, loss, state, batch)


def loss_fn(
    config: TextTraining, encoder: TextEncoder, params: Params, batch: dict[str, Array], key: PRNGKey
) -> tuple[Array, Metrics]:
    """Mean cross-entropy of the four attributes; no randomness is used."""
    losses, right = [], []
    for index, logits in enumerate(logits_of(config, encoder, params, batch["ids"])):
        target = batch["attributes"][:, index]
        losses.append(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, target)))
        right.append(jnp.argmax(logits, axis=-1) == target)
    accuracy = jnp.mean(jnp.stack(right).all(0).astype(jnp.float32))
    return jnp.mean(jnp.stack(losses)), {"accuracy": accuracy}


def logits_of(config: TextTraining, encoder: TextEncoder, params: Params, ids: Array) -> list[Array]:
    """One `[B, values]` per attribute, from the mean over a caption's tokens."""
    lengths = jnp.sum(ids != config.model.text_encoder.pad_id, axis=1)
    embeddings = text_lib.embed(encoder, params["encoder"], ids=ids, lengths=lengths)  # [B, M, D]
    mean = jnp.sum(embeddings, axis=1) / lengths[:, None]
    return [mean @ params["heads"][field]["kernel"] for field in toy.FIELDS]


def evaluate(
    config: TextTraining, encoder: TextEncoder, tokenizer: Tokenizer, params: Params
) -> dict[str, float]:
    """Share of the captions of unseen combinations in which all four attributes are named right."""
    codes = np.repeat(toy.combinations("held_out"), toy.world.TEMPLATE_COUNT, axis=0)
    template = np.tile(np.arange(toy.world.TEMPLATE_COUNT), len(toy.combinations("held_out")))
    captions = [worlds.caption_table()[row] for row in worlds.caption_rows(codes, template)]
    named = jax.jit(lambda params, ids: logits_of(config, encoder, params, ids))(
        params, tokenizer(captions).ids
    )
    right = np.stack([np.asarray(logits).argmax(-1) for logits in named], axis=1) == codes
    return {"accuracy": float(right.all(1).mean())}


def export(config: TextTraining, params: Params) -> pathlib.Path:
    """Writes the checkpoint directory: the base's parts, the encoder, the tokenizer."""
    model = export_lib.base_model(config, checkpoint.open_checkpoint(config.base))
    return export_lib.export(
        config, {PART: params["encoder"]}, model=model, tokenizer=_tokenizer_file(config)
    )


def _tokenizer_file(config: TextTraining) -> pathlib.Path:
    return pathlib.Path(config.run.folder) / TOKENIZER_FILE
