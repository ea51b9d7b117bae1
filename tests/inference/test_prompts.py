"""Prompt embeddings: what the cache holds, when the encoder is loaded, when it is let go."""

import dataclasses
import gc
import logging
import os
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from longlive_jax.config import TextEncoderConfig
from longlive_jax.errors import UserError
from longlive_jax.inference import prompts as prompts_lib
from longlive_jax.inference.prompts import PromptEncoder
from longlive_jax.models import text_encoder
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.tokenizer import Tokenizer, train_word_tokenizer

CONFIG = TextEncoderConfig(
    vocab_size=32, dim=16, attn_dim=16, ffn_dim=32, num_heads=2, num_layers=2, num_buckets=8, text_len=12
)
WORLD = ["a red ball moves left", "a blue square moves up", ""]


class Loader:
    """Hands out parameters of `module` and counts how often."""

    def __init__(self, module: TextEncoder):
        init = jax.jit(text_encoder.init_params, static_argnums=0)
        self.params = jax.tree.map(np.asarray, init(module, jax.random.key(0)))
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.params


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_word_tokenizer(WORLD, vocab_size=32, path=folder)
    return Tokenizer.from_file(folder, CONFIG)


@pytest.fixture(scope="module")
def loader_of():
    """Loader per dtype; its count starts anew for every test that asks."""
    made = {}

    def get(dtype) -> Loader:
        if dtype not in made:
            made[dtype] = Loader(TextEncoder(CONFIG, param_dtype=dtype))
        made[dtype].calls = 0
        return made[dtype]

    return get


@pytest.fixture
def make(tokenizer, loader_of, tmp_path):
    """Builds a `PromptEncoder` whose cache is this test's own, with a fresh loader."""

    def build(dtype=jnp.float32, **changes) -> PromptEncoder:
        settings = {
            "load_params": loader_of(dtype),
            "fingerprint": "weights",
            "cache_dir": tmp_path / "prompts",
        }
        return PromptEncoder(tokenizer, TextEncoder(CONFIG, dtype=dtype), **(settings | changes))

    return build


def entries(encoder: PromptEncoder) -> list:
    return sorted(encoder.cache_dir.iterdir())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embeddings_are_the_encoders_with_zeros_beyond_the_prompt(make, tokenizer, dtype):
    encoder = make(dtype)
    out = encoder.encode(WORLD)
    assert out.shape == (3, 12, 16)
    assert out.dtype == dtype
    ids, lengths = tokenizer(WORLD)
    assert lengths.tolist() == [6, 6, 1]
    expected = text_encoder.embed(encoder.module, encoder.load_params(), ids=ids, lengths=lengths)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(
        np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
    )
    for row, length in zip(np.asarray(out), lengths, strict=True):
        assert not row[length:].any()
        assert row[:length].any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_cached_prompts_never_load_the_parameters_and_are_bit_identical(make, dtype):
    first = make(dtype).encode(WORLD)

    def must_not_run():
        raise AssertionError("parameters were loaded although every prompt is cached")

    second = make(dtype, load_params=must_not_run).encode(WORLD)
    assert second.dtype == first.dtype
    np.testing.assert_array_equal(np.asarray(second), np.asarray(first))


def test_a_prompts_embedding_does_not_depend_on_its_batch(make):
    encoder = make(cache_dir=None)
    together = encoder.encode([*WORLD, WORLD[0]])
    for index, prompt in enumerate([*WORLD, WORLD[0]]):
        np.testing.assert_array_equal(encoder.encode([prompt])[0], together[index])


def test_only_missing_prompts_are_computed(make):
    make().encode(WORLD[:1])
    encoder = make()
    encoder.encode(WORLD)
    assert encoder.load_params.calls == 1
    assert len(entries(encoder)) == 3


