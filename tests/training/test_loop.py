"""The loop that all stages share: what a signal, a loss that leaves, and a slow disk do to a run."""

import json
import pathlib
import signal
import threading
import time

import grain
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from longlive_jax import checkpoint
from longlive_jax.cli.main import main
from longlive_jax.training import latents, loop, stages, stored
from longlive_jax.training.loop import Interrupted, TrainingError, TrainingRun
from longlive_jax.training.stages import text
from tests.training import _runs
from tests.training._runs import losses, smoke

pytestmark = pytest.mark.usefixtures("fast_programs", "one_device")


def config_of(folder, **changes):
    return smoke("text", None, folder, **{"run__checkpoint_every": 100, **changes})


def make_steps(config, values, *, resume="never", number=None, at=0):
    """Runs a stage that does nothing but count; its steps have the given losses.

    Args:
      config: of the run.
      values: metrics of a step, as a function of its number.
      resume: see `TrainingRun`.
      number: of a signal that comes in step `at`.
      at: see there.
    """
    with TrainingRun(config, resume=resume) as run:
        data = iter(grain.MapDataset.range(100).repeat().to_iter_dataset())
        state = run.start({"count": jnp.zeros(())}, data)
        for step in run.steps():
            state = {"count": state["count"] + next(data) * 0 + 1}
            if step == at and number is not None:
                signal.raise_signal(number)
            found = {"grad_norm": 1.0, **values(step)}
            run.after(step, state, {name: jnp.float32(x) for name, x in found.items()}, frames=0)
            if run.is_evaluation_due(step):
                run.evaluated(step, {"accuracy": 0.5})
        export = pathlib.Path(config.run.folder) / "export"
        with checkpoint.create(export, config.model, source={}, overwrite=True):
            pass
        assert float(state["count"]) == config.run.steps
        return run.finish(export=export)


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


@pytest.fixture
def short_history(monkeypatch):
    monkeypatch.setattr(loop, "DIVERGED_STEPS", 3)


# --- a loss that leaves -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_second_networks_loss_that_is_no_number_stops_the_run(wrong, tmp_path):
    config = config_of(tmp_path / "run", run__steps=9, run__checkpoint_every=2)
    with pytest.raises(TrainingError, match=r"step 5: .*finite \(generator_loss .*checkpoint of step 4 is"):
        make_steps(config, lambda step: {"loss": 1.0, "generator_loss": wrong if step == 5 else 1.0})


@pytest.mark.usefixtures("short_history")
def test_a_second_networks_loss_that_diverges_stops_the_run_and_is_not_saved(tmp_path, capsys):
    """It is there in every second step only; between them the run still counts as diverging."""

    def values(step):
        return {"loss": 1.0} if step % 2 else {"loss": 1.0, "generator_loss": 0.1 if step <= 8 else 5.0}

    config = config_of(tmp_path / "run", run__steps=40, run__checkpoint_every=1)
    with pytest.raises(TrainingError, match=r"the generator_loss diverged \(5 for 3 steps, 0.1 before\)"):
        make_steps(config, values)
    assert saved(tmp_path / "run")[-1] == 9
    assert (
        "step 11, which is not saved (its generator_loss is 5, the usual one 0.1" in capsys.readouterr().err
    )


@pytest.mark.usefixtures("short_history")
def test_a_high_last_step_is_not_saved_and_that_is_said(tmp_path, capsys):
    config = config_of(tmp_path / "run", run__steps=9, run__checkpoint_every=4)
    report = make_steps(config, lambda step: {"loss": 20.0 if step == 9 else 1.0})
    assert report["steps"] == 9
    assert saved(tmp_path / "run") == [4, 8]
    said = [line for line in capsys.readouterr().err.splitlines() if "not saved" in line]
    assert said == [
        "step 9, which is not saved (its loss is 20, the usual one 1: it may be diverging); "
        "the newest checkpoint is of step 8"
    ]


# --- signals ----------------------------------------------------------------------------------------


def test_a_signal_says_what_is_saved(tmp_path):
    config = config_of(tmp_path / "run", run__steps=9)
    with pytest.raises(Interrupted) as stop:
        make_steps(config, lambda step: {"loss": 1.0}, number=signal.SIGTERM, at=5)
    assert str(stop.value) == "stopped by SIGTERM after step 5; --resume auto goes on from step 5"
    assert stop.value.status == 128 + signal.SIGTERM
    assert saved(tmp_path / "run") == [5]
    assert make_steps(config, lambda step: {"loss": 1.0}, resume="auto")["resumed_at"] == 5


