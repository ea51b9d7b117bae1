"""The trainer as its user meets it: it learns, survives being killed, and stops before harm is done."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import checkpoint, sharding
from longlive_jax.cli.main import main
from longlive_jax.convert.shapes import expected_tree
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.models.tokenizer import train_word_tokenizer
from longlive_jax.training import flow, loop, metrics, stages
from longlive_jax.training import world as worlds
from longlive_jax.training.config import load_config
from longlive_jax.training.loop import TrainingError
from longlive_jax.training.stages import text

CONFIGS = pathlib.Path(__file__).parents[2] / "configs/toy"


# Slow steps, so that there is time to kill the run between them; nothing else differs.
_SLOW_STEPS = """
import sys, time
from longlive_jax.cli.main import main
from longlive_jax.training import metrics
tick = metrics.Log.tick
def slow(self, *arguments):
    time.sleep(0.3)
    tick(self, *arguments)
metrics.Log.tick = slow
sys.exit(main({words!r}))
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint of the smoke model with random weights in every part."""
    folder, random = tmp_path_factory.mktemp("base"), np.random.default_rng(0)
    model = load_config(CONFIGS / "causal_init.py", {"smoke": "true"}).model

    def draw(spec):
        fan_in = np.prod(spec.shape[-2:-1]) if len(spec.shape) > 1 else 100
        return (random.normal(size=spec.shape) / np.sqrt(fan_in)).astype(np.float32)

    tokenizer = train_word_tokenizer(worlds.caption_table(), vocab_size=32, path=folder / "t.json")
    with checkpoint.create(folder / "base", model, source={"made": "for tests"}) as writer:
        for part in ("transformer", "text_encoder", "vae"):
            writer.add_tree(part, jax.tree.map(draw, expected_tree(part, model)))
        writer.add_tokenizer(tokenizer)
    return folder / "base"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Stages run on one of the simulated devices: eight of them take turns on the test machine's cores."""
    mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", mesh)


def smoke(name, base, folder, **changes):
    """The smoke config of a stage that starts from `base`; changes are dotted names with "__" for "."."""
    settings = {key.replace("__", "."): value for key, value in changes.items()}
    settings |= {"smoke": "true", "run.folder": str(folder), "base": str(base or "")}
    return load_config(CONFIGS / f"{name}.py", settings)


def losses(folder):
    """Loss by step, as logged."""
    lines = [json.loads(line) for line in (folder / metrics.METRICS_FILE).read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vae", "vae"),
        ("text", "text_encoder"),
        ("teacher_2", "transformer"),
        ("causal_init", "transformer"),
    ],
)
def test_a_smoke_run_overfits_and_exports(name, part, base, tmp_path):
    changes = {"run__steps": 12, "run__checkpoint_every": 50, "optimizer__learning_rate": 5e-3}
    config = smoke(name, None if name == "vae" else base, tmp_path / "run", **changes)
    report = stages.train(config, is_quiet=True)
    seen = list(losses(tmp_path / "run").values())
    assert np.mean(seen[-3:]) < 0.95 * np.mean(seen[:3])
    exported = checkpoint.open_checkpoint(report["export"])
    assert exported.source["stage"] == ("teacher" if name == "teacher_2" else name)
    exported.load(part, expect=expected_tree(part, exported.config))
    assert report["best_step"] == 12
    assert set(report["scores"]) >= {config.evaluation.metric}
    assert report["environment"]["jax"] == jax.__version__
    if name == "causal_init":
        assert set(exported.parts) == {"transformer", "text_encoder", "vae"}
        assert Pipeline.load(report["export"]).config.vae == exported.config.vae


def test_killed_and_resumed_is_bit_identical(base, tmp_path):
    """kill -9 somewhere between two checkpoints, then --resume auto."""
    changes = {"run__steps": 14, "run__checkpoint_every": 3}
    stages.train(smoke("text", base, tmp_path / "whole", **changes), is_quiet=True)

    words = ["train", str(CONFIGS / "text.py"), "--quiet", "smoke=true", "run.steps=14"]
    words += ["run.checkpoint_every=3", f"base={base}", "run.folder=killed"]
    program = _SLOW_STEPS.format(words=words)
    environment = os.environ | {"XLA_FLAGS": ""}  # one device
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    folder = tmp_path / "killed"
    try:
        deadline = time.monotonic() + 120
        while len(losses(folder) if (folder / metrics.METRICS_FILE).exists() else ()) < 7:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    report = stages.train(smoke("text", base, folder, **changes), resume="auto", is_quiet=True)
    assert 3 <= report["resumed_at"] < 14
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
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
        return batch | {"latents": batch["latents"] * (np.nan if len(calls) == 3 else 1)}

    monkeypatch.setattr(sharding, "place_batch", poisoned)
    config = smoke("teacher_1", base, tmp_path / "run", run__steps=8)
    with pytest.raises(TrainingError, match=r"not finite.*the checkpoint of step 2 is the last good"):
        stages.train(config, is_quiet=True)
    assert max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir()) == 2


def test_a_loss_that_diverges_stops_the_run_and_is_not_saved(base, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "HISTORY_STEPS", 4)
    monkeypatch.setattr(loop, "DIVERGED_STEPS", 3)
    train_step = text.train_step

    def diverging(config, encoder, state, batch):
        after, values = train_step(config, encoder, state, batch)
        return after, values | {"loss": values["loss"] * jnp.where(state.step < 7, 1.0, 1e3)}

    monkeypatch.setattr(text, "train_step", diverging)
    config = smoke("text", base, tmp_path / "run", run__steps=30)
    with pytest.raises(TrainingError, match=r"diverged.*the checkpoint of step 7 is the last good"):
        stages.train(config, is_quiet=True)


def test_nothing_is_compiled_after_the_first_steps(base, tmp_path):
    stages.train(smoke("text", base, tmp_path / "run", run__steps=8), is_quiet=True)
    lines = (tmp_path / "run" / metrics.METRICS_FILE).read_text().splitlines()
    counts = [found["compilations"] for found in map(json.loads, lines) if "loss" in found]
    assert counts[2] > 0
    assert len(set(counts[2:-1])) == 1  # the evaluation at the end has programs of its own


@pytest.mark.parametrize("causal_share", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_eight_devices_train_like_one(causal_share, base, tmp_path):
    """Losses agree to 1e-5 relative: sums over the batch are taken in another order."""
    config = smoke("teacher_2", base, tmp_path / "run", flow__causal_share=causal_share)

    def run(mesh):
        frozen = flow.load_frozen(config, mesh)
        clips = flow.encoded_clips(config, frozen)
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


def test_a_base_without_the_parts_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIGS / "teacher_1.py"), "smoke=true", "base=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
