"""Stages `reader` and `reward`: what is read, what is asked for, what is moved, and the runs they make."""

import dataclasses
import json
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import checkpoint, sharding
from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.toy import reader as readers
from longlive_jax.toy.reader import MISSHAPEN, BlockReader
from longlive_jax.training import metrics, reward, stages
from longlive_jax.training.config_file import load_config
from longlive_jax.training.loop import Interrupted
from longlive_jax.training.stages import reader as reader_stage
from tests.training._runs import CONFIGS, compilations, losses, only_one_device, smoke

pytestmark = pytest.mark.usefixtures("fast_programs", "one_device")

BLOCK = (3, 8, 8, 16)  # of the smoke model: frames, rows, columns, channels


@pytest.fixture(scope="module")
def reader_run(base, tmp_path_factory, fast_programs):
    folder = tmp_path_factory.mktemp("reader") / "run"
    changes = {"run__steps": 30, "optimizer__learning_rate": 1e-2, "run__checkpoint_every": 50}
    with only_one_device():
        return folder, stages.train(smoke("reader", base, folder, **changes), is_quiet=True)


def test_a_reader_learns_to_read_and_is_exported_beside_its_vae(base, reader_run):
    folder, report = reader_run
    seen = list(losses(folder).values())
    assert np.mean(seen[-3:]) < 0.8 * np.mean(seen[:3])
    exported = checkpoint.open_checkpoint(report["export"])
    assert set(exported.parts) == {"transformer", "text_encoder", "vae", "reader"}
    assert set(report["scores"]) == {"shape", "colour", "motion", "background", "all", "misshapen"}
    reader = readers.reader_of(exported.load("reader"), block=BLOCK, where="it")
    assert (reader.dim, reader.layers) == (8, 3)


def test_clips_are_labelled_misshapen_where_they_were_drawn_so(base, tmp_path):
    config = smoke("reader", base, tmp_path / "run", data__examples=64)
    batch = reader_stage.rows(reader_stage.encoded(config, config.data, share=0.5), 0.5, np.arange(64))
    assert batch["latents"].shape == (64, *BLOCK)
    assert 16 < (batch["codes"][:, 0] == MISSHAPEN).sum() < 48
    whole = reader_stage.encoded(config, config.data, share=0.0)
    same = np.abs(whole.rows(np.arange(64))["latents"] - batch["latents"]).max((1, 2, 3, 4)) < 1e-2
    np.testing.assert_array_equal(same, batch["codes"][:, 0] != MISSHAPEN)


def test_a_reader_of_other_blocks_is_refused():
    params = readers.init_params(BlockReader(8, 1), jax.random.key(0), block=(3, 8, 8, 16))
    with pytest.raises(
        UserError, match="runs/r has a reader of other blocks than 3 latent frames of 4 chann"
    ):
        readers.reader_of(params, block=(3, 8, 8, 4), where="runs/r")