def test_entries_hold_only_the_rows_of_the_prompt(make):
    encoder = make(jnp.bfloat16)
    out = encoder.encode(["a red ball"])
    (entry,) = entries(encoder)
    assert entry.suffix == ".safetensors"
    with safetensors.safe_open(entry, framework="numpy") as file:
        rows = file.get_tensor("rows")
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, np.asarray(out)[0, :4])


def test_parameters_are_loaded_once_and_freed_by_release(make):
    arrays = []

    def load():
        loaded = jax.tree.map(jnp.asarray, source())
        arrays.append(weakref.ref(jax.tree.leaves(loaded)[0]))
        return loaded

    source = make().load_params
    with make(load_params=load, cache_dir=None) as encoder:
        encoder.encode(WORLD[:1])
        encoder.encode(WORLD[1:])
        assert len(arrays) == 1
        assert arrays[0]() is not None
    gc.collect()
    assert arrays[0]() is None
    encoder.encode(WORLD[:1])
    assert len(arrays) == 2


def test_parameters_are_freed_when_the_block_fails(make):
    encoder = make(cache_dir=None)
    encoder.encode(WORLD[:1])
    with pytest.raises(UserError), encoder:
        encoder.encode("not a list")
    encoder.encode(WORLD[:1])
    assert encoder.load_params.calls == 2


@pytest.mark.parametrize(
    ("prompt", "change"),
    [
        (WORLD[0], {"dtype": jnp.bfloat16}),
        (WORLD[0], {"fingerprint": "other weights"}),
        ("a red ball moves up", {}),
    ],
)
def test_whatever_changes_the_embedding_changes_the_key(make, prompt, change):
    make().encode(WORLD[:1])
    encoder = make(**change)
    encoder.encode([prompt])
    assert encoder.load_params.calls == 1
    assert len(entries(encoder)) == 2


def test_another_tokenizer_or_length_changes_the_key(make, tmp_path):
    make().encode(WORLD[:1])
    train_word_tokenizer(["left moves ball red a"], vocab_size=6, path=tmp_path)
    shorter = dataclasses.replace(CONFIG, text_len=11)
    for config, path in ((CONFIG, tmp_path), (shorter, tmp_path)):
        encoder = dataclasses.replace(
            make(), tokenizer=Tokenizer.from_file(path, config), module=TextEncoder(config)
        )
        encoder.encode(WORLD[:1])
        assert encoder.load_params.calls == 1
    assert len(entries(encoder)) == 3


def test_text_that_cleans_to_the_same_shares_an_entry(make):
    encoder = make()
    encoder.encode(["a red ball", "  a\u00a0red \n ball "])
    assert len(entries(encoder)) == 1


def _truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flip_last_bit(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _other_shape(data: bytes) -> bytes:
    return safetensors.numpy.save({"rows": np.zeros((2, 16), np.float32)})


def _other_tensor(data: bytes) -> bytes:
    return safetensors.numpy.save({"columns": np.zeros((6, 16), np.float32)})


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip_last_bit, _other_shape, _other_tensor, lambda data: b"", lambda data: b"\xff" * 64],
    ids=["truncated", "bit", "shape", "tensor", "empty", "noise"],
)
def test_a_damaged_entry_is_computed_again_and_repaired(make, damage, caplog):
    encoder = make()
    expected = np.asarray(encoder.encode(WORLD[:1]))
    (entry,) = entries(encoder)
    good = entry.read_bytes()
    entry.write_bytes(damage(good))
    again = make()
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(np.asarray(again.encode(WORLD[:1])), expected)
    assert again.load_params.calls == 1
    assert str(entry) in caplog.text
    assert entry.read_bytes() == good


def test_an_interrupted_write_leaves_nothing(make, monkeypatch):
    encoder = make()

    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoder.encode(WORLD[:1])
    assert entries(encoder) == []


def test_a_cache_that_cannot_be_written_costs_only_the_cache(make, tmp_path, caplog):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        out = make(cache_dir=blocker / "prompts").encode(WORLD[:1])
    np.testing.assert_array_equal(out, make(cache_dir=None).encode(WORLD[:1]))
    assert "cannot be written" in caplog.text


