"""The trainer as its user meets it: it learns, survives being killed, and stops before harm is done."""

import functools
import json
import shutil
import signal
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from longlive_jax import checkpoint, sharding, video
from longlive_jax.cli.main import main
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.training import config as config_lib
from longlive_jax.training import flow, loop, metrics, samples, stages
from longlive_jax.training.lock import RunLock
from longlive_jax.training.loop import TrainingError
from longlive_jax.training.stages import text
from tests.training import _runs
from tests.training._runs import (
    CONFIGS,
    checkpointed,
    compilations,
    losses,
    smoke,
    started,
    wait_for_a_write,
    wait_for_losses,
)

pytestmark = pytest.mark.usefixtures("fast_programs", "one_device")


def board(folder):
    """Tags of what was written for TensorBoard: records of a length, its checksum, an event, its checksum."""
    [file] = (folder / "tensorboard").iterdir()
    data, tags = file.read_bytes(), set()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        tags |= {value.tag for value in Event.FromString(data[12 : 12 + length]).summary.value}
        data = data[16 + length :]
    return tags


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vae_images", "vae"),
        pytest.param("vae", "vae", marks=pytest.mark.slow),
        ("text", "text_encoder"),
        pytest.param("teacher", "transformer", marks=pytest.mark.slow),  # trained in test_two_processes
        pytest.param("causal_init", "transformer", marks=pytest.mark.slow),  # its step is in test_flow
        pytest.param("causal_ode", "transformer", marks=pytest.mark.slow),  # its trajectories are tested
    ],
)
def test_a_smoke_run_overfits_and_exports(name, part, base, tmp_path):
    changes = {"run__steps": 12, "run__checkpoint_every": 50, "optimizer__learning_rate": 5e-3}
    config = smoke(name, None if part == "vae" else base, tmp_path / "run", **changes)
    report = stages.train(config, is_quiet=True)
    seen = list(losses(tmp_path / "run").values())
    assert np.mean(seen[-3:]) < 0.95 * np.mean(seen[:3])
    counts = compilations(tmp_path / "run")
    assert counts[3] > 0
    assert counts[3] == counts[11]  # none after the first steps; the evaluation has programs of its own
    exported = checkpoint.open_checkpoint(report["export"])
    assert exported.source["stage"] == config_lib.stage_of(config)
    exported.load(part, expect=expected_tree(part, exported.config))
    assert report["best_step"] == 12
    assert set(report["scores"]) == set(config.evaluated)
    assert report["environment"]["jax"] == jax.__version__
    if name == "causal_init":
        assert set(exported.parts) == {"transformer", "text_encoder", "vae"}
        assert Pipeline.load(report["export"]).config.vae == exported.config.vae
    tags = {"loss", "grad_norm", "learning_rate", "seconds_per_step", f"eval/{config.evaluation.metric}"}
    assert board(tmp_path / "run") >= tags - {"eval/loss"}
    if name != "text":
        shown = video.read_video(tmp_path / "run" / samples.FOLDER / "000012.mp4")
        frames = config.model.vae.video_frames(config.evaluation.frames)
        # Two clips side by side; the VAE's are beside their originals.
        assert shown.shape == (frames, 16, 16 * 2 * (2 if part == "vae" else 1), 3)
        assert shown.std() > 0
        assert (tmp_path / "run" / samples.FOLDER / "000012.png").stat().st_size > 0
        assert board(tmp_path / "run") >= {"samples", "frames_per_second"}


@pytest.mark.parametrize(
    ("name", "part"),
    [("text", "text_encoder"), pytest.param("causal_ode", "transformer", marks=pytest.mark.slow)],
)
def test_killed_and_resumed_is_bit_identical(name, part, base, tmp_path):
    """kill -9 while a checkpoint is written, then --resume auto; all in processes of their own.

    (In this one the program of a step may round otherwise: XLA's CPU backend divides work by the number of
    threads a device has, and here eight devices share them.)
    """
    changes = {"run__steps": 14, "run__checkpoint_every": 3}
    whole = _runs.words(name, base, tmp_path / "whole", **changes)
    folder = tmp_path / "killed"
    words = _runs.words(name, base, folder, **changes)
    with started([whole, words], tmp_path) as (uninterrupted, running):
        wait_for_losses(folder, 7, [running])
        wait_for_a_write(folder, [running])
        running.kill()
        running.wait()
        published = checkpointed(folder)
        assert uninterrupted.wait(timeout=240) == 0
    with started([[*words, "--resume", "auto"]], tmp_path) as (resumed,):
        assert resumed.wait(timeout=240) == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["resumed_at"] == max(published, default=0)
    assert 0 < report["resumed_at"] < 14
    assert losses(folder) == losses(tmp_path / "whole")

    # Killed again, after the last checkpoint and before the export: there is no step left to make.
    shutil.rmtree(folder / "export")
    again = stages.train(smoke(name, base, folder, **changes), resume="auto", is_quiet=True)
    assert again["scores"] == report["scores"]
    assert part in checkpoint.open_checkpoint(folder / "export").parts


