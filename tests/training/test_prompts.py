"""Prompts of distillation: from files and from the toy world, and what is refused."""

import dataclasses

import numpy as np
import pytest
from grain.sharding import ShardOptions

from longlive_jax import toy
from longlive_jax.errors import UserError
from longlive_jax.models.tokenizer import Tokens
from longlive_jax.training.config import PromptsConfig
from longlive_jax.training.prompts import token_batches

ALL = ShardOptions(shard_index=0, shard_count=1)


class Spelled:
    """A tokenizer whose ids are the characters."""

    def __call__(self, prompts):
        ids = np.zeros((len(prompts), 80), np.int32)
        for row, text in zip(ids, prompts, strict=True):
            row[: len(text)] = [ord(c) for c in text]
        return Tokens(ids, np.array([len(text) for text in prompts], np.int32))


def texts(ids, lengths):
    return ["".join(map(chr, row[:length])) for row, length in zip(ids, lengths, strict=True)]


def batches(config, *, shard=ALL, with_switch=True):
    return iter(token_batches(config, toy.World(), Spelled(), shard=shard, with_switch=with_switch))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("uno\ndue\ntre\nquattro\n", encoding="utf-8")
    return PromptsConfig(
        batch_size=2, prompts=str(tmp_path / "a.txt"), switch_prompts=str(tmp_path / "b.txt")
    )


def test_lines_of_two_files_stay_together(files):
    stream, seen = batches(files), []
    for _ in range(2):
        batch = next(stream)
        first = texts(batch["prompt_ids"], batch["prompt_lengths"])
        seen += zip(first, texts(batch["switch_ids"], batch["switch_lengths"]), strict=True)
    assert sorted(seen) == [("four", "quattro"), ("one", "uno"), ("three", "tre"), ("two", "due")]


def test_two_processes_share_a_batch(files):
    whole = next(batches(files))["prompt_ids"]
    halves = [
        next(batches(files, shard=ShardOptions(shard_index=i, shard_count=2)))["prompt_ids"] for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate(halves), whole)


def test_toy_captions_and_what_they_switch_to():
    batch = next(batches(PromptsConfig(batch_size=4)))
    before = [toy.parse(text) for text in texts(batch["prompt_ids"], batch["prompt_lengths"])]
    after = [toy.parse(text) for text in texts(batch["switch_ids"], batch["switch_lengths"])]
    assert all(a != b for a, b in zip(before, after, strict=True))
    for name, asked in (("prompt", before), ("switch", after)):
        assert batch[f"{name}_codes"].tolist() == [list(attributes.codes) for attributes in asked]
    assert set(next(batches(PromptsConfig(batch_size=4), with_switch=False))) == {
        "prompt_ids",
        "prompt_lengths",
        "prompt_codes",
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\n\nthree\nfour", r"a.txt, line 2 is empty"),
        (b"one", r"has 1 prompts, fewer than data.batch_size=2"),
        (b"\xff\xfe\xfa", "not UTF-8"),
        (b"one\ntwo\nthree", r"has 4 lines and data.prompts=.*a.txt 3"),
    ],
)
def test_bad_files_are_refused(files, tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        batches(files)


def test_a_missing_file_is_refused(files):
    with pytest.raises(UserError, match="is no file"):
        batches(dataclasses.replace(files, prompts="nowhere.txt"))
    with pytest.raises(UserError, match=r"needs data.prompts"):
        PromptsConfig(batch_size=2, switch_prompts="b.txt")