def test_no_cache_dir_writes_nothing(make, tmp_path, monkeypatch):
    monkeypatch.setenv(prompts_lib.CACHE_VARIABLE, str(tmp_path))
    make(cache_dir=None).encode(WORLD)
    assert not list(tmp_path.iterdir())


def test_default_cache_dir(make, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv(prompts_lib.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prompts_lib.default_cache_dir() == tmp_path / ".cache" / "longlive-jax" / "prompts"
    monkeypatch.setenv(prompts_lib.CACHE_VARIABLE, str(tmp_path / "elsewhere"))
    load = make().load_params
    PromptEncoder(tokenizer, TextEncoder(CONFIG), load, fingerprint="weights").encode(["red"])
    assert len(os.listdir(tmp_path / "elsewhere" / "prompts")) == 1


def test_encoding_on_the_cpu_loads_and_runs_there(make):
    places = []
    source = make().load_params

    def load():
        loaded = jax.tree.map(jnp.asarray, source())
        places.append(jax.tree.leaves(loaded)[0].devices())
        return loaded

    # Another default device stands for the accelerator.
    with jax.default_device(jax.local_devices(backend="cpu")[-1]):
        out = make(load_params=load, device="cpu", cache_dir=None).encode(WORLD)
        default = jnp.zeros(()).devices()
    assert places == [{jax.local_devices(backend="cpu")[0]}]
    assert out.devices() == default
    np.testing.assert_array_equal(np.asarray(out), np.asarray(make(cache_dir=None).encode(WORLD)))


def test_a_device_that_is_not_there_is_refused_before_loading(make):
    encoder = make(device="abacus", cache_dir=None)
    with pytest.raises(UserError, match="device='abacus' does not exist"):
        encoder.encode(WORLD)
    assert encoder.load_params.calls == 0


def test_no_prompts(make):
    encoder = make()
    assert encoder.encode([]).shape == (0, 12, 16)
    assert encoder.load_params.calls == 0


def test_a_bare_string_is_refused(make):
    with pytest.raises(UserError, match="must be a list"):
        make().encode("a red ball")


def test_tokenizer_and_encoder_must_belong_together(make):
    with pytest.raises(ValueError, match="another TextEncoderConfig"):
        dataclasses.replace(make(), module=TextEncoder(dataclasses.replace(CONFIG, text_len=8)))


# --- one encoder for everything that runs on a pipeline ---------------------------------------------


def source_of(make, **changes) -> tuple[prompts_lib.PromptSource, Loader]:
    made = []

    def once() -> PromptEncoder:
        assert not made, "one encoder is enough"
        made.append(make(cache_dir=None, **changes))
        return made[0]

    return prompts_lib.PromptSource(once), make().load_params


def test_a_source_lets_the_parameters_go_after_every_call_unless_it_is_held_open(make):
    source, loader = source_of(make)
    for calls in (1, 2):
        assert source(WORLD).shape == (3, 12, 16)
        assert loader.calls == calls
        assert source._encoder._held.params is None
    with source.hold_open():
        with source.hold_open():
            assert source._encoder._held.params is None  # not before a prompt needs them
            source(WORLD[:1])
            source(WORLD[1:])
        assert source._encoder._held.params is not None  # another one holds it still
        assert loader.calls == 3
    assert source._encoder._held.params is None


def test_what_is_held_open_goes_when_nobody_has_needed_it_for_a_while(make, monkeypatch):
    source, loader = source_of(make)
    source.release_idle(0)  # nothing is there yet
    now = [100.0]
    monkeypatch.setattr(prompts_lib.time, "monotonic", lambda: now[0])
    with source.hold_open():
        source(WORLD)
        now[0] += 59
        source.release_idle(60)
        assert source._encoder._held.params is not None
        now[0] += 1
        source.release_idle(60)
        assert source._encoder._held.params is None
        source(WORLD)
        assert loader.calls == 2