def test_a_finished_run_goes_on_where_its_rate_is_constant(base, tmp_path):
    """To the losses of a run that was that long from the start; with a falling rate it is refused."""
    rate = {"optimizer__schedule": "constant"}
    for folder, steps in (("whole", (6,)), ("longer", (3, 6))):
        for count in steps:
            config = smoke("text", base, tmp_path / folder, run__steps=count, **rate)
            report = stages.train(config, resume="auto", is_quiet=True)
        assert report["steps"] == 6
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")
    assert json.loads((tmp_path / "longer" / "config.json").read_text())["settings"]["run"]["steps"] == 6
    with pytest.raises(UserError, match=r"run.steps=4 is less than the 6 steps that"):
        stages.train(smoke("text", base, tmp_path / "longer", run__steps=4, **rate), resume="auto")
    falling = {"optimizer__schedule": "cosine"}
    stages.train(smoke("text", base, tmp_path / "falling", run__steps=2, **falling), is_quiet=True)
    with pytest.raises(UserError, match=r"other settings \(run.steps\)"):
        stages.train(smoke("text", base, tmp_path / "falling", run__steps=4, **falling), resume="auto")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits(number, base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tick = metrics.Log.tick

    def interrupted(self, step, frames):
        tick(self, step, frames)
        if step == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(metrics.Log, "tick", interrupted)
    words = ["train", str(CONFIGS / "text.py"), "smoke=true", f"base={base}", "run.folder=run", "run.steps=9"]
    status = main([*words, "run.checkpoint_every=100", "--quiet"])
    assert status == 128 + number
    assert "--resume auto" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["3"]
    assert list(losses(tmp_path / "run")) == [1, 2, 3]


def test_numbers_that_are_not_finite_stop_the_run(base, tmp_path, monkeypatch):
    place, calls = sharding.place_batch, []

    def poisoned(batch, mesh):
        calls.append(1)
        batch = place(batch, mesh)
        # A label that does not exist: its cross-entropy is no number.
        return batch | {"attributes": batch["attributes"] + (1000 if len(calls) == 3 else 0)}

    monkeypatch.setattr(sharding, "place_batch", poisoned)
    config = smoke("text", base, tmp_path / "run", run__steps=8)
    with pytest.raises(TrainingError, match=r"not finite.*the checkpoint of step 2 is the last good"):
        stages.train(config, is_quiet=True)
    assert max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()) == 2


@pytest.mark.parametrize("history", [4, 200])  # 200: long before there are as many, as after a resumption
def test_a_loss_that_diverges_stops_the_run_and_is_not_saved(base, tmp_path, monkeypatch, history):
    monkeypatch.setattr(loop, "HISTORY_STEPS", history)
    monkeypatch.setattr(loop, "DIVERGED_STEPS", 3)
    train_step = text.train_step

    def diverging(config, encoder, state, batch):
        after, values = train_step(config, encoder, state, batch)
        return after, values | {"loss": values["loss"] * jnp.where(state.step < 7, 1.0, 1e3)}

    monkeypatch.setattr(text, "train_step", diverging)
    config = smoke("text", base, tmp_path / "run", run__steps=30)
    with pytest.raises(TrainingError, match=r"diverged.*the checkpoint of step 7 is the last good"):
        stages.train(config, is_quiet=True)


def test_a_base_that_is_not_there_is_named_with_what_makes_it(base, tmp_path):
    with pytest.raises(
        UserError, match=r"base=.*absent is no checkpoint directory .*longlive train`, or name toy"
    ):
        stages.train(smoke("text", tmp_path / "absent", tmp_path / "run"), is_quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "causal_share", "clips_of"),
    [
        ("teacher", 0.0, flow.encoded_clips),
        pytest.param("teacher", 0.5, flow.encoded_clips, marks=pytest.mark.slow),
        pytest.param("causal_ode", 1.0, flow.trajectories, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_like_one(name, causal_share, clips_of, base, tmp_path):
    """Losses agree to 1e-5 relative: sums over the batch are taken in another order."""
    config = smoke(name, base, tmp_path / "run", flow__causal_share=causal_share)

    def run(mesh):
        frozen = flow.load_frozen(config, mesh)
        clips = clips_of(config, frozen)
        step = jax.jit(functools.partial(flow.train_step, config, frozen.generator), donate_argnums=0)
        state, seen = flow.init(config, frozen, mesh), []
        for _ in range(2):
            batch = sharding.place_batch(clips.rows(np.arange(8)), mesh)
            state, values = step(state, batch, frozen.captions)
            seen.append(metrics.as_floats(values))
        return seen

    one = run(sharding.make_mesh(data=1, fsdp=1))
    many = run(sharding.make_mesh(data=2, fsdp=4, devices=jax.devices()))
    for a, b in zip(one, many, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_an_existing_run_is_not_overwritten(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", str(CONFIGS / "text.py"), "smoke=true", f"base={base}", "run.folder=run", "--quiet"]
    assert main(words) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(words) == 2
    assert "--resume auto" in capsys.readouterr().err
    assert main([*words, "--resume", "auto", "optimizer.learning_rate=0.7"]) == 2
    assert "optimizer.learning_rate" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(base, tmp_path, monkeypatch, capsys):
    """Two live runs would delete each other's half-written checkpoints."""
    words = _runs.words("text", base, tmp_path / "run")
    with RunLock(tmp_path / "run"):
        for options in ([], ["--resume", "auto"]):
            assert main([*words, *options]) == 2
            error = capsys.readouterr().err
            assert "is in use by process" in error
            assert error.count("\n") == 1
    assert not (tmp_path / "run/checkpoints").exists()
    with RunLock(tmp_path / "run"):  # it was let go
        pass


def test_a_killed_holder_leaves_the_folder_free(tmp_path):
    program = f"""
import pathlib, time
from longlive_jax.training.lock import RunLock
with RunLock(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(100)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(UserError, match=f"process {holder.pid} on"), RunLock(tmp_path):
                pass
        finally:
            holder.kill()
    with RunLock(tmp_path):
        pass


def test_a_base_without_the_parts_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIGS / "teacher_block.py"), "smoke=true", "base=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