@pytest.mark.usefixtures("short_history")
@pytest.mark.parametrize(
    ("every", "onward"),
    [(4, "--resume auto goes on from step 4"), (100, "the same command starts it again")],
)
def test_a_signal_at_a_high_loss_says_where_the_run_goes_on_and_why(every, onward, tmp_path):
    config = config_of(tmp_path / "run", run__steps=9, run__checkpoint_every=every)
    with pytest.raises(Interrupted) as stop:
        make_steps(config, lambda step: {"loss": 20.0 if step == 6 else 1.0}, number=signal.SIGINT, at=6)
    assert str(stop.value) == (
        "stopped by SIGINT after step 6, which is not saved (its loss is 20, the usual one 1: it may be "
        f"diverging); {onward}"
    )
    report = make_steps(config, lambda step: {"loss": 1.0}, resume="auto")
    assert report["resumed_at"] == (4 if every == 4 else 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_stops_after_the_shards_under_way(
    number, base, tmp_path, monkeypatch, capsys
):
    """While clips are encoded: those that are done stay, and no step is made."""
    encode, begun = stored.StoredClips._make_shard, []

    def encoded(self, index, **arguments):
        begun.append(index)
        if len(begun) == 2:
            signal.raise_signal(number)  # to the main thread, which waits for this one
        encode(self, index, **arguments)

    monkeypatch.setattr(stored.StoredClips, "_make_shard", encoded)
    monkeypatch.setattr(latents, "_encode", lambda vae, params, video: np.zeros((len(video), 6, 2, 2, 16)))
    words = _runs.words("causal_init", base, tmp_path / "run", data__examples=64 * 50)
    assert main(words) == 128 + number
    error = capsys.readouterr().err.splitlines()
    name = signal.Signals(number).name
    assert error[-1] == f"stopped by {name} before a step was made; the same command starts it again"
    kept = [file.stem for file in (tmp_path / "latents").glob("*/*.npy")]
    assert sorted(map(int, kept)) == sorted(begun)
    assert 2 <= len(begun) < 50
    assert losses(tmp_path / "run") == {}


def test_a_signal_before_the_first_step_of_a_resumed_run_loses_nothing(tmp_path):
    config = config_of(tmp_path / "run", run__steps=9)
    for at in (3, 4):
        with pytest.raises(Interrupted, match=f"goes on from step {3}$"):
            make_steps(config, lambda step: {"loss": 1.0}, resume="auto", number=signal.SIGTERM, at=at)
    assert saved(tmp_path / "run") == [3]
    assert make_steps(config, lambda step: {"loss": 1.0}, resume="auto")["resumed_at"] == 3


def test_a_signal_before_the_first_step_of_a_stage_is_said_in_one_line(base, tmp_path, monkeypatch, capsys):
    def interrupted(config):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(text, "make_tokenizer", interrupted)
    assert main(_runs.words("text", base, tmp_path / "run")) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == (
        "stopped by SIGTERM before a step was made; the same command starts it again\n"
    )


# --- beside the steps -------------------------------------------------------------------------------


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The writer is held until two more steps are made, and a third has begun."""
    publish, may_publish, waited = ocp.CheckpointManager._finalize_checkpoint, threading.Event(), []

    def held(self, *arguments):
        waited.append(may_publish.wait(timeout=60))
        return publish(self, *arguments)

    monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", held)
    folder, complete = tmp_path / "run", []

    def values(step):
        if step > 3:
            complete.append([path.name for path in (folder / "checkpoints").iterdir() if path.name.isdigit()])
        if step == 6:
            may_publish.set()
        return {"loss": 1.0}

    make_steps(config_of(folder, run__steps=8, run__checkpoint_every=3, run__keep=9), values)
    assert complete[:3] == [[]] * 3  # in steps 4 to 6 nothing was there yet
    assert all(waited)
    assert saved(folder) == [3, 6, 8]


def test_the_pace_of_alternating_steps_is_their_mean(tmp_path):
    """Whatever is saved and evaluated between them, and however long that takes."""

    def values(step):
        time.sleep(0.3 if step % 3 == 1 else 0.06)
        return {"loss": 1.0}

    config = config_of(tmp_path / "run", run__steps=18, run__checkpoint_every=2, run__eval_every=6)
    assert 0.13 < make_steps(config, values)["seconds_per_step"] < 0.3  # the median is 0.06


def test_a_report_tells_the_time_of_all_starts(tmp_path):
    config = config_of(tmp_path / "run", run__steps=6)

    def slow(step):
        time.sleep(0.1)
        return {"loss": 1.0}

    with pytest.raises(Interrupted):
        make_steps(config, slow, number=signal.SIGTERM, at=4)
    report = make_steps(config, slow, resume="auto")
    assert report["seconds"] + 0.4 < report["total_seconds"]
    assert json.loads((tmp_path / "run/report.json").read_text())["total_seconds"] == report["total_seconds"]


def test_an_export_tells_after_how_many_steps_it_was_made(base, tmp_path):
    changes = {"run__steps": 3, "run__export_every": 1, "run__keep_exports": True}
    seen = {}

    def note(self, step, path):
        exported(self, step, path)
        seen[step] = checkpoint.open_checkpoint(path).source["steps"]

    exported = TrainingRun.exported
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "exported", note)
        stages.train(smoke("text", base, tmp_path / "run", **changes), is_quiet=True)
    assert seen == {1: 1, 2: 2, 3: 3}
    for step in (1, 2, 3):
        kept = checkpoint.open_checkpoint(tmp_path / "run/exports" / f"{step:06d}")
        assert kept.source["steps"] == step
        assert kept.source["stage"] == "text"