def test_a_reader_sees_a_torus():
    reader = BlockReader(8, 2)
    params = readers.init_params(reader, jax.random.key(0), block=BLOCK)
    latents = jax.random.normal(jax.random.key(1), (2, *BLOCK))
    logits = reader.apply({"params": params}, latents, jnp.zeros(2))
    moved = reader.apply({"params": params}, jnp.roll(latents, (3, 5), axis=(2, 3)), jnp.zeros(2))
    assert [x.shape for x in logits] == [(2, 4), (2, 4), (2, 5), (2, 3)]
    for a, b in zip(logits, moved, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def config_of(base, reader_run, folder, **changes):
    return smoke("reward", base, folder, reward__reader=reader_run[1]["export"], **changes)


def prepared(config, mesh=None):
    setup = reward.load(config, mesh or sharding.make_mesh(data=1, fsdp=1))
    state = reward.init_state(setup)
    batch, encoder = config.data.batch_size, config.model.text_encoder
    text = np.random.default_rng(0).normal(size=(2, batch, encoder.text_len, encoder.dim)).astype(np.float32)
    codes = np.stack([np.full((batch, 4), 0), np.full((batch, 4), 1)]).astype(np.int32)
    switch = (text[1], codes[1]) if config.streaming.switch_frames else (None, None)
    asked = reward.begin(setup.tuning, state, text[0], codes[0], *switch)
    return setup, dataclasses.replace(state, extra=asked)


def test_blocks_are_asked_for_what_their_prompt_says(base, reader_run, tmp_path):
    setup, state = prepared(config_of(base, reader_run, tmp_path))
    asked = jax.tree.map(lambda x: x[0], state.extra)
    switch = dataclasses.replace(asked.sequence.switch, frame=jnp.int32(9))
    asked = dataclasses.replace(asked, sequence=dataclasses.replace(asked.sequence, switch=switch))

    def found(first):
        rollout = types.SimpleNamespace(latents=jnp.zeros((8, 9, 1, 1, 1)), first=jnp.int32(first))
        return np.asarray(reward._block_codes(setup.tuning, asked, rollout))[:, :, 2]

    assert (found(3) == [0, 0, 1]).all()
    assert (found(0) == 0).all()
    assert (found(12) == 1).all()


def test_the_first_step_is_where_the_base_is_and_later_ones_read_better(base, reader_run, tmp_path):
    config = config_of(
        base,
        reader_run,
        tmp_path,
        reward__anchor_weight=0.0,
        reward__max_sigma=0.0,
        optimizer__learning_rate=3e-3,
        lora__rank=0,
        streaming__sequence_frames=6,
        streaming__switch_frames=(),
    )
    setup, start = prepared(config)
    step = jax.jit(reward.train, static_argnums=0, static_argnames="new_frames")
    state, read = start, []
    for _ in range(30):
        state, found = step(setup.tuning, state, setup.given, new_frames=6)
        state = dataclasses.replace(state, extra=start.extra)
        read.append(float(found["read"]))
        if len(read) == 1:
            assert float(found["distance"]) < 1e-10
    assert np.mean(read[-5:]) < 0.8 * read[0]
    assert float(found["distance"]) > 1e-4


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_a_run_goes_through_its_sequences_and_exports_the_generator(base, reader_run, tmp_path, rank):
    config = config_of(base, reader_run, tmp_path / "run", run__steps=7, lora__rank=rank)
    report = stages.train(config, is_quiet=True)
    exported, start = checkpoint.open_checkpoint(report["export"]), checkpoint.open_checkpoint(base)
    assert set(exported.parts) == {"transformer", "text_encoder", "vae"}
    assert exported.source["stage"] == "reward"
    pairs = zip(
        jax.tree.leaves(start.load("transformer")), jax.tree.leaves(exported.load("transformer")), strict=True
    )
    assert any(not np.array_equal(a, b) for a, b in pairs)
    assert set(report["scores"]) >= {"shape", "all"}
    for line in map(json.loads, (tmp_path / "run" / metrics.METRICS_FILE).read_text().splitlines()):
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["read"] + 15 * line["distance"], rel=1e-4)
    counts = compilations(tmp_path / "run")
    assert counts[4] == counts[7] > 0  # none after the first sequence
    Pipeline.load(report["export"])


@pytest.mark.slow
def test_stopped_and_resumed_it_trains_as_if_it_had_not_been(base, reader_run, tmp_path, monkeypatch):
    whole = stages.train(config_of(base, reader_run, tmp_path / "whole", run__steps=6), is_quiet=True)
    config = config_of(base, reader_run, tmp_path / "run", run__steps=6)
    tick = metrics.Log.tick

    def stop(self, *arguments):
        tick(self, *arguments)
        if len(losses(tmp_path / "run")) == 2:  # inside of a sequence
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Log, "tick", stop)
        with pytest.raises(Interrupted):
            stages.train(config, is_quiet=True)
    report = stages.train(config, resume="auto", is_quiet=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    first, second = (checkpoint.open_checkpoint(r["export"]).load("transformer") for r in (whole, report))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.slow
def test_eight_devices_tune_like_one(base, reader_run, tmp_path, monkeypatch):
    config = config_of(base, reader_run, tmp_path)
    read = {}
    for devices in (1, 8):
        mesh = jax.sharding.Mesh(
            np.array(jax.devices()[:devices]).reshape(-1, devices // 2 or 1), sharding.AXES
        )
        setup, state = prepared(config, mesh)
        step = jax.jit(reward.train, static_argnums=0, static_argnames="new_frames")
        _, found = step(setup.tuning, state, setup.given, new_frames=6)
        read[devices] = {name: float(value) for name, value in found.items()}
    assert read[1] == pytest.approx(read[8], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "reward",
            {"data.prompts": "x.txt", "streaming.switch_frames": "()"},
            "the reader knows the toy world's captions only",
        ),
        ("reward", {"rollout.clip_frames": "10"}, "rollout.clip_frames=10 must be a multiple of"),
        ("reward", {"streaming.switch_frames": "40,"}, r"switch_frames=\(40,\) must lie within"),
        ("reward", {"reward.max_sigma": "2"}, r"reward.max_sigma=2.0 must be in \[0, 1\]"),
        ("reader", {"reader.misshapen_share": "2"}, r"reader.misshapen_share=2.0 must be in \[0, 1\]"),
        ("reader", {"data.frames": "4"}, "data.frames=4 must be a multiple of model.window.block_frames=3"),
    ],
)
def test_wrong_settings_are_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(CONFIGS / f"{name}.py", changes)


def test_a_checkpoint_without_a_reader_is_refused(base, tmp_path):
    with pytest.raises(
        UserError, match=r"reward.reader=.* has no reader; train one \(configs/toy/reader.py\)"
    ):
        reward.load(
            smoke("reward", base, tmp_path, reward__reader=str(base)), sharding.make_mesh(data=1, fsdp=1)
        )
